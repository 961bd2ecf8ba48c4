"""The two tasks of the example: find the FAQ of a message by embeddings, or answer with its label by generation."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset
from faq_data import Tenant
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)

import hf_adapter_distillation as had

SCALE = 20.0  # of the cosines
BATCH = 16  # messages that are evaluated at once
MAX_LENGTH = 48  # tokens of a message
Batch = dict[str, torch.Tensor]


class Score(NamedTuple):
    """A share of right answers, and the queries or generated tokens a second."""

    quality: float
    per_second: float


class Message(NamedTuple):
    """A message of a user and the number of its FAQ."""

    text: str
    faq: int


def messages_of(tenant: Tenant, split: str, n: int) -> list[Message]:
    """Return up to `n` messages of each FAQ of a split."""
    return [Message(text, number) for number, faq in enumerate(tenant.faqs) for text in getattr(faq, split)[:n]]


def by_length(tokens: Sequence[list[int]]) -> list[list[int]]:
    """Return the numbers of texts in batches of similar length, the shortest first."""
    order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def padded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[list[int]], side: str) -> Batch:
    """Return one batch, padded to the longest text on a side, "left" or "right"."""
    batch = tokenizer.pad({"input_ids": list(tokens)}, padding_side=side, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of messages and titles."""
    return tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]


def embed(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return normalised embeddings, (n_texts, hidden): the mean of the last hidden states."""
    states = model(**batch, use_cache=False).last_hidden_state  # (B, T, hidden)
    mask = batch["attention_mask"].unsqueeze(-1).to(states)
    return nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


@torch.no_grad()
def embed_texts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """Return the embeddings of many texts in batches of similar length, (n_texts, hidden)."""
    tokens = tokens_of(tokenizer, texts)
    parts = by_length(tokens)
    batches = [padded(tokenizer, [tokens[number] for number in part], "right") for part in parts]
    embedded = torch.cat([embed(model, batch) for batch in batches])
    return embedded[torch.tensor([number for part in parts for number in part]).argsort()]


class Routing:
    """The FAQ of a message is the one with the next embedding, among the FAQs of a tenant.

    The embedding is the mean of the last hidden states. The loss is the cross-entropy of the FAQs by 20 times the
    cosine of the message with the title. The head over the vocabulary is never run.

    Args:
        tokenizer: The tokenizer of the language model.
        tenant: The tenant; its training messages are also used to find FAQs, beside the titles.
        shots: The training messages of each FAQ.
    """

    quality: ClassVar[str] = "accuracy_at_1"
    speed: ClassVar[str] = "queries_per_s"
    model_class: ClassVar[Any] = AutoModel

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tenant: Tenant, shots: int) -> None:
        self.tokenizer = tokenizer
        self.labelled = messages_of(tenant, "train", shots)
        self.titles = [faq.question for faq in tenant.faqs]
        self.title_batch = padded(tokenizer, tokens_of(tokenizer, self.titles), "right")

    def dataset(self) -> Dataset:
        """Return the training messages."""
        tokens = tokens_of(self.tokenizer, [message.text for message in self.labelled])
        return Dataset.from_dict({"input_ids": tokens, "labels": [message.faq for message in self.labelled]})

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Return a batch of messages."""
        batch = padded(self.tokenizer, [row["input_ids"] for row in rows], "right")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Compute the loss of a batch that `collate` made; the titles, mostly shorter, are a batch of their own."""
        messages = embed(model, {name: value for name, value in inputs.items() if name != "labels"})
        titles = embed(model, {name: value.to(messages.device) for name, value in self.title_batch.items()})
        return nn.functional.cross_entropy(SCALE * messages @ titles.T, inputs["labels"])

    def score(self, model: nn.Module, messages: Sequence[Message]) -> Score:
        """Rank the FAQs by the centroids of their titles and training messages."""
        faqs = embed_texts(model, self.tokenizer, self.titles)
        labels = torch.tensor([message.faq for message in self.labelled])
        labelled = embed_texts(model, self.tokenizer, [message.text for message in self.labelled])
        faqs = faqs.index_add(0, labels, labelled)
        began = time.perf_counter()
        queries = embed_texts(model, self.tokenizer, [message.text for message in messages])
        seconds = time.perf_counter() - began
        found = (queries @ nn.functional.normalize(faqs, dim=-1).T).argmax(dim=1)
        right = found == torch.tensor([message.faq for message in messages])
        return Score(right.float().mean().item(), len(messages) / seconds)

    def outputs(self, model: nn.Module) -> torch.Tensor:
        """Return outputs by which two models are compared: the embeddings of the titles."""
        return embed_texts(model, self.tokenizer, self.titles)


class Answers:
    """The assistant reads the labels of a tenant's FAQs and a message, and answers with the label of the right FAQ.

    The answer is generated greedily, without a search among the labels; it is right if it is the label, exactly. The
    loss is the model's own, on the answer alone.

    Args:
        tokenizer: The tokenizer of the language model, with a chat template.
        tenant: The tenant.
        shots: The training messages of each FAQ.

    Raises:
        ValueError: If there is no chat template, or it does not end an answer.
    """

    quality: ClassVar[str] = "exact_match"
    speed: ClassVar[str] = "tokens_per_s"
    model_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tenant: Tenant, shots: int) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, which the answers need; choose --task routing.")
        self.tokenizer, self.tenant = tokenizer, tenant
        self.collate = DataCollatorForSeq2Seq(tokenizer)  # labels are -100 on padding
        self.labelled = messages_of(tenant, "train", shots)
        self.labels = [faq.label or faq.question for faq in tenant.faqs]
        self.answers = [self._answer(label) for label in self.labels]

    def _chat(self, text: str) -> list[dict[str, str]]:
        system = f"Answer with the topic of the user's message. Topics: {', '.join(self.labels)}."
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    def _prompt(self, text: str) -> list[int]:
        return self.tokenizer.apply_chat_template(self._chat(text), add_generation_prompt=True, return_dict=False)

    def _answer(self, label: str) -> list[int]:
        """Return the tokens of an answer with the token that ends it."""
        chat, prompt = self._chat("message"), self._prompt("message")
        tokens = self.tokenizer.apply_chat_template(
            [*chat, {"role": "assistant", "content": label}], return_dict=False
        )
        special = {n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = [n for n, token in enumerate(tokens) if n > len(prompt) and token in special]
        if tokens[: len(prompt)] != prompt or not ends:
            raise ValueError("The chat template does not continue its prompt or end an answer; choose --task routing.")
        return tokens[len(prompt) : ends[0] + 1]

    def dataset(self) -> Dataset:
        """Return the training messages with their answers; the labels of the prompt are -100."""
        prompts = [self._prompt(message.text) for message in self.labelled]
        answers = [self.answers[message.faq] for message in self.labelled]
        pairs = list(zip(prompts, answers, strict=True))
        tokens = [prompt + answer for prompt, answer in pairs]
        labels = [[-100] * len(prompt) + answer for prompt, answer in pairs]
        mask = [[1] * len(row) for row in tokens]
        return Dataset.from_dict({"input_ids": tokens, "attention_mask": mask, "labels": labels})

    def loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Compute the model's own loss, the mean over the tokens of the answers."""
        return model(**inputs, use_cache=False).loss

    @torch.no_grad()
    def generate(self, model: PreTrainedModel, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        """Return the tokens of the answers without the token that ends them, and the tokens a second."""
        prompts, end = [self._prompt(text) for text in texts], self.answers[0][-1]
        longest, answers, began, total = max(map(len, self.answers)), {}, time.perf_counter(), 0
        for part in by_length(prompts):
            batch = padded(self.tokenizer, [prompts[number] for number in part], "left")
            generated = model.generate(
                **batch, do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=end
            )
            for number, row in zip(part, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                answers[number] = row[: row.index(end)] if end in row else row
                total += len(answers[number]) + 1
        return [answers[number] for number in range(len(texts))], total / (time.perf_counter() - began)

    def score(self, model: PreTrainedModel, messages: Sequence[Message]) -> Score:
        """Count the answers that are the label of the right FAQ."""
        answers, per_second = self.generate(model, [message.text for message in messages])
        texts = [text.strip() for text in self.tokenizer.batch_decode(answers)]
        right = [text == self.labels[message.faq] for text, message in zip(texts, messages, strict=True)]
        return Score(sum(right) / len(right), per_second)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> torch.Tensor:
        """Return outputs by which two models are compared: the logits after some prompts."""
        batch = padded(self.tokenizer, [self._prompt(message.text) for message in self.labelled[:4]], "left")
        return model(**batch, use_cache=False).logits[:, -1]


TASKS = {"routing": Routing, "answers": Answers}
Task = Routing | Answers


class TaskTrainer(Trainer):
    """A trainer with the loss of a task, for a LoRA of PEFT.

    Args:
        model: The model.
        args: The training arguments.
        task: The task, for its training messages.
    """

    def __init__(self, model: nn.Module, args: Any, task: Task) -> None:
        self.task = task
        super().__init__(model, args, train_dataset=task.dataset(), data_collator=task.collate)
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute the loss of the task."""
        return self.task.loss(model, inputs)


class TaskDistillationTrainer(had.DistillationMixin, TaskTrainer):
    """The same for a student that has teachers, in both stages."""
