"""The tenants of a run of `streaming_tenants.py`: the new one with its queries, and the pool of its teachers.

The pools are: `unrelated`, all other tenants; `relatives`, these and a relative of the new tenant, which has two
thirds of its FAQs; `streaming`, the tenants that came before the new one; `random`, the unrelated teachers with random
weights of the same norms, which tells what teachers know from what any weights do.
"""

import json
import random
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tenant_jobs import Arguments
from torch import nn

import hf_adapter_distillation as had

from faq_data import (  # isort: skip
    Faq,
    Tenant,
    check_held_out,
    check_platform,
    hold_out,
    load_tenants,
)
from inputs import read_json  # isort: skip

TEACHER_SEED = 0
QUERY_LOG = 20  # queries of each FAQ, at most, that are read without labels
NEW = "new"  # the name of the new tenant's adapter and head
RELATIVE = "_relative"


class Arrival(NamedTuple):
    """A new tenant on the platform.

    Args:
        tenant: The new tenant; its `train` queries are the labelled ones.
        others: The tenants of the pool, each with as many training queries.
        teachers: The names of their adapters.
        unlabelled: Other queries of the new tenant.
    """

    tenant: Tenant
    others: list[Tenant]
    teachers: list[str]
    unlabelled: list[str]


def relative_of(tenant: Tenant) -> Tenant:
    """Return a relative of a tenant as it was loaded: two thirds of its FAQs, the second half of their queries."""
    n_faqs = len(tenant.faqs)
    shared = sorted(random.Random(tenant.name).sample(range(n_faqs), round(2 * n_faqs / 3)))
    faqs = [tenant.faqs[number] for number in shared]
    return Tenant(f"{tenant.name}{RELATIVE}", [replace(faq, train=_second_half(faq)) for faq in faqs])


def _second_half(faq: Faq) -> list[str]:
    return faq.train[len(faq.train) // 2 :]


def _hold_out_validation(tenant: Tenant, loaded: Tenant, number: int) -> None:
    """Keep validation queries for FAQs without any: the same for all seeds, so that none of them tests a seed."""
    for faq, same in zip(tenant.faqs, loaded.faqs, strict=True):
        if not faq.validation:
            faq.validation = same.train[:number]
            faq.train = [query for query in faq.train if query not in faq.validation]


def shots_of(args: Arguments, tenant: Tenant) -> int:
    """Return the training queries of each FAQ of a new tenant."""
    return max(len(faq.train) for faq in tenant.faqs) if args.shots == "all" else int(args.shots)


def teacher_tenant(args: Arguments, name: str) -> Tenant:
    """Return the tenant, or the relative of a tenant, whose queries train a teacher."""
    tenants = {tenant.name: tenant for tenant in load_tenants(args.data, TEACHER_SEED)}
    tenant = tenants[name] if name in tenants else relative_of(tenants[name.removesuffix(RELATIVE)])
    hold_out(tenant, args.teacher_queries, args.search_queries, at_most=True)
    return tenant


def arrival(args: Arguments, name: str, seed: int) -> Arrival:
    """Return a new tenant with the queries that a seed draws, and its pool."""
    tenants = load_tenants(args.data, seed)
    number = [tenant.name for tenant in tenants].index(name)
    new = tenants.pop(number)
    others = tenants[:number] if args.pool == "streaming" else tenants
    others = others[: args.others] if args.others else others
    loaded = load_tenants(args.data, TEACHER_SEED)[number]
    _hold_out_validation(new, loaded, args.search_queries)
    if args.pool == "relatives":
        others = [*others, relative_of(loaded)]
        for faq, same in zip(new.faqs, loaded.faqs, strict=True):
            of_relative = set(_second_half(same))
            faq.train = [query for query in faq.train if query not in of_relative]
    shots = shots_of(args, new)
    beyond = [query for faq in new.faqs if faq.test for query in faq.train[shots : shots + QUERY_LOG]]
    for tenant in [new, *others]:
        hold_out(tenant, shots, args.search_queries, at_most=tenant is not new or args.shots == "all")
    unlabelled = beyond or [query for faq in new.faqs for query in faq.validation[:QUERY_LOG]]
    return Arrival(new, others, [tenant.name for tenant in others], unlabelled)


def check_tenants(args: Arguments, tenants: list[Tenant]) -> None:
    """Check that all tenants have names, FAQs and the queries that the arguments ask for.

    Raises:
        ValueError: If a name cannot be an adapter's, a text cannot be read, or an FAQ has too few queries.
    """
    check_platform(tenants)
    if args.shots == "all" and not all(faq.test for tenant in tenants for faq in tenant.faqs):
        raise ValueError("--shots all needs data with test queries of their own, as CLINC150 has; give a number.")
    for tenant in tenants:
        if tenant.name == NEW or (args.pool == "relatives" and tenant.name.endswith(RELATIVE)):
            raise ValueError(f"Tenant {tenant.name!r} has a name that the benchmark gives itself; rename the tenant.")
        trained = [tenant]
        if args.pool == "relatives":
            trained.append(relative_of(tenant))
            tenant = replace(
                tenant, faqs=[replace(faq, train=faq.train[: len(faq.train) // 2]) for faq in tenant.faqs]
            )
        check_held_out(tenant, shots_of(args, tenant), args.search_queries, at_most=args.shots == "all")
        for each in trained:
            check_held_out(each, args.teacher_queries, args.search_queries, "--teacher_queries", at_most=True)


def teachers_to_train(args: Arguments, names: list[str]) -> list[str]:
    """Return those of the teachers that are not trained yet.

    Raises:
        ValueError: If an existing adapter was trained with other arguments.
    """
    missing = []
    for name in names:
        file = Path(args.teachers_dir) / name / "made_with.json"
        if not file.is_file():
            if file.parent.exists():
                raise ValueError(f"{file.parent} is no teacher of this benchmark; choose another --teachers_dir.")
            missing.append(name)
            continue
        remedy = f"remove {file.parent}"
        made_with = {"architecture": "cross-encoder"} | read_json(file, dict, remedy)
        if different := [key for key, value in args.of_teachers().items() if made_with.get(key) != value]:
            raise ValueError(
                f"{file.parent} was made with --{different[0]} {made_with.get(different[0])}, not "
                f"{args.of_teachers()[different[0]]}; choose another --teachers_dir."
            )
    return missing


def keep_teacher(args: Arguments, save: Callable[[str], Any], name: str, metrics: dict[str, float]) -> None:
    """Save a teacher into a folder, which gets its name only when it is complete."""
    with tempfile.TemporaryDirectory(dir=args.teachers_dir) as temporary:
        save(f"{temporary}/{name}")
        Path(temporary, name, "made_with.json").write_text(json.dumps(args.of_teachers() | metrics, indent=1))
        Path(temporary, name).rename(Path(args.teachers_dir) / name)


def adapter_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """Return the parameters of an adapter."""
    places = model.get_adapter(name).values()
    return [parameter for place in places for module in place.values() for parameter in module.parameters()]


def load_teachers(args: Arguments, model: Any, names: Sequence[str], seed: int) -> None:
    """Load the adapters of teachers that are not on a model yet; those of the pool `random` get the seed's weights."""
    for name in names:
        if name not in model.adapters_config:
            model.load_adapter(str(Path(args.teachers_dir) / name), load_as=name, set_active=False)
        if args.pool == "random":
            randomize(adapter_parameters(model, name), f"{name} {seed}")


def learned_weights(weights: had.TeacherWeights | None) -> dict[str, Any]:
    """Return the mean weight of each teacher and their gain, if they were learned for a student."""
    return {} if weights is None else {"weights": weights.mean(), "gain": weights.gain}


@torch.no_grad()
def randomize(parameters: Sequence[torch.Tensor], key: str) -> None:
    """Replace each tensor by a random one of the same norm, which depends on the key alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.copy_(noise * (parameter.norm() / noise.norm()))
