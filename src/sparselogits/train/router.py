"""Compute the load-balancing loss of a mixture of experts whose trunk runs without the head.

transformers computes this auxiliary loss after the head, with `load_balancing_loss_func` of the
model's module; here that function is called on the router logits that the trunk returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.language_model import Parts, in_eval_mode, probe_tokens, text_config

BalancingLoss = Callable[[Any, Tensor | None], Tensor]
"""Function from the trunk's output and the attention mask to the loss times `coefficient`."""


def balances_experts(model: nn.Module) -> bool:
    """Return whether the model's configuration adds the load-balancing loss to the model's loss."""
    return bool(getattr(text_config(model.config), "output_router_logits", False))


def coefficient(model: nn.Module) -> float:
    """Return the load-balancing loss's coefficient in the model's configuration; 0 if absent."""
    return float(getattr(text_config(model.config), "router_aux_loss_coef", 0.0))


def balancing_loss(model: nn.Module, parts: Parts) -> BalancingLoss | None:
    """Return a function that computes the model's load-balancing loss from the trunk's output.

    The result is None if the model or its module lacks what the loss needs, or if the function
    fails or differs from the loss in the model's own forward on a few tokens.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts = getattr(model, "num_experts", None)
    chosen = getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        return None
    scale = coefficient(model)

    def loss(output: Any, attention_mask: Tensor | None) -> Tensor:
        balance: Tensor = function(output.router_logits, experts, chosen, attention_mask)
        return scale * balance

    return loss if _agrees(model, parts, loss, scale) else None


@torch.no_grad()
def _agrees(model: nn.Module, parts: Parts, loss: BalancingLoss, scale: float) -> bool:
    given = {"input_ids": probe_tokens(model, parts.head.weight.device), "use_cache": False}
    try:
        with in_eval_mode(model):
            own = model(**given, output_router_logits=True).aux_loss
            apart = loss(parts.trunk(**given, output_router_logits=True), None)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return own is not None and bool(torch.isclose(apart, scale * own, rtol=1e-3, atol=1e-6))
