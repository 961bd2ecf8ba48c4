"""Retrieval: an embedding model with an adapter finds the text for a query, by the cosine of their embeddings.

Imported for `--task retrieval` alone, since it needs sentence-transformers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import adapters
import torch
from datasets import Dataset
from torch import nn

from ..integrations.sentence_transformers import (
    SentenceEvaluator,
    SentenceTransformer,
    SentenceTransformerDistillationTrainer,
)
from ..teachers.loading import load_saved_adapter
from .data import check_columns, load, split_of, with_columns
from .models import add_student_adapter, check_max_length, load_pretrained, locate_adapter
from .options import DataArguments, EvalArguments, PredictArguments
from .progress import SilentMixin
from .tasks import RANKED, Labelled, candidates_of, check_text_columns, targets, with_best

SCALE = 20.0  # of the cosines, as in MultipleNegativesRankingLoss
MOST_CANDIDATES = 64  # that a step embeds


class CandidateLoss(nn.Module):
    """Cross-entropy of the right text among all candidates, by their scaled cosines with a query.

    As `MultipleNegativesRankingLoss`, with candidates in place of the other texts of the batch. If there are more than
    `MOST_CANDIDATES`, those of a batch are its right texts and a random choice of others.
    """

    def __init__(self, model: SentenceTransformer, candidates: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.candidates = list(candidates)

    def forward(self, sentence_features: Sequence[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss of queries whose right candidates have the numbers `labels`, (batch,)."""
        chosen = self._choose(labels.cpu())
        batch = self.model.tokenizer(
            [self.candidates[number] for number in chosen.tolist()],
            padding=True,
            truncation=True,
            max_length=self.model.max_seq_length,
            return_tensors="pt",
        ).to(labels.device)
        queries = self.model(sentence_features[0])["sentence_embedding"]  # (batch, d)
        found = self.model(dict(batch))["sentence_embedding"]  # (n_chosen, d)
        cosines = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(found, dim=-1).T
        return nn.functional.cross_entropy(SCALE * cosines, torch.searchsorted(chosen.to(labels.device), labels))

    def _choose(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the candidates of a step, in their order."""
        everyone = torch.arange(len(self.candidates))
        if len(everyone) <= MOST_CANDIDATES:
            return everyone
        own = labels.unique()
        others = everyone[~torch.isin(everyone, own)]
        drawn = others[torch.randperm(len(others))[: max(0, MOST_CANDIDATES - len(own))]]
        return torch.cat([own, drawn]).sort().values


class RankingEvaluator(SentenceEvaluator):
    """Evaluator of the ranking of the candidates, for a trainer."""

    def __init__(self, queries: Dataset, candidates: Sequence[str], batch_size: int) -> None:
        super().__init__()
        self.queries, self.candidates, self.batch_size = queries, candidates, batch_size

    def __call__(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return accuracy at 1 and mean reciprocal rank."""
        scores = cosines(model, self.queries["query"], self.candidates, self.batch_size)
        return ranking_metrics(scores, self.queries["label"])


class RetrievalTrainer(SilentMixin, SentenceTransformerDistillationTrainer):  # type: ignore[misc]
    """Trainer of a student for retrieval."""


def cosines(model: SentenceTransformer, queries: Sequence[str], texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """Return the cosine of each query with each text, (n_queries, n_texts)."""

    def embed(each: Sequence[str]) -> torch.Tensor:
        settings: Any = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        return model.encode(list(each), batch_size=batch_size, **settings)  # (n, d)

    return (embed(queries) @ embed(texts).T).cpu()


def ranking_metrics(scores: torch.Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Return accuracy at 1 and mean reciprocal rank of scores, (n_queries, n_texts); ties count against the right one.

    Args:
        scores: The scores.
        labels: The number of the right text of each query.
    """
    right = scores.gather(1, torch.tensor(labels)[:, None])  # (n_queries, 1)
    ranks = (scores >= right).sum(dim=1).double()
    return {"accuracy_at_1": (ranks == 1).double().mean().item(), "mrr": (1 / ranks).mean().item()}


def load_encoder(name: str, max_length: int, named_by: str | None = None) -> SentenceTransformer:
    """Load an embedding model whose transformer takes adapters, and `max_length` tokens.

    Args:
        named_by: As for `load_pretrained`.

    Raises:
        ValueError: If the model has no transformer.
    """
    (model,) = load_pretrained(name, SentenceTransformer, named_by=named_by)
    if not hasattr(model[0], "auto_model"):
        raise ValueError(f"model={name!r} has no transformer, so it takes no adapters; give another embedding model.")
    check_max_length(name, max_length, model[0].auto_model.config, model.tokenizer)
    model.max_seq_length = max_length
    model.model_card_data.widget = [{"text": "A query"}]  # else each trainer draws examples for a card
    adapters.init(model[0].auto_model)
    return model


def make_retrieval_trainer(labelled: Labelled, training_args: Any) -> RetrievalTrainer:
    """Load an embedding model, add the student, and return its trainer."""
    args, candidates = labelled.args, list(map(str, labelled.labels))
    encoder = load_encoder(args.model, args.max_length)
    model: Any = encoder[0].auto_model
    add_student_adapter(model, args)
    model.train_adapter(args.student)
    data = {
        name: Dataset.from_dict({"query": part[args.text_column], "label": labelled.targets[name]})
        for name, part in labelled.data.items()
    }
    batch_size = training_args.per_device_eval_batch_size
    return RetrievalTrainer(
        encoder,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        loss=CandidateLoss(encoder, candidates),
        evaluator=RankingEvaluator(data["eval"], candidates, batch_size) if "eval" in data else None,
    )


def load_retriever(args: EvalArguments | PredictArguments) -> SentenceTransformer:
    """Load an embedding model with a saved adapter, without its teachers."""
    saved = locate_adapter(args)
    encoder = load_encoder(saved.base, args.max_length, saved.named_by)
    model: Any = encoder[0].auto_model
    load_saved_adapter(model, saved.folder, saved.name, f"Adapter {args.adapter!r}")
    model.set_active_adapters(saved.name)
    return encoder.eval()


def evaluate_ranking(args: EvalArguments, examples: Dataset) -> dict[str, Any]:
    """Return how a saved adapter ranks the texts of the label column, each once, for each query."""
    column = str(args.label_column)
    candidates = candidates_of([examples], column)
    labels = targets(examples, args, "retrieval", candidates, args.dataset)
    scores = cosines(load_retriever(args), examples[args.text_column], candidates, args.batch_size)
    return {"candidates": len(candidates), **ranking_metrics(scores, labels)}


def find_texts(args: PredictArguments, examples: Dataset) -> list[dict[str, Any]]:
    """Return each query with its best candidates."""
    check_text_columns(args, RANKED)
    candidates, column = read_candidates(args), str(args.text_column)
    scores = cosines(load_retriever(args), examples[column], candidates, args.batch_size).tolist()
    queries = zip(examples[column], scores, strict=True)
    return [with_best({column: query}, each, candidates, args.top_k or 1) for query, each in queries]


def read_candidates(args: PredictArguments) -> list[str]:
    """Return the texts of the candidates' column, each once; without an option, the only column or a usual one."""
    source, column = str(args.candidates), args.candidates_column
    data = split_of(load(source, replace(args, dataset_config=None)), None, source)
    if column is None and len(data.column_names) > 1:
        text = args.text_column if args.text_column in data.column_names else None
        found = with_columns(data, DataArguments(dataset=source, text_column=text), has_pairs=False)
        column = found.label_column
    column = column or data.column_names[0]
    if column not in data.column_names:
        columns = ", ".join(map(repr, data.column_names))
        raise ValueError(f"candidates_column={column!r} is not one of the columns {columns}.")
    check_columns(data, DataArguments(dataset=source, label_column=column))
    return candidates_of([data], column)
