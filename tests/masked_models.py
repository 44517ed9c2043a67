"""Create a tiny masked language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM


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
