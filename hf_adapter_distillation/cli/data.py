"""Load texts with labels from a file, a folder or the Hub, check them, and encode them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from ..configuration import option
from ..downloads import hub_reason, is_repo_id, one_line, suggestion

Labels = list[int] | list[str]  # the classes of a head: the numbers from 0 on, or names
READERS = {  # load_dataset("csv") would call the Hub's download counter for a local file
    ".csv": Dataset.from_csv,
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}


@dataclass(kw_only=True)
class DataArguments:
    """Dataset, columns and base model."""

    dataset: str = option("Hub id, a csv, json, jsonl or parquet file, or a folder made with save_to_disk.")
    model: str = option("Base model of the adapters: a folder or a Hub id.")
    dataset_config: str | None = option("Configuration of a Hub dataset.", None)
    text_column: str = option("Column of the text.", "text")
    text_pair_column: str | None = option("Column of the second text, for pairs of texts.", None)
    label_column: str = option("Column of the label: names or whole numbers.", "label")
    max_length: int = option("Maximum number of tokens per example.", 128)

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} is out of range; it must be at least 1.")


def load(dataset: str, config: str | None = None) -> DatasetDict:
    """Load all splits of a file, a saved folder or a Hub id; a file is the split `train`."""
    reader = READERS.get(Path(dataset).suffix.lower())
    if reader is None and not os.path.exists(dataset):
        return _load_from_hub(dataset, config)
    if config is not None:
        raise ValueError(f"dataset_config={config!r} is for Hub datasets, not for {dataset}; leave it out.")
    give = f"give a {', '.join(READERS)} file, a folder made with save_to_disk, or a Hub id."
    if reader is not None and not os.path.isfile(dataset):
        raise ValueError(f"The dataset {dataset} does not exist; {give}")
    try:
        loaded = reader(dataset) if reader else load_from_disk(dataset)
    except Exception as error:  # on a damaged file, the libraries that read it can raise anything
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise ValueError(f"The dataset {dataset} cannot be read ({reason}); {give}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _load_from_hub(dataset: str, config: str | None) -> DatasetDict:
    if not is_repo_id(dataset):
        raise ValueError(f"The dataset {dataset!r} is not a file, a folder or a Hub id.")
    try:
        return load_dataset(dataset, config)
    except OSError as error:
        reason = f"the Hub did not provide it: {hub_reason(error)}"
        raise OSError(f"The dataset {dataset!r} is not a local file, and {reason}.") from error


def split_of(data: Mapping[str, Dataset], name: str | None, dataset: str) -> Dataset:
    """Return the named split of a dataset, by default the only split or `test`."""
    name = name or (next(iter(data)) if len(data) == 1 else "test")
    if name not in data:
        raise ValueError(f"{dataset} has no split {name!r}; choose one of {', '.join(map(repr, data))}.")
    if not len(data[name]):
        raise ValueError(f"The split {name!r} of {dataset} has no rows.")
    return data[name]


def check_columns(dataset: Dataset, args: DataArguments) -> None:
    """Check that the columns exist and have no gaps, and that text columns hold strings."""
    for name in ("text_column", "text_pair_column", "label_column"):
        column, columns = vars(args)[name], dataset.column_names
        if column is None:  # no second text
            continue
        if column not in columns:
            hint = suggestion(column, columns) or "choose one of them."
            raise ValueError(f"{name}={column!r} is not one of the columns {', '.join(map(repr, columns))}; {hint}")
        for row, value in enumerate(dataset[column], start=1):
            if value is None or value == "":
                raise ValueError(f"Column {column!r} is empty in row {row}; fill it, or leave the row out.")
        kind = _type_of(dataset, column)
        if name != "label_column" and kind not in ("string", "large_string"):
            raise ValueError(f"{name}={column!r} holds {kind}, not text; choose a text column.")


def _type_of(dataset: Dataset, column: str) -> str:
    feature = dataset.features[column]
    return feature.dtype if isinstance(feature, Value | ClassLabel) else type(feature).__name__


def labels_of(dataset: Dataset, column: str) -> Labels:
    """Return the classes of a column: sorted, unless the dataset has its own order."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    # Not by `class_encode_column`: it sorts numbers as texts, 10 before 2, and takes any float for a class.
    values = sorted(dataset.unique(column)) if isinstance(feature, Value) else []
    if not values or not isinstance(values[0], str | int):
        kind = f"{_type_of(dataset, column)}, not names or whole numbers"
        raise ValueError(f"label_column={column!r} holds {kind}; train other tasks with DistillationTrainer.")
    if len(values) == 1:
        raise ValueError(f"label_column={column!r} holds only one label, {values[0]!r}; a head needs at least two.")
    is_numbered = type(values[0]) is int and values == list(range(len(values)))
    return values if is_numbered else list(map(str, values))


def names_in(dataset: Dataset, column: str) -> set[str]:
    """Return the labels of a column as texts, and all names of a `ClassLabel`."""
    feature = dataset.features[column]
    return set(feature.names if isinstance(feature, ClassLabel) else map(str, dataset[column]))


def label_ids(dataset: Dataset, column: str, labels: Labels, source: str) -> list[int]:
    """Return the class of each row, matched by name; `source` stands for the origin of the classes in messages."""
    # Not by `ClassLabel.str2int`, which takes an unknown "0" for class 0, nor `align_labels_with_mapping`, which
    # ignores case.
    feature, ids = dataset.features[column], {str(label): number for number, label in enumerate(labels)}
    by_name = isinstance(feature, ClassLabel) and isinstance(labels[0], str)
    numbers = []
    for row, value in enumerate(dataset[column], start=1):
        if isinstance(feature, ClassLabel) and value < 0:
            raise ValueError(f"Column {column!r} has no label in row {row}; choose a split that has labels.")
        name = feature.int2str(value) if by_name else str(value)
        if name not in ids:
            names = ", ".join(map(repr, list(ids)[:20])) + (" ..." if len(ids) > 20 else "")
            raise ValueError(f"Column {column!r} has {name!r} in row {row}, not a label of {source}: {names}.")
        numbers.append(ids[name])
    return numbers


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, ids: list[int]) -> Dataset:
    """Return the tokens of the texts, with `ids` as `labels`."""
    columns = [column for column in (args.text_column, args.text_pair_column) if column is not None]

    def tokens(batch: dict[str, list]) -> Mapping[str, Any]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=args.max_length)

    return dataset.map(tokens, batched=True, remove_columns=dataset.column_names).add_column("labels", ids)
