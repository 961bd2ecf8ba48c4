"""Load texts from a file, a folder or the Hub, find their columns, and check them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from ..downloads import hub_reason, is_repo_id, one_line, suggestion
from .options import DataArguments, TextArguments

Labels = list[int] | list[str]  # the classes of a head: the numbers from 0 on, or names
Arguments = TypeVar("Arguments", bound=TextArguments)
WHOLE = r"0|-?[1-9][0-9]{0,17}"  # as Python writes it; 18 digits fit into 64 bits
DECIMAL = rf"-?(({WHOLE})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
NUMBERS = {int: re.compile(rf"\s*({WHOLE})\s*"), float: re.compile(rf"\s*({DECIMAL})\s*")}


class WrongRowsError(ValueError):
    """Error of a file that can be read, but not as the rows that were meant."""


SURPLUS = "quote the texts that hold the separator, name all columns, or pass another --sep."


def _read_table(path: str, **form: Any) -> Dataset:
    """Read a .csv or .tsv file, in which nothing but an empty cell is missing: `None` and `NA` are names."""
    form |= {"keep_default_na": False, "na_values": [""]}
    width = len(Dataset.from_csv(path, nrows=1, header=None, **form).column_names)
    texts = Dataset.from_csv(path, converters=dict.fromkeys(range(width), str), **form)
    if len(texts.column_names) > width:  # pandas makes an index of the first cells, and shifts the others
        raise WrongRowsError(f"{path} has rows with more cells than its header names; {SURPLUS}")
    table = texts[:]
    if form["sep"] == "\t":
        _check_quotes(path, table)
    return Dataset.from_dict({name: _as_numbers(cells) for name, cells in table.items()})


def _check_quotes(path: str, table: dict[str, list[str | None]]) -> None:
    """Check that no cell of a table, in which tabs separate, holds the rows from one lone quote to the next."""
    for cell in (cell for cells in table.values() for cell in cells if cell):
        if "\t" in cell and "\n" in cell:
            start = cell.split("\t")[0].split("\n")[0]
            raise WrongRowsError(f"{path} has a quote without an end before {start!r}; close it, or leave it out.")


def _as_numbers(cells: Sequence[str | None]) -> Sequence[Any]:
    """Return a column as numbers if that keeps how all of them are written, and else as it is: 01 is a name."""
    for kind, pattern in NUMBERS.items():
        if all(pattern.fullmatch(cell) for cell in cells if cell):
            return [kind(cell) if cell else None for cell in cells]
    return cells


def _read_json(path: str, encoding: str) -> Dataset:
    """Read a .json or .jsonl file.

    Raises:
        UnicodeDecodeError: If the encoding does not fit; `datasets` would notice it at the first use of a text.
        WrongRowsError: If the file has no rows, or columns instead.
    """
    text = Path(path).read_text(encoding).lstrip("\ufeff \t\r\n")
    if not text:
        raise WrongRowsError(f"{path} is empty; give a file with rows.")
    rows = Dataset.from_json(path, encoding=encoding)
    has_columns = text[0] == "{" and len(rows) == 1 and all(is_list(rows, name) for name in rows.column_names)
    if has_columns and path.lower().endswith(".json"):  # a line of a .jsonl may be a row of lists
        raise WrongRowsError(f"{path} holds a list for each column; give a list with an object for each row.")
    return rows


READERS: dict[str, Any] = {  # load_dataset("csv") would call the Hub's download counter for a local file
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": Dataset.from_parquet,
}


PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair"))
TEXTS = (
    "text",
    "sentence",
    "query",
    "question",
    "anchor",
    "utterance",
    "review",
    "document",
    "content",
    "tokens",
    "words",
)
LABELS = (
    "label",
    "labels",
    "category",
    "intent",
    "class",
    "target",
    "tags",
    "ner_tags",
    "pos_tags",
    "score",
    "faq",
    "positive",
)


def load(dataset: str, args: TextArguments) -> DatasetDict:
    """Load all splits of a file, a saved folder or a Hub id; a file is the split `train`."""
    suffix, config = Path(dataset).suffix.lower(), args.dataset_config
    reader = READERS.get(suffix)
    if args.sep is not None and suffix not in (".csv", ".tsv"):
        raise ValueError(f"sep={args.sep!r} is for .csv and .tsv files, not for {dataset}; leave it out.")
    if reader is None and not os.path.exists(dataset):
        return _load_from_hub(dataset, config)
    if config is not None:
        raise ValueError(f"dataset_config={config!r} is for Hub datasets, not for {dataset}; leave it out.")
    give = f"give a {', '.join(READERS)} file, a folder made with save_to_disk, or a Hub id."
    if reader is not None and not os.path.isfile(dataset):
        raise ValueError(f"The dataset {dataset} does not exist; {give}")
    try:
        loaded = reader(dataset, **_form(suffix, args)) if reader else load_from_disk(dataset)
    except WrongRowsError:
        raise
    except Exception as error:  # on a damaged file, the libraries that read it can raise anything
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeError):
            wrong = f"encoding={args.encoding!r} does not fit {dataset} ({one_line(cause).rstrip('.')})"
            raise ValueError(f"{wrong}; pass another --encoding, such as latin-1.") from error
        give = SURPLUS if isinstance(cause, ValueError) and "fields in line" in str(cause) else give
        raise ValueError(f"The dataset {dataset} cannot be read ({one_line(cause).rstrip('.')}); {give}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _form(suffix: str, args: TextArguments) -> dict[str, str]:
    """Return how a file is to be read."""
    if suffix == ".parquet":
        return {}
    form = {"encoding": args.encoding}
    if suffix in (".csv", ".tsv"):
        form["sep"] = (args.sep or ("\t" if suffix == ".tsv" else ",")).replace("\\t", "\t")
    return form


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


def with_columns(dataset: Dataset, args: Arguments, has_pairs: bool = True) -> Arguments:
    """Return the arguments with the columns of text and label, which are found by their names if they are not given.

    Args:
        has_pairs: Whether two columns may be the texts of a pair.

    Raises:
        ValueError: If a given column does not exist, or several columns could be meant.
    """
    columns = dataset.column_names
    found: dict[str, Any] = {}
    for name in ("text_column", "text_pair_column", "label_column"):
        column = vars(args).get(name)
        if column is not None and column not in columns:
            hint = suggestion(column, columns) or "choose one of them."
            raise ValueError(f"{name}={column!r} is not one of the columns {', '.join(map(repr, columns))}; {hint}")
    label = vars(args).get("label_column")
    if args.text_column is None and args.text_pair_column is None and has_pairs:
        for first, second in PAIRS:
            if {first, second} <= {*columns}:
                found = {"text_column": first, "text_pair_column": second}
    if args.text_column is None and not found:
        texts = [name for name in columns if name not in (label, args.text_pair_column) and holds_texts(dataset, name)]
        others = [name for name in texts if name not in LABELS]
        found["text_column"] = _only("text_column", columns, [name for name in TEXTS if name in texts], others)
    if isinstance(args, DataArguments) and label is None:
        taken = {args.text_column, args.text_pair_column, *found.values()}
        others = [name for name in columns if name not in taken]
        found["label_column"] = _only("label_column", columns, [name for name in LABELS if name in others], others)
    return replace(args, **found)


def _only(option: str, columns: Sequence[str], usual: Sequence[str], others: Sequence[str]) -> str:
    """Return the column with the first of the usual names, or the only other one; `text` and `label` need no doubt."""
    if usual and (len(usual) == 1 or usual[0] in ("text", "label")):
        return usual[0]
    if not usual and len(others) == 1:
        return others[0]
    for sep in ";\t|":
        if len(columns) == 1 and sep in columns[0]:
            raise ValueError(f"The only column is {columns[0]!r}; pass --sep {sep!r} if that separates columns.")
    names = ", ".join(map(repr, columns))
    raise ValueError(f"The columns {names} do not say which one is the {option}; pass --{option}.")


def holds_texts(dataset: Dataset, column: str) -> bool:
    """Return whether a column holds texts, or lists of words."""
    return _type_of(dataset, column) in ("string", "large_string") or is_list(dataset, column)


def is_list(dataset: Dataset, column: str) -> bool:
    """Return whether a column holds a list in each row."""
    return type(dataset.features[column]).__name__ in ("List", "LargeList", "Sequence")


def check_columns(dataset: Dataset, args: TextArguments, source: str | None = None) -> None:
    """Check that the columns have no gaps, and that text columns hold strings, or words for labels of tokens.

    Args:
        source: The origin of the dataset if its columns were found in another one.

    Raises:
        ValueError: If a column has a gap, or no text, or is missing.
    """
    for name in ("text_column", "text_pair_column", "label_column"):
        column = vars(args).get(name)
        if column is None:  # no second text, or no label
            continue
        if source is not None and column not in dataset.column_names:
            columns = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"{name}={column!r} is not one of the columns {columns} of {source}; rename one of them.")
        for row, value in enumerate(dataset[column], start=1):
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                raise ValueError(f"Column {column!r} is empty in row {row}; fill it, or leave the row out.")
        kind = _type_of(dataset, column)
        if name != "label_column" and not holds_texts(dataset, column):
            raise ValueError(f"{name}={column!r} holds {kind}, not text; choose a text column.")


def _type_of(dataset: Dataset, column: str) -> str:
    feature = dataset.features[column]
    return feature.dtype if isinstance(feature, Value | ClassLabel) else type(feature).__name__


def labels_of(dataset: Dataset, column: str) -> Labels:
    """Return the classes of a column: sorted, unless the dataset has its own order."""
    feature = dataset.features[column]
    # Not by `class_encode_column`: it sorts numbers as texts, 10 before 2, and takes any float for a class.
    values: Any = sorted(dataset.unique(column)) if isinstance(feature, Value) else []
    values = feature.names if isinstance(feature, ClassLabel) else values
    if not values or not isinstance(values[0], str | int):
        kind = f"{_type_of(dataset, column)}, not names or whole numbers"
        raise ValueError(f"label_column={column!r} holds {kind}; pass --task regression to predict numbers.")
    if len(values) == 1:
        raise ValueError(f"label_column={column!r} holds only one label, {values[0]!r}; a head needs at least two.")
    is_numbered = type(values[0]) is int and values == list(range(len(values)))
    return values if is_numbered else list(map(str, values))


def names_in(dataset: Dataset, column: str) -> set[str]:
    """Return the labels of a column as texts, and all names of a `ClassLabel`."""
    feature = dataset.features[column]
    return set(feature.names if isinstance(feature, ClassLabel) else map(str, dataset[column]))


def label_ids(
    dataset: Dataset, column: str, labels: Labels, source: str, rows: Iterable[int] | None = None
) -> list[int]:
    """Return the class of each label, matched by name.

    Args:
        source: The origin of the classes, in messages.
        rows: The row of each label in the file, if there can be several labels in a row.

    Raises:
        ValueError: If a row has no label, or an unknown one.
    """
    # Not by `ClassLabel.str2int`, which takes an unknown "0" for class 0, nor `align_labels_with_mapping`, which
    # ignores case.
    feature, ids = dataset.features[column], {str(label): number for number, label in enumerate(labels)}
    by_name = isinstance(feature, ClassLabel) and isinstance(labels[0], str)
    numbers = []
    for row, value in zip(rows or count(1), dataset[column], strict=False):
        if isinstance(feature, ClassLabel) and value < 0:
            raise ValueError(f"Column {column!r} has no label in row {row}; choose a split that has labels.")
        name = feature.int2str(value) if by_name else str(value)
        if isinstance(value, float):  # a table may have written 2.5 as 2.50
            same = [label for label in ids if NUMBERS[float].fullmatch(label) and float(label) == value]
            if len(same) > 1:
                names = " or ".join(map(repr, same))
                raise ValueError(
                    f"Column {column!r} has {name} in row {row}, which may be {names} of {source}; give the labels "
                    "names that are no numbers."
                )
            name = same[0] if same else name
        if name not in ids:
            names = ", ".join(map(repr, list(ids)[:20])) + (" ..." if len(ids) > 20 else "")
            raise ValueError(f"Column {column!r} has {name!r} in row {row}, not a label of {source}: {names}.")
        numbers.append(ids[name])
    return numbers
