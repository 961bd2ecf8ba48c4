"""Models of a user around a model with adapters."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Classifier(nn.Module):
    """A classifier on the mean of an encoder's last hidden states, with a norm that has buffers."""

    def __init__(self, encoder, num_labels=2):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(encoder.config.hidden_size)
        self.head = nn.Linear(encoder.config.hidden_size, num_labels)
        self.to(next(encoder.parameters()).dtype)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(self, input_ids, attention_mask, labels=None, return_dict=True):
        states = self.encoder(input_ids, attention_mask=attention_mask, return_dict=return_dict)[0]  # (B, T, d)
        weights = (attention_mask / attention_mask.sum(dim=1, keepdim=True)).to(states.dtype)
        logits = self.head(self.norm(torch.einsum("bt,btd->bd", weights, states)))
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


class Passing(nn.Module):
    """Passes on whatever it gets."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)
