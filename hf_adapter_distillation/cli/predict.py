"""The command `predict`: run a saved adapter on texts without labels."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..downloads import one_line
from .data import check_columns, load, split_of, with_columns
from .evaluate import labels_of_head, load_adapter, run_model
from .options import PredictArguments
from .progress import without_noise
from .tasks import IGNORED, RANKED, check_text_columns, encode, with_best, words_with_tokens


@without_noise()
def predict(args: PredictArguments) -> str:
    """Predict texts, and return one JSON object or one row of CSV for each."""
    examples = read_texts(args)
    args = with_columns(examples, args, has_pairs=args.task != "retrieval")
    check_columns(examples, args)
    if args.task == "retrieval":
        from .retrieval import find_texts

        rows = find_texts(args, examples)
    else:
        rows = predict_by_head(args, examples)
    if args.format == "csv":
        is_long = args.task == "retrieval" or args.top_k is not None
        written = as_csv(_one_row_each(rows) if is_long else _one_column_each(rows))
    else:
        written = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if args.output is None:
        return written
    Path(args.output).write_text(written + "\n", encoding="utf-8")
    return f"{len(rows)} predictions are written to {args.output}"


def predict_by_head(args: PredictArguments, examples: Dataset) -> list[dict[str, Any]]:
    """Return the predictions of an adapter with a head."""
    loaded = load_adapter(args)
    if loaded.task == "tokens" and args.format == "csv":
        raise ValueError(f"format='csv' has no form for the tags of {args.adapter}; leave it out for JSON lines.")
    if loaded.task != "classification" and args.top_k is not None:
        raise ValueError(f"top_k={args.top_k} is for classes of texts, not for {loaded.task}; leave it out.")
    labels = list(map(str, labels_of_head(loaded, set())))
    ranked = [*RANKED, *(f"score_{label}" for label in labels if args.format == "csv" and args.top_k is None)]
    check_text_columns(args, {"classification": ranked, "regression": ["score"]}.get(loaded.task, []))
    output = run_model(loaded, encode(examples, loaded.tokenizer, args, loaded.task), args.batch_size)
    logits: Any = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    shares = torch.tensor(logits).softmax(dim=-1).numpy()
    columns = [column for column in (args.text_column, args.text_pair_column) if column is not None]
    texts = [{column: row[column] for column in columns} for row in examples.select_columns(columns)]
    if loaded.task == "regression":
        return [text | {"score": round(float(value), 4)} for text, (value,) in zip(texts, logits, strict=True)]
    if loaded.task == "tokens":
        return _tags(words_with_tokens(examples, loaded.tokenizer, args), shares, output.label_ids, labels)
    return [with_best(text, each, labels, args.top_k) for text, each in zip(texts, shares, strict=True)]


def read_texts(args: PredictArguments) -> Dataset:
    """Return the texts of the options, of a data set, or of the lines of the standard input, as rows."""
    if args.dataset is not None:
        return split_of(load(args.dataset, args), args.split, args.dataset)
    if args.text is None and sys.stdin.isatty():
        raise ValueError("There are no texts; pass --text or --dataset, or write lines to the standard input.")
    source, texts = "The standard input" if args.text is None else "--text", args.text
    try:
        if texts is None:
            lines = sys.stdin.read().removeprefix("\ufeff").split("\n")
            texts = [line.strip() for line in lines if line.strip()]
        "".join(texts).encode()  # a byte that is not UTF-8 may stand as a surrogate
    except UnicodeError as error:
        wrong = f"{source} is not UTF-8 ({one_line(error)})"
        raise ValueError(f"{wrong}; pass a .csv file by --dataset, with its --encoding.") from error
    if blank := [text for text in texts if not text.strip()]:
        raise ValueError(f"text={blank[0]!r} is blank; leave it out.")
    if not texts:
        raise ValueError("The standard input has no lines; write one text a line, or pass --text or --dataset.")
    return Dataset.from_dict({args.text_column or "text": texts})


def _tags(words: list[list[str]], shares: np.ndarray, counted: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Return the tags of the words that have tokens; words behind max_length have none."""
    rows = []
    for own, of_row, is_first in zip(words, shares, np.asarray(counted) != IGNORED, strict=True):
        best = of_row[is_first]  # (n_words, n_labels)
        tags = [labels[number] for number in best.argmax(-1)]
        rows.append({"words": own, "labels": tags, "scores": [round(float(s), 4) for s in best.max(-1)]})
    return rows


def _one_column_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the score of each label in a column of its own."""
    scores = [{f"score_{label}": score for label, score in row.get("scores", {}).items()} for row in rows]
    return [{k: v for k, v in row.items() if k != "scores"} | own for row, own in zip(rows, scores, strict=True)]


def _one_row_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each label of each text, the best one first."""
    return [
        {key: value for key, value in row.items() if key != "scores"} | {"label": label, "score": score}
        for row in rows
        for label, score in row["scores"].items()
    ]


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows with the same columns as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")
