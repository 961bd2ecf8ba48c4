"""Tiny models of Sentence Transformers with a student, and data for them."""

import adapters
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder import CrossEncoder
from tiny_models import TEACHERS, noisy
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, set_seed

import hf_adapter_distillation as had

TEXTS = ["my card is gone", "when does the train leave", "what do i pay for the parcel", "how is the weather"]
PAIRS = Dataset.from_dict(
    {"anchor": TEXTS * 4, "positive": [" ".join(reversed(text.split()[i % 3 :])) for i, text in enumerate(TEXTS * 4)]}
)
SCORED = PAIRS.add_column("score", [(i % 5) / 4 for i in range(16)])


def with_student(model, seed=0, dtype=torch.float32, teachers=TEACHERS, **config):
    """Gives the transformer of a model teachers and a student, by default with equal weights."""
    config.setdefault("student_start", "teachers")
    set_seed(seed)
    adapters.init(model)
    for name in teachers:
        model.add_adapter(name, config="seq_bn")
        noisy(model, name)
    settings = had.DistillationConfig(teachers=list(teachers), **config)
    model.add_adapter("insurance", config="seq_bn", distill_from=settings)
    model.to(dtype).train_adapter("insurance")
    return model


def base_folder(folder, encoder, model_class, dropout, **config):
    """Writes a BERT of two layers with the tokenizer in the folder of an encoder, and returns its folder."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    settings = BertConfig(
        len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **config,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    model_class(settings).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def embedding_model(folder, encoder, pooling="mean", dropout=0.1, dtype=torch.float32, **config):
    """A `SentenceTransformer` with a student."""
    model = SentenceTransformer(base_folder(folder, encoder, BertModel, dropout), device="cpu")
    model[1] = type(model[1])(16, pooling_mode=pooling)
    with_student(model[0].auto_model, dtype=dtype, **config)
    return model


def cross_encoder(folder, encoder, num_labels=1, dropout=0.1, dtype=torch.float32, **config):
    """A `CrossEncoder` with a student."""
    base = base_folder(folder, encoder, BertForSequenceClassification, dropout, num_labels=num_labels)
    model = CrossEncoder(base, device="cpu")
    with_student(model.model, dtype=dtype, **config)
    return model
