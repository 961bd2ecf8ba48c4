"""Ways to onboard a tenant of an embedding model that train no weight of the encoder, and SetFit."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sentence_transformers import util
from sklearn.linear_model import LogisticRegression
from tenant_jobs import Method
from torch import nn
from transformers import get_linear_schedule_with_warmup, set_seed

if TYPE_CHECKING:
    from onboarding_embeddings import Onboarding

Encode = Callable[[Sequence[str]], torch.Tensor]  # texts to normalised embeddings, (n_texts, d)


class Onboarded(NamedTuple):
    """What a method hands over.

    Args:
        encode: The embeddings of queries.
        encode_questions: The embeddings of questions, if another encoder makes them.
        rank: The scores of query embeddings, (n_queries, n_faqs); by default the cosine with each FAQ's centroid.
        save: Saves what the tenant adds to the platform.
    """

    encode: Encode
    encode_questions: Encode | None = None
    rank: Callable[[torch.Tensor], torch.Tensor] | None = None
    save: Callable[[str], None] | None = None


class FrozenEncoder:
    """The encoder without adapters, which keeps the embeddings of the texts that it has met.

    Args:
        encode: Computes the normalised embeddings of texts without adapters.
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the normalised embeddings of texts, (n_texts, d)."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known |= zip(new, self.encode(new), strict=True)
        return torch.stack([self.known[text] for text in texts])

    def anew(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of texts as if they were met for the first time, for timing."""
        for text in texts:
            self.known.pop(text, None)
        return self(texts)


def _examples(run: "Onboarding") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the frozen embeddings of questions and labelled queries, (n_texts, d), and their labels."""
    questions = run.questions
    labels = torch.tensor([*range(len(questions)), *run.labelled["label"]])
    return run.frozen.anew([*questions, *run.labelled["query"]]), labels


def frozen_encoder(run: "Onboarding") -> Onboarded:
    """Rank by the cosine with the questions, with no label."""
    questions = run.frozen.anew(run.questions)
    return Onboarded(run.frozen, rank=lambda queries: queries @ questions.T)


def frozen_centroid(run: "Onboarding") -> Onboarded:
    """Rank by the cosine with the centroid of each FAQ's question and labelled queries."""
    _examples(run)
    return Onboarded(run.frozen)


def nearest_neighbour(run: "Onboarding") -> Onboarded:
    """Rank by the highest cosine with any of an FAQ's question and labelled queries."""
    texts, labels = _examples(run)

    def rank(queries: torch.Tensor) -> torch.Tensor:
        lowest = torch.full((len(queries), len(run.questions)), -1.0, device=queries.device)
        index = labels.to(queries.device).expand(len(queries), -1)  # (n_queries, n_texts)
        return lowest.scatter_reduce(1, index, queries @ texts.T, "amax")

    return Onboarded(run.frozen, rank=rank)


def logistic_regression(run: "Onboarding") -> Onboarded:
    """Classify embeddings by logistic regression on questions and labelled queries; the rate is scikit-learn's C."""
    texts, labels = _examples(run)
    classifier = LogisticRegression(C=run.learning_rate, max_iter=1000).fit(texts.cpu().numpy(), labels.numpy())
    return Onboarded(run.frozen, rank=_scores_of(classifier))


def _scores_of(classifier: LogisticRegression) -> Callable[[torch.Tensor], torch.Tensor]:
    def rank(queries: torch.Tensor) -> torch.Tensor:
        logs = classifier.predict_log_proba(queries.cpu().numpy())  # of two classes, the decision is one number
        return torch.from_numpy(np.asarray(logs)).to(queries)

    return rank


def linear_map(run: "Onboarding") -> Onboarded:
    """Train a linear map on the embeddings of queries, which starts at the identity, with the same loss and steps."""
    texts, labels = _examples(run)
    questions, queries = texts[: len(run.questions)], texts[len(run.questions) :]
    labels = labels[len(run.questions) :].to(texts.device)
    layer = nn.Linear(texts.shape[1], texts.shape[1], bias=False, device=texts.device)
    nn.init.eye_(layer.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=run.learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, run.steps)
    set_seed(run.seed)
    order: list[int] = []
    for _ in range(run.steps):
        order = order or torch.randperm(len(queries)).tolist()
        batch, order = order[: run.batch_size], order[run.batch_size :]
        loss = nn.functional.cross_entropy(20 * util.cos_sim(layer(queries[batch]), questions), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    def encode(texts: Sequence[str]) -> torch.Tensor:
        with torch.no_grad():
            return nn.functional.normalize(layer(run.frozen(texts)), dim=-1)

    def save(folder: str) -> None:
        torch.save(layer.state_dict(), f"{folder}/map.pt")

    return Onboarded(encode, run.frozen, save=save)


def setfit(run: "Onboarding") -> Onboarded:
    """Fine-tune a copy of the encoder on pairs of texts, and a classifier on it, with the package SetFit."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments
    from transformers import PrinterCallback

    body = run.fresh_platform().encoder
    classifier = LogisticRegression(max_iter=1000)
    model = SetFitModel(model_body=body, model_head=classifier)
    texts = [*run.questions, *run.labelled["query"]]
    dataset = Dataset.from_dict({"text": texts, "label": [*range(len(run.questions)), *run.labelled["label"]]})
    args = TrainingArguments(
        output_dir=f"{run.platform.output_dir}/setfit",
        batch_size=run.batch_size,
        max_steps=run.steps,
        body_learning_rate=run.learning_rate,
        seed=run.seed,
        show_progress_bar=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=dataset)
    trainer.st_trainer.remove_callback(PrinterCallback)
    trainer.train()

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return body.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)

    def rank(queries: torch.Tensor) -> torch.Tensor:
        return _scores_of(classifier)(queries)

    return Onboarded(encode, rank=rank, save=model.save_pretrained)


FROZEN_METHODS = {
    "frozen encoder": Method(frozen_encoder, (0.0,), needs_labels=False),
    "frozen centroid": Method(frozen_centroid, (0.0,)),
    "nearest neighbour": Method(nearest_neighbour, (0.0,)),
    "logistic regression": Method(logistic_regression, (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)),
    "linear map": Method(linear_map, (1e-4, 3e-4, 1e-3, 3e-3)),
    "SetFit": Method(setfit, (1e-5, 2e-5, 5e-5, 1e-4)),
}
