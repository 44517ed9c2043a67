"""Create a tiny masked language model, and a tokenizer in the manner of BERT's."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.corpus.trained_tokenizers import word_pieces

VOCABULARY = 416
"""Rows of the head; the tokenizer has fewer tokens."""


def tiny_bert(seed: int = 0, **options: Any) -> BertForMaskedLM:
    """Return a random BERT of two layers whose predictions differ between positions."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return BertForMaskedLM(BertConfig(**settings | options))


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
_DISTILBERT = {
    "vocab_size": 96,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def _distilbert(num_hidden_layers: int = 2, **options: Any) -> DistilBertForMaskedLM:
    layers = {"n_layers": num_hidden_layers}
    return DistilBertForMaskedLM(DistilBertConfig(**_DISTILBERT | layers | options))


MODELS = {
    "BERT": tiny_bert,
    "RoBERTa": lambda **options: RobertaForMaskedLM(
        RobertaConfig(**_SMALL | _SPECIAL | {"pad_token_id": 1} | options)
    ),
    "DistilBERT": _distilbert,
    "ModernBERT": lambda **options: ModernBertForMaskedLM(
        ModernBertConfig(**_SMALL | _SPECIAL | options)
    ),
    "ELECTRA's generator": lambda **options: ElectraForMaskedLM(
        ElectraConfig(**_SMALL | {"embedding_size": 16} | options)
    ),
}
"""Functions that create a random masked language model, with options of its configuration."""


def write_short_texts(text: Path, path: Path) -> Path:
    """Copy the lines of a JSON lines file that have fewer than 1500 characters."""
    path.write_text("".join(line for line in text.open() if len(line) < 1500))
    return path


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of word pieces that puts a text between [CLS] and [SEP]."""
    backend = word_pieces()
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
    )
