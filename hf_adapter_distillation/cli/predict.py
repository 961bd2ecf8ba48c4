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

from .data import check_columns, load, split_of, with_columns
from .evaluate import labels_of_head, load_adapter, run_model
from .options import PredictArguments
from .progress import without_noise
from .tasks import IGNORED, encode, words_of


@without_noise()
def predict(args: PredictArguments) -> str:
    """Predict texts, and return one JSON object or one row of CSV for each."""
    examples = read_texts(args)
    args = with_columns(examples, args)
    check_columns(examples, args)
    loaded = load_adapter(args)
    if loaded.task == "tokens" and args.format == "csv":
        raise ValueError(f"format='csv' has no form for the tags of {args.adapter}; leave it out for JSON lines.")
    output = run_model(loaded, encode(examples, loaded.tokenizer, args, loaded.task), args.batch_size)
    logits: Any = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    labels, shares = list(map(str, labels_of_head(loaded, set()))), torch.tensor(logits).softmax(dim=-1).numpy()
    columns = [column for column in (args.text_column, args.text_pair_column) if column is not None]
    texts = [{column: row[column] for column in columns} for row in examples.select_columns(columns)]
    if loaded.task == "regression":
        rows = [text | {"score": round(float(value), 4)} for text, (value,) in zip(texts, logits, strict=True)]
    elif loaded.task == "tokens":
        rows = _tags(words_of(examples, args), shares, output.label_ids, labels)
    else:
        rows = [_classes(text, each, labels) for text, each in zip(texts, shares, strict=True)]
    written = _as_csv(rows) if args.format == "csv" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if args.output is None:
        return written
    Path(args.output).write_text(written + "\n", encoding="utf-8")
    return f"{len(rows)} predictions are written to {args.output}"


def read_texts(args: PredictArguments) -> Dataset:
    """Return the texts of the options, of a data set, or of the lines of the standard input, as rows."""
    if args.dataset is not None:
        return split_of(load(args.dataset, args), args.split, args.dataset)
    if args.text is None and sys.stdin.isatty():
        raise ValueError("There are no texts; pass --text or --dataset, or write lines to the standard input.")
    texts = args.text if args.text is not None else [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("The standard input has no lines; write one text a line, or pass --text or --dataset.")
    return Dataset.from_dict({args.text_column or "text": texts})


def _classes(text: dict[str, str], shares: np.ndarray, labels: list[str]) -> dict[str, Any]:
    scores = {label: round(float(share), 4) for label, share in zip(labels, shares, strict=True)}
    label = labels[int(shares.argmax())]
    return {**text, "label": label, "score": scores[label], "scores": scores}


def _tags(words: list[list[str]], shares: np.ndarray, counted: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Return the tag of each word; words behind max_length have none."""
    rows = []
    for own, of_row, is_first in zip(words, shares, np.asarray(counted) != IGNORED, strict=True):
        best = of_row[is_first]  # (n_words, n_labels)
        tags = [labels[number] for number in best.argmax(-1)]
        rows.append({"words": own[: len(tags)], "labels": tags, "scores": [round(float(s), 4) for s in best.max(-1)]})
    return rows


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows as CSV, with the scores of the labels in columns of their own."""
    scores = [{f"score_{label}": score for label, score in row.get("scores", {}).items()} for row in rows]
    flat = [{k: v for k, v in row.items() if k != "scores"} | own for row, own in zip(rows, scores, strict=True)]
    file = io.StringIO()
    writer = csv.DictWriter(file, flat[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue().rstrip("\n")
