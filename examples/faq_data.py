"""Tenants, their FAQs and queries: from the bundled JSON, a local CLINC150, or a dataset on the Hub."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import Dataset
from inputs import is_unicode, read_json
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
    path, rng = Path(data), random.Random(seed)
    path = path / "data_full.json" if (path / "data_full.json").is_file() else path
    if path.is_file():
        tenants = _from_json(path, rng)
    elif not path.exists() and (data.endswith(".json") or data.startswith((".", "/"))):
        raise ValueError(f"--data {data} does not exist; give a JSON file, a CLINC150 folder or a Hub dataset id.")
    else:
        tenants = _from_hub(data, rng)
    if not tenants:
        raise ValueError(f"--data {data} has no tenants; give it some, each with a name and FAQs.")
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
            if bad := [query for query in (*faq.train, *faq.validation, *faq.test) if not is_text(query)]:
                what = "an empty query" if isinstance(bad[0], str) else f"a query that is no text, {bad[0]!r}"
                raise ValueError(f"{place} has {what}; remove it.")
            if faq.question in (other.question for other in tenant.faqs[: number - 1]):
                raise ValueError(f"Two FAQs of tenant {tenant.name!r} have the question {faq.question!r}; join them.")


def check_unicode(tenant: Tenant) -> None:
    """Check that a tokenizer can read the texts of a tenant.

    Raises:
        ValueError: If UTF-8 cannot encode a text.
    """
    for faq in tenant.faqs:
        for text in (faq.question, *faq.train, *faq.validation, *faq.test):
            if not is_unicode(text):
                raise ValueError(f"{text[:80]!r} is not valid Unicode; write the text of the FAQ.")


def check_names(tenants: Sequence[Tenant]) -> None:
    """Check that each tenant can have an adapter of its name, and FAQs to rank.

    Raises:
        ValueError: If a name makes no adapter or stands twice, or a tenant has a single FAQ.
    """
    names = [tenant.name for tenant in tenants]
    for tenant in tenants:
        check_name(tenant.name, f"Tenant {tenant.name!r}", "rename the tenant")
        if names.count(tenant.name) > 1:
            raise ValueError(f"Two tenants are named {tenant.name!r}; rename one of them.")
        if len(tenant.faqs) < 2:
            raise ValueError(f"Tenant {tenant.name!r} has {len(tenant.faqs)} FAQ; a ranking needs at least two.")


def check_platform(tenants: Sequence[Tenant]) -> None:
    """Check that one tenant can be new and others can teach it.

    Raises:
        ValueError: If there are not two, or something is wrong with their names, FAQs or texts.
    """
    if len(tenants) < 2:
        raise ValueError(f"--data has {len(tenants)} tenant; at least two are needed, one of them new.")
    check_names(tenants)
    for tenant in tenants:
        check_unicode(tenant)


def choose_new(tenants: Sequence[Tenant], name: str) -> tuple[Tenant, list[Tenant]]:
    """Return the new tenant, by default the last one, and the others.

    Raises:
        ValueError: If there is no such tenant or no other, or something is wrong with their names, FAQs or texts.
    """
    check_platform(tenants)
    names = [tenant.name for tenant in tenants]
    if name and name not in names:
        raise ValueError(f"--new_tenant {name} is not in the data; choose one of {', '.join(names)}.")
    new = tenants[names.index(name) if name else -1]
    return new, [tenant for tenant in tenants if tenant is not new]


def check_held_out(
    tenant: Tenant, shots: int, n_validation: int = 0, option: str = "--shots", at_most: bool = False
) -> None:
    """Check that each FAQ has the queries that `hold_out` takes.

    Args:
        tenant: The tenant.
        shots: Training queries of each FAQ.
        n_validation: Validation queries of each FAQ that has none of its own.
        option: The argument that gave `shots`, for the error.
        at_most: Whether an FAQ with test queries of its own may have fewer training queries, but one.

    Raises:
        ValueError: If an FAQ has too few.
    """
    for faq in tenant.faqs:
        held, tested = 0 if faq.validation else n_validation, 0 if faq.test else 1
        left = len(faq.train) - held - tested
        if left < (min(shots, 1) if at_most and faq.test else shots):
            others = [f"{held} for validation"] * bool(held) + ["one to test"] * tested
            beside = f", {' and '.join(others)} among them" if others else ""
            raise ValueError(
                f"{option} {shots} is out of range: {faq.question!r} has {len(faq.train)} queries in all{beside}; "
                "lower it."
            )


def hold_out(tenant: Tenant, shots: int, n_validation: int = 0, at_most: bool = False) -> None:
    """Keep `shots` queries of each FAQ for training.

    Of the others, `n_validation` are for validation and the rest for testing, if there are no splits for that.

    Raises:
        ValueError: If an FAQ has too few; see `check_held_out`.
    """
    check_held_out(tenant, shots, n_validation, at_most=at_most)
    for faq in tenant.faqs:
        held = 0 if faq.validation else n_validation
        kept = min(shots, len(faq.train) - held)
        faq.train, rest = faq.train[:kept], faq.train[kept:]
        faq.validation = faq.validation or rest[:held]
        faq.test = faq.test or rest[held:]


def _from_json(path: Path, rng: random.Random) -> list[Tenant]:
    remedy = f"write it as {BUNDLED.name} is"
    content, domains = read_json(path, dict, remedy), path.parent / "domains.json"
    if "tenants" in content:
        return _from_bundled(path, content["tenants"], rng)
    if not ({"train", "test"} <= content.keys() and domains.is_file()):
        raise ValueError(f"{path} has neither 'tenants' nor 'train', 'test' and a domains.json beside it.")
    of_domains = read_json(domains, dict, "take the file of CLINC150")
    try:
        return _from_classes([content["train"], content.get("val") or [], content["test"]], of_domains, rng)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} or {domains.name} is not of the form of CLINC150 ({error}); {remedy}.") from error


def _from_bundled(path: Path, content: list, rng: random.Random) -> list[Tenant]:
    tenants, place = [], "'tenants'"
    try:
        for number, tenant in enumerate(_list(content), start=1):
            place, faqs = f"tenant {number}", []
            for index, faq in enumerate(_list(tenant["faqs"]), start=1):
                place = f"tenant {number}, FAQ {index}"
                queries = _list(faq["queries"])
                label = str(faq.get("id", "")).replace("_", " ")
                faqs.append(
                    Faq(faq["question"], faq.get("answer") or "", rng.sample(queries, len(queries)), label=label)
                )
            tenants.append(Tenant(tenant["name"], faqs))
    except KeyError as error:
        raise ValueError(f"{path}, {place}: {error} is missing; see {BUNDLED.name}.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}, {place}: it is of another form ({error}); see {BUNDLED.name}.") from error
    return tenants


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} in place of a list")
    return value


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
    try:
        loaded = datasets.load_dataset(data, "plus") if data == "clinc/clinc_oos" else datasets.load_dataset(data)
    except datasets.exceptions.DatasetsError as error:  # of files that cannot be read
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"--data {data} cannot be read ({reason}); give a JSON file or a Hub dataset id.") from error
    if not {"train", "test"} <= loaded.keys():
        raise ValueError(f"--data {data} has the splits {', '.join(loaded)}; it needs train and test.")
    features = loaded["train"].features
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") == "string"]
    if len(classes) != 1 or not texts:
        raise ValueError(f"--data {data} needs one class column and a text column; it has {', '.join(features)}.")
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
