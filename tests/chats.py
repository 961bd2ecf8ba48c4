"""Chats, and a tokenizer with a chat template, made in code."""

import random

from datasets import Dataset
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<assistant> {% generation %}{{ message['content'] }} </s>{% endgeneration %} "
    "{% else %}<user> {{ message['content'] }} </s> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def chat_tokenizer():
    """A tokenizer of whole words with the vocabulary of the tiny models."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats(n=8, seed=0):
    """Chats of one or two turns, whose lengths differ."""
    rng = random.Random(seed)

    def words(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def turn():
        return [{"role": "user", "content": words(1, 4)}, {"role": "assistant", "content": words(2, 6)}]

    return Dataset.from_dict({"messages": [turn() + (turn() if rng.random() < 0.5 else []) for _ in range(n)]})
