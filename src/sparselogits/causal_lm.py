"""A causal language model taken apart: trunk, head, and what happens to the logits in between.

Teacher and student need the same thing of a transformers model: hidden states from the trunk, and
the head applied to them a slice of positions at a time, so that logits of [batch, length,
vocabulary] never exist. `split` finds the parts by the names transformers gives them;
`agrees_with_model` checks, by running both ways on a few tokens, that nothing was missed. A model
that does something else to its logits fails the check, and the caller takes the plain path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PROBE_LENGTH = 16


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap(scale * (h W^T + b)).

    Args:
        weight: [V, D].
        bias: [V] or None.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: c in c * tanh(logits / c) (Gemma's `final_logit_softcapping`), or None.
        module: makes the product where the weight is spread over ranks, which all of them call.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    module: nn.Module | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of hidden states [..., D]; the product in the weight's dtype."""
        if self.module is None:
            logits = nn.functional.linear(hidden, self.weight, self.bias).float()
        else:
            logits = self.module(hidden).float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True)
class Parts:
    """The trunk of a model, which gives hidden states, and its head."""

    trunk: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None

    def bound_head(self) -> Head:
        """The head with the weights as they are now; call it where hooks have gathered them."""
        weight: Any = self.head.weight
        module = self.head if isinstance(weight, DTensor) else None
        return Head(weight, self.head.bias, self.scale, self.softcap, module)  # type: ignore[arg-type]


def split(model: nn.Module) -> Parts | None:
    """The parts of a transformers causal language model, or None where they cannot be told.

    A head that is not a plain linear layer (LoRA on it, quantised) has no weight that could be
    multiplied from outside, and counts as not told.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "get_decoder", lambda: None)()
    if type(head) is not nn.Linear or trunk is None or trunk is model:
        return None
    config = text_config(model.config)
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = 1.0 / float(divisor)
    elif (factor := getattr(config, "logit_scale", None)) is not None:
        scale = float(factor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Parts(trunk, head, scale, None if softcap is None else float(softcap))


def embedding_rows(model: nn.Module) -> int:
    """Return how many ids a model's input embedding has; wrapped embeddings included."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def text_config(config: Any) -> Any:
    """The language part of a configuration that may describe several modalities."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@torch.no_grad()
def agrees_with_model(model: nn.Module, parts: Parts) -> bool:
    """Whether head(trunk(x)) equals the model's own logits on a few tokens.

    The tolerance allows for another order of the same products in the model's dtype, not for a
    scale, a softcap or a norm that was overlooked.
    """
    weight = parts.head.weight
    probe = torch.arange(PROBE_LENGTH, device=weight.device) * 7919 % embedding_rows(model)  # type: ignore[arg-type]
    was_training = model.training
    model.eval()
    try:
        whole = model(input_ids=probe[None], use_cache=False).logits.float()
        hidden = parts.trunk(input_ids=probe[None], use_cache=False).last_hidden_state
        sliced = parts.bound_head()(hidden)
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    if whole.shape != sliced.shape:
        return False
    # a few units in the last place of the dtype, relative to the largest logit
    tolerance = 16 * torch.finfo(weight.dtype).eps * float(whole.abs().max())  # type: ignore[arg-type]
    return bool((whole - sliced).abs().max() <= tolerance)
