"""What the command line reads: texts with labels, from files, folders or the Hub."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from ..downloads import hub_reason

READERS = {
    ".csv": Dataset.from_csv,
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}


@dataclass(kw_only=True)
class DataArguments:
    """Which columns of which data are read."""

    dataset: str = field(
        metadata={"help": "Hub id, a csv, json, jsonl or parquet file, or a folder made with save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, for pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the label: names or whole numbers."})
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} is out of range; it must be at least 1.")


class Labels(NamedTuple):
    """What a head tells apart.

    Args:
        number: How many classes.
        names: Their names; None where they are the numbers from 0 on.
    """

    number: int
    names: tuple[str, ...] | None


def load(dataset: str, config: str | None = None) -> DatasetDict:
    """Loads data with all its splits; a file is the split `train`.

    Args:
        dataset: A Hub id, a file, or a folder made with `save_to_disk`.
        config: The configuration, for the Hub.

    Returns:
        The splits.

    Raises:
        ValueError: If there is no such file or folder, or it cannot be read.
        OSError: If the Hub does not give it.
    """
    reader = READERS.get(Path(dataset).suffix.lower())
    is_local = reader is not None or os.path.exists(dataset)
    if is_local and config is not None:
        raise ValueError(f"dataset_config={config!r} is for datasets of the Hub, not for {dataset}; leave it out.")
    if reader is not None and not os.path.isfile(dataset):
        raise ValueError(
            f"The dataset {dataset} does not exist; give a file, a folder made with save_to_disk, or an id."
        )
    try:
        if reader is not None:
            return DatasetDict({"train": reader(dataset)})
        if os.path.exists(dataset):
            loaded = load_from_disk(dataset)
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        why = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(
            f"The dataset {dataset} cannot be read ({why}); give a {', '.join(READERS)} file, or a folder made with "
            "save_to_disk."
        ) from error
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        raise ValueError(f"The dataset {dataset!r} is no file, no folder and no Hub id.") from None
    try:
        return load_dataset(dataset, config)
    except OSError as error:
        raise OSError(
            f"The dataset {dataset!r} is no local file, and the Hub did not give it: {hub_reason(error)}."
        ) from error


def split_of(data: Mapping[str, Dataset], name: str | None, dataset: str) -> Dataset:
    """One of the splits.

    Args:
        data: The splits.
        name: The name of one; by default the only one, or `test`.
        dataset: What they are the splits of, for messages.

    Returns:
        The split.

    Raises:
        ValueError: If there is no such split, or it has no rows.
    """
    name = name or (next(iter(data)) if len(data) == 1 else "test")
    if name not in data:
        raise ValueError(f"{dataset} has no split {name!r}; choose one of {', '.join(map(repr, data))}.")
    if not len(data[name]):
        raise ValueError(f"The split {name!r} of {dataset} has no rows.")
    return data[name]


def check_columns(dataset: Dataset, args: DataArguments) -> None:
    """Refuses data without the columns that are read, or with gaps in them.

    Args:
        dataset: The data.
        args: Which columns.

    Raises:
        ValueError: With the option, and the columns that there are.
    """
    texts = {"text_column": args.text_column, "text_pair_column": args.text_pair_column}
    for option, column in (*texts.items(), ("label_column", args.label_column)):
        if column is None:
            continue
        if column not in dataset.features:
            close = difflib.get_close_matches(column, dataset.column_names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"{option}={column!r} is no column of the data; {hint}There are {known}.")
        for row, value in enumerate(dataset[column], start=1):
            if value is None or value == "":
                raise ValueError(f"Column {column!r} is empty in row {row}; fill it, or leave the row out.")
        kind = dataset.features[column]
        if option in texts and not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
            raise ValueError(f"{option}={column!r} holds no text but {_described(kind)}; choose a column of texts.")


def _described(kind: Any) -> str:
    return kind.dtype if isinstance(kind, Value | ClassLabel) else type(kind).__name__


def labels_of(dataset: Dataset, column: str) -> Labels:
    """The labels that a column distinguishes.

    Args:
        dataset: The training data.
        column: The column.

    Returns:
        Its classes; names are sorted, unless the dataset has an order of its own.

    Raises:
        ValueError: If the column holds something else than names or whole numbers, or one of them only.
    """
    kind = dataset.features[column]
    if isinstance(kind, ClassLabel):
        return Labels(kind.num_classes, tuple(kind.names))
    values = sorted(set(dataset[column])) if isinstance(kind, Value) else []
    if not all(isinstance(value, str | int) for value in values) or not values:
        raise ValueError(
            f"label_column={column!r} holds {_described(kind)}; classes have names or whole numbers. Train other "
            "tasks with DistillationTrainer."
        )
    if len(values) == 1:
        raise ValueError(
            f"label_column={column!r} holds one label only, {values[0]!r}; there is nothing to tell apart."
        )
    numbers = all(type(value) is int for value in values) and values == list(range(len(values)))
    return Labels(len(values), None if numbers else tuple(map(str, values)))


def label_ids(dataset: Dataset, column: str, labels: Labels, who: str) -> list[int]:
    """The numbers of the labels of some data.

    Args:
        dataset: The data.
        column: The column.
        labels: The labels of the head.
        who: Whose labels these are, for messages.

    Returns:
        A number for each row.

    Raises:
        ValueError: If a label is unknown.
    """
    kind, names = dataset.features[column], labels.names or tuple(map(str, range(labels.number)))
    ids = {name: number for number, name in enumerate(names)}
    found = []
    for row, value in enumerate(dataset[column], start=1):
        if isinstance(kind, ClassLabel) and value < 0:
            raise ValueError(f"Column {column!r} has no label in row {row}; choose a split that has labels.")
        name = kind.names[value] if isinstance(kind, ClassLabel) and labels.names else str(value)
        if name not in ids:
            known = ", ".join(map(repr, names[:20])) + (" ..." if len(names) > 20 else "")
            raise ValueError(f"Column {column!r} has {name!r} in row {row}, which is no label of {who}: {known}.")
        found.append(ids[name])
    return found


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, ids: list[int]) -> Dataset:
    """Turns texts into tokens.

    Args:
        dataset: The data.
        tokenizer: The tokenizer.
        args: Which columns.
        ids: The labels.

    Returns:
        What a model takes, with `labels`.
    """
    columns = [column for column in (args.text_column, args.text_pair_column) if column is not None]

    def tokens(batch: dict[str, list]) -> Mapping[str, Any]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=args.max_length)

    encoded = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    return encoded.add_column("labels", ids)
