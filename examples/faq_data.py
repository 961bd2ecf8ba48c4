"""Tenants, their FAQs and queries: from the bundled JSON, a local CLINC150, or a dataset on the Hub."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_adapter_distillation.composition import check_name

BUNDLED = Path(__file__).parent / "data" / "faq_tenants.json"
CLASSES_PER_TENANT = 15  # for a Hub dataset whose classes belong to no tenant


@dataclass
class Faq:
    """A question with its answer, and the queries that people typed for it."""

    question: str
    answer: str = ""
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    label: str = ""  # a short name; without one the question is short


@dataclass
class Tenant:
    """A user of the platform with FAQs of its own."""

    name: str
    faqs: list[Faq]


def load_tenants(data: str, seed: int) -> list[Tenant]:
    """Read the tenants.

    Args:
        data: A JSON file of the bundled form, `data_full.json` of CLINC150 (or its folder) with `domains.json` beside
            it, or the id of a Hub dataset with a class column and a text column, whose classes are dealt to tenants in
            order.
        seed: For shuffling the training queries of an FAQ.

    Returns:
        The tenants; all queries are in `train`, but for data with validation and test splits of their own.

    Raises:
        ValueError: If the data is none of these.
    """
    path = Path(data)
    path = path / "data_full.json" if path.is_dir() and (path / "data_full.json").is_file() else path
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--data {data} is not a JSON file ({error}).") from error
        if "tenants" in content:
            tenants = _from_bundled(content, random.Random(seed))
        elif {"train", "test"} <= content.keys() and (path.parent / "domains.json").is_file():
            domains = json.loads((path.parent / "domains.json").read_text(encoding="utf-8"))
            splits = [content["train"], content.get("val", []), content["test"]]
            tenants = _from_classes(splits, domains, random.Random(seed))
        else:
            raise ValueError(f"{path} has neither 'tenants' nor 'train', 'test' and a domains.json beside it.")
    elif data.endswith(".json") or data.startswith((".", "/")):
        raise ValueError(f"--data {data} does not exist; give a JSON file, a CLINC150 folder or a Hub dataset id.")
    else:
        tenants = _from_hub(data, random.Random(seed))
    if len(tenants) < 2:
        raise ValueError(f"--data {data} has {len(tenants)} tenants; at least two are needed, one of them new.")
    check_texts(tenants)
    return tenants


def check_texts(tenants: Sequence[Tenant]) -> None:
    """Check that each tenant has a name and FAQs, and each FAQ a question and queries.

    Raises:
        ValueError: If something is missing, or a text is empty.
    """

    def is_text(value: object) -> bool:
        return isinstance(value, str) and bool(value.strip())

    for number, tenant in enumerate(tenants, start=1):
        if not is_text(tenant.name):
            raise ValueError(f"Tenant {number} is named {tenant.name!r}; give it a name.")
        if not tenant.faqs:
            raise ValueError(f"Tenant {tenant.name!r} has no FAQs; give it some, or leave it out.")
        for number, faq in enumerate(tenant.faqs, start=1):
            if not is_text(faq.question):
                raise ValueError(
                    f"FAQ {number} of tenant {tenant.name!r} has the question {faq.question!r}; write one."
                )
            place = f"FAQ {faq.question!r} of tenant {tenant.name!r}"
            if not faq.train:
                raise ValueError(f"{place} has no queries; give it some, or leave it out.")
            if not all(is_text(query) for query in (*faq.train, *faq.validation, *faq.test)):
                raise ValueError(f"{place} has an empty query; remove it.")


def choose_new(tenants: Sequence[Tenant], name: str) -> tuple[Tenant, list[Tenant]]:
    """Return the new tenant, by default the last one, and the others.

    Raises:
        ValueError: If there is no such tenant, it has too few FAQs, or the names of the tenants make no adapters.
    """
    names = [tenant.name for tenant in tenants]
    for each in names:
        check_name(each, f"Tenant {each!r}", "rename the tenant")
        if names.count(each) > 1:
            raise ValueError(f"Two tenants are named {each!r}; rename one of them.")
    if name and name not in names:
        raise ValueError(f"--new_tenant {name} is not in the data; choose one of {', '.join(names)}.")
    new = tenants[names.index(name) if name else -1]
    if len(new.faqs) < 2:
        raise ValueError(f"Tenant {new.name!r} has {len(new.faqs)} FAQ; a ranking needs at least two.")
    return new, [tenant for tenant in tenants if tenant is not new]


def hold_out(tenant: Tenant, shots: int, n_validation: int = 0) -> None:
    """Keep `shots` queries of each FAQ for training.

    Of the others, `n_validation` are for validation and the rest for testing, if there are no splits for that.

    Raises:
        ValueError: If an FAQ has so few queries that none would be left for testing.
    """
    for faq in tenant.faqs:
        held = 0 if faq.validation else n_validation
        if len(faq.train) <= shots + held and not faq.test:
            raise ValueError(f"{shots} training queries are too many: {faq.question!r} has {len(faq.train)} in all.")
        faq.train, rest = faq.train[:shots], faq.train[shots:]
        faq.validation = faq.validation or rest[:held]
        faq.test = faq.test or rest[held:]


def _from_bundled(content: dict, rng: random.Random) -> list[Tenant]:
    tenants = []
    for tenant in content["tenants"]:
        faqs = []
        try:
            for faq in tenant["faqs"]:
                queries = rng.sample(faq["queries"], len(faq["queries"]))
                label = str(faq.get("id", "")).replace("_", " ")
                faqs.append(Faq(faq["question"], faq.get("answer", ""), queries, label=label))
            tenants.append(Tenant(tenant["name"], faqs))
        except (KeyError, TypeError) as error:
            place = f"Tenant {len(tenants) + 1}, FAQ {len(faqs) + 1}"
            raise ValueError(f"{place}: {error} is missing or of another form; see {BUNDLED.name}.") from error
    return tenants


def _from_classes(splits: Sequence[list], domains: dict[str, list[str]], rng: random.Random) -> list[Tenant]:
    """Make tenants of rows of text and class, in the splits train, validation and test."""
    queries: dict[str, tuple[list[str], list[str], list[str]]] = defaultdict(lambda: ([], [], []))
    for split, rows in enumerate(splits):
        for text, intent in rows:
            queries[intent][split].append(text)
    for train, _, _ in queries.values():
        rng.shuffle(train)
    return [
        Tenant(domain.replace(" ", "_"), [Faq(name.replace("_", " "), "", *queries[name]) for name in names])
        for domain, names in domains.items()
    ]


def _from_hub(data: str, rng: random.Random) -> list[Tenant]:
    loaded = datasets.load_dataset(data, "plus") if data == "clinc/clinc_oos" else datasets.load_dataset(data)
    features = loaded["train"].features
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") == "string"]
    if len(classes) != 1 or not texts or "test" not in loaded:
        raise ValueError(f"--data {data} needs one class column, a text column and the splits train and test.")
    label = features[classes[0]]
    names = [name for name in label.names if name not in ("oos", "out_of_scope")]
    splits = [
        [(row[texts[0]], label.int2str(row[classes[0]])) for row in loaded.get(split, [])]
        for split in ("train", "validation", "test")
    ]
    parts = [names[start : start + CLASSES_PER_TENANT] for start in range(0, len(names), CLASSES_PER_TENANT)]
    return _from_classes(splits, {f"tenant_{i}": part for i, part in enumerate(parts)}, rng)


def make_pairs(
    tenant: Tenant, split: str, tokenizer: PreTrainedTokenizerBase, n_queries: int, n_wrong: int | None, seed: int
) -> Dataset:
    """Tokenised (query, FAQ) pairs of a tenant.

    Args:
        tenant: The tenant.
        split: `"train"`, `"validation"` or `"test"`.
        tokenizer: The cross-encoder's tokenizer.
        n_queries: How many queries of an FAQ are used at most.
        n_wrong: How many wrong FAQs a query is paired with; None for all of them.
        seed: For drawing the wrong FAQs.

    Returns:
        A dataset with the tokenizer's columns, `labels` (1 for the right FAQ) and `query_ids`; the pairs of a query
        stand together.
    """
    rng, rows, query_id = random.Random(seed), [], 0
    for right, faq in enumerate(tenant.faqs):
        others = [index for index in range(len(tenant.faqs)) if index != right]
        for query in getattr(faq, split)[:n_queries]:
            wrong = others if n_wrong is None else rng.sample(others, min(n_wrong, len(others)))
            for index in (right, *wrong):
                rows.append((query, tenant.faqs[index].question, int(index == right), query_id))
            query_id += 1
    queries, texts, labels, query_ids = map(list, zip(*rows, strict=True))
    encoded = tokenizer(queries, texts, truncation="longest_first", max_length=64)
    return Dataset.from_dict({**encoded, "labels": labels, "query_ids": query_ids})
