"""A tiny BERT with a tokenizer."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


def save_tiny_encoder(folder):
    """Writes a tiny BERT with a tokenizer for a few sentences into a folder, and returns it."""
    texts = ["my card is gone", "when does the train leave", "what do i pay for the parcel", "how is the weather"]
    letters = sorted(set("".join(texts)) - {" "})
    words = sorted(set(" ".join(texts).split()) - set(letters))
    # A vocabulary that is trained differs from process to process.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *words]
    tokens += [f"[unused{number}]" for number in range(80 - len(tokens))]  # tests draw any of 60
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng():  # the same weights whatever test comes first
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
