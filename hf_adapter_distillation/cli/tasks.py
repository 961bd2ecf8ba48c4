"""The needs of a task: labels, head, inputs, batches and metrics, for classes, numbers and classes of tokens.

A retrieval has no head; its model, loss and metrics are in `retrieval`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np
from adapters import ModelAdaptersMixin
from datasets import ClassLabel, Dataset
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from transformers import (
    BatchEncoding,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..method.heads import head_config, kind_of_labels
from .data import Labels, holds_texts, is_list, label_ids, labels_of, names_in
from .options import DataArguments, TextArguments, TrainArguments

KnownTask = Literal["classification", "regression", "tokens", "retrieval"]
RANKED = ("label", "score", "scores")  # the results of a text, as `with_best` names them
IGNORED = -100  # the label of a token that no loss and no metric counts


class Labelled(NamedTuple):
    """Examples of a task, `train` and if there are any `eval`, with their labels."""

    args: TrainArguments
    task: KnownTask
    data: dict[str, Dataset]
    labels: Labels
    targets: dict[str, list[Any]]


def task_of_data(dataset: Dataset, args: TrainArguments) -> KnownTask:
    """Return the task, by the option or by the column of the label."""
    has_tags = is_list(dataset, str(args.label_column))
    if args.task == "auto":
        return "tokens" if has_tags else "classification"
    if has_tags != (args.task == "tokens"):
        kind = "lists" if has_tags else "one label a row"
        raise ValueError(f"task={args.task!r} does not fit label_column={args.label_column!r}, which holds {kind}.")
    return args.task


def task_of_head(model: ModelAdaptersMixin, name: str, source: str) -> KnownTask:
    """Return the task of an adapter's head."""
    if name not in model.heads:
        raise ValueError(
            f"{source} has no head, so it predicts nothing; save the adapter with its head, or pass --task "
            "retrieval for an adapter of an embedding model."
        )
    head_type, kind = head_config(model, name)["head_type"], kind_of_labels(model, name)
    tasks: dict[tuple[str, str], KnownTask] = {
        ("classification", "classes"): "classification",
        ("classification", "values"): "regression",
        ("tagging", "tokens"): "tokens",
    }
    if (head_type, kind) not in tasks:
        raise ValueError(f"{source} has a head for {head_type}, not for classes, numbers or tags of texts.")
    return tasks[head_type, kind]


def tags_of(dataset: Dataset, column: str) -> Dataset:
    """Return the tags of all rows, one a row, with their type."""
    if not is_list(dataset, column):
        raise ValueError(f"label_column={column!r} holds one label a row; give a list of tags, one for each word.")
    feature = dataset.features[column].feature
    tags = [tag for row in dataset[column] for tag in row]
    return Dataset.from_dict({column: tags}).cast_column(column, feature)


def labels_of_task(data: Mapping[str, Dataset], column: str, task: KnownTask) -> Labels:
    """Return the classes of the training data, none for a regression, or all texts that a retrieval can find."""
    dataset = data["train"]
    if task == "regression":
        return []
    if task == "retrieval":
        return candidates_of(list(data.values()), column)
    return labels_of(tags_of(dataset, column) if task == "tokens" else dataset, column)


def candidates_of(parts: Sequence[Dataset], column: str) -> list[str]:
    """Return the texts of a column that a retrieval can find, each once and in their order."""
    for part in parts:
        is_text = isinstance(part.features[column], ClassLabel) or holds_texts(part, column)
        if not is_text or is_list(part, column):
            raise ValueError(f"Column {column!r} holds no texts that a retrieval could find; choose a text column.")
    found = sorted(set().union(*(names_in(part, column) for part in parts)))
    if len(found) < 2:
        raise ValueError(f"Column {column!r} holds only one text, {found[0]!r}; a ranking needs at least two.")
    return found


def targets(dataset: Dataset, args: DataArguments, task: KnownTask, labels: Labels, source: str) -> list[Any]:
    """Return the class, the number, the classes of the words, or the number of the right text, for each row."""
    column = str(args.label_column)
    if task in ("classification", "retrieval"):
        return label_ids(dataset, column, labels, source)
    if task == "regression":
        fix = f"{source} predicts numbers, so give it a column of them."
        if isinstance(args, TrainArguments):
            fix = "leave out --task regression."
        if isinstance(dataset.features[column], ClassLabel):
            raise ValueError(f"label_column={column!r} holds classes, not numbers; {fix}")
        try:
            numbers = [float(value) for value in dataset[column]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"Column {column!r} holds no number: {error}; {fix}") from error
        for row, number in enumerate(numbers, start=1):
            if not isfinite(number):
                raise ValueError(f"Column {column!r} has {number} in row {row}; give a number, or leave the row out.")
        return numbers
    all_tags = tags_of(dataset, column)
    rows: list[int] = []  # of each tag
    for row, (words, tags) in enumerate(zip(words_of(dataset, args), dataset[column], strict=True), start=1):
        if len(words) != len(tags):
            raise ValueError(f"Row {row} has {len(words)} words and {len(tags)} tags; give each word one tag.")
        rows += [row] * len(tags)
    ids = iter(label_ids(all_tags, column, labels, source, rows))
    return [[next(ids) for _ in row] for row in dataset[column]]


def add_head(model: ModelAdaptersMixin, student: str, task: KnownTask, labels: Labels) -> None:
    """Add the head of a task."""
    id2label = dict(enumerate(labels)) if labels and isinstance(labels[0], str) else None
    if task == "tokens":
        model.add_tagging_head(student, num_labels=len(labels), id2label=id2label)
    else:
        model.add_classification_head(student, num_labels=len(labels) or 1, id2label=id2label)


def encode(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: TextArguments,
    task: KnownTask,
    wanted: list[Any] | None = None,
) -> Dataset:
    """Return the tokens of the texts, with the targets as `labels` if there are any.

    With labels of words, the first token of a word has its label, and the others are ignored.
    """
    columns = [column for column in (args.text_column, args.text_pair_column) if column is not None]
    if task == "tokens":
        return _encode_words(dataset, tokenizer, args, wanted)

    def tokens(batch: dict[str, list]) -> Mapping[str, Any]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=args.max_length)

    encoded = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    return encoded if wanted is None else encoded.add_column("labels", wanted)


def words_of(dataset: Dataset, args: TextArguments) -> list[list[str]]:
    """Return the words of each row: a list as it is, and a text at its white space."""
    return [row.split() if isinstance(row, str) else list(row) for row in dataset[str(args.text_column)]]


def words_with_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: TextArguments) -> list[list[str]]:
    """Return the words of each row without those behind `max_length`, or of invisible characters alone."""
    words = words_of(dataset, args)
    encoded = _split_words(words, tokenizer, args)
    numbers = [sorted({number for number in encoded.word_ids(row) if number is not None}) for row in range(len(words))]
    return [[own[number] for number in of_row] for own, of_row in zip(words, numbers, strict=True)]


def _split_words(words: list[list[str]], tokenizer: PreTrainedTokenizerBase, args: TextArguments) -> BatchEncoding:
    return tokenizer(words, is_split_into_words=True, truncation=True, max_length=args.max_length)


def _encode_words(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: TextArguments, wanted: list[list[int]] | None
) -> Dataset:
    if args.text_pair_column is not None:
        raise ValueError(f"text_pair_column={args.text_pair_column!r} is not for labels of tokens; leave it out.")
    if not tokenizer.is_fast:
        raise ValueError(f"Labels of tokens need a fast tokenizer, not {type(tokenizer).__name__}.")
    words = words_of(dataset, args)
    encoded = _split_words(words, tokenizer, args)
    rows: dict[str, list] = dict(encoded)
    rows["labels"] = []
    for row in range(len(words)):
        numbers = encoded.word_ids(row)
        firsts = [number != before for number, before in zip(numbers, [None, *numbers], strict=False)]
        tags = wanted[row] if wanted else [0] * len(words[row])
        rows["labels"].append(
            [
                tags[number] if number is not None and first else IGNORED
                for number, first in zip(numbers, firsts, strict=True)
            ]
        )
    return Dataset.from_dict(rows)


def collator(task: KnownTask, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """Return the function that makes a batch of a task."""
    return DataCollatorForTokenClassification(tokenizer) if task == "tokens" else DataCollatorWithPadding(tokenizer)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and the mean F1 of the classes, or the errors of a regression and its correlation."""
    logits: Any = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models return more outputs
    if logits.shape[-1] == 1:
        values, wanted = logits[:, 0].astype(float), np.asarray(prediction.label_ids, dtype=float).reshape(-1)
        errors = values - wanted
        metrics = {"mean_squared_error": float((errors**2).mean()), "mean_absolute_error": float(abs(errors).mean())}
        is_defined = values.std() > 0 and wanted.std() > 0
        return metrics | ({"pearson_correlation": float(np.corrcoef(values, wanted)[0, 1])} if is_defined else {})
    classes, wanted = counted(logits, prediction.label_ids)
    f1 = f1_score(wanted, classes, labels=np.unique(wanted), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(wanted, classes)), "macro_f1": float(f1)}


def counted(logits: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the right class of each text or word that counts."""
    is_counted = np.asarray(wanted) != IGNORED
    return logits.argmax(-1)[is_counted], np.asarray(wanted)[is_counted]


def class_rows(logits: Any, wanted: Any, names: list[str]) -> list[tuple[str, float, float, float, int]]:
    """Return precision, recall, F1 and number of examples of each class, rounded."""
    predicted, right = counted(logits, wanted)
    columns = precision_recall_fscore_support(right, predicted, labels=range(len(names)), zero_division=0)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return [(name, round(p, 4), round(r, 4), round(f1, 4), int(n)) for name, p, r, f1, n in rows]


def check_text_columns(args: TextArguments, results: Collection[str]) -> None:
    """Check that no result has the name of a text column, whose texts it would replace."""
    for option in ("text_column", "text_pair_column"):
        if (column := vars(args)[option]) in results:
            raise ValueError(f"{option}={column!r} is also the name of a result; rename the column.")


def with_best(
    text: Mapping[str, str], scores: Sequence[float], labels: Sequence[str], top_k: int | None
) -> dict[str, Any]:
    """Return a text with its best label and its score, and the `top_k` best scores by label, or all in their order."""
    order = sorted(range(len(labels)), key=lambda number: -scores[number])
    shown = range(len(labels)) if top_k is None else order[:top_k]
    rounded = {labels[number]: round(float(scores[number]), 4) for number in shown}
    return {**text, "label": labels[order[0]], "score": round(float(scores[order[0]]), 4), "scores": rounded}
