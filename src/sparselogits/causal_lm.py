"""Split a causal language model into trunk and head, and measure what it does to its logits.

Teacher and student both need hidden states from the trunk, and the head applied to them a slice of
positions at a time, so that logits of [batch, length, vocabulary] never exist. `split` finds the
parts and checks them against the model. What the model does to its logits after the head (a scale,
a soft cap) is measured rather than read from a list of names: known float32 numbers replace the
head's output, and the model's own code turns them into logits. So a bfloat16 model is checked as
strictly as any. For a model that does something else `split` returns None, and the caller uses the
model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PROBE_LENGTH = 16


@dataclass(frozen=True)
class Head:
    """Maps hidden states h to logits: softcap(scale * (h W^T + b)).

    Args:
        weight: W, [V, D].
        bias: b, [V], or None.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: c in c * tanh(logits / c) (Gemma's `final_logit_softcapping`), or None.
        module: module that computes the product where the weight is sharded over ranks, all of
            which call it; else None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    module: nn.Module | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V] of states [..., D], multiplied in the weight's dtype."""
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
    """The trunk of a model, which returns hidden states, and the head."""

    trunk: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None

    def bound_head(self) -> Head:
        """Return the head with its current weights; call this where hooks have gathered them."""
        weight: Any = self.head.weight
        module = self.head if isinstance(weight, DTensor) else None
        return Head(weight, self.head.bias, self.scale, self.softcap, module)  # type: ignore[arg-type]


def split(model: nn.Module) -> Parts | None:
    """Return the parts of a transformers causal language model; None where they are unknown.

    The parts are unknown where the head is not a plain linear layer (with LoRA, quantised), where
    more than a scale and a soft cap happens to the logits, and where head(trunk(x)) differs from
    the model's own logits.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "get_decoder", lambda: None)()
    if type(head) is not nn.Linear or trunk is None or trunk is model:
        return None
    measured = _measured(model, head)
    if measured is None:
        return None
    parts = Parts(trunk, head, *measured)
    return parts if _agree(model, parts) else None


@torch.no_grad()
def _measured(model: nn.Module, head: nn.Module) -> tuple[float, float | None] | None:
    """Return scale and soft cap of a model's logits; None where something else happens to them.

    The head's output is replaced by a ramp from 2^-10 to 2^16 of both signs, of which every column
    gets a part. The smallest numbers give the scale, the largest the soft cap, and all of them show
    whether anything else happens.
    """
    weight: Any = head.weight
    if weight.is_meta:
        return None  # offloaded: the weight has no values here
    magnitudes = torch.logspace(-10, 16, 79, base=2.0)
    ramp = torch.cat([magnitudes, -magnitudes]).to(weight.device)
    rows = torch.arange(PROBE_LENGTH, device=weight.device)[:, None] * 37
    columns = torch.arange(weight.shape[0], device=weight.device)[None]
    given = ramp[(rows + columns) % len(ramp)][None]

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        # a model may compute the last position only
        return given[:, : output.shape[1]].clone()

    with _hooked(head, replaced):
        found = _own_logits(model, _probe(model, weight.device))
    if found is None or found.shape != given.shape:
        return None
    found = found.float()
    small = given.abs() < 2.0**-8
    scale = float((found[small] / given[small]).double().median())
    cap = float(found.abs().max())
    capped = cap < 0.5 * abs(scale) * float(magnitudes[-1])
    config = text_config(model.config)
    scale = _configured(config, scale)
    softcap = _configured(config, cap) if capped else None
    expected = given * scale
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-7):
        return None
    return scale, softcap


def _configured(config: Any, measured: float) -> float:
    """Return the configured number (or its inverse) that equals a measured one, if there is one."""
    values = config.to_dict().values() if hasattr(config, "to_dict") else vars(config).values()
    known = [float(v) for v in values if isinstance(v, float | int) and not isinstance(v, bool)]
    candidates = [1.0, *known, *(1.0 / v for v in known if v)]
    nearest = min(candidates, key=lambda value: abs(value - measured))
    return nearest if abs(nearest - measured) <= 1e-5 * abs(measured) else measured


@contextmanager
def _hooked(head: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _probe(model: nn.Module, device: Any) -> Tensor:
    tokens: Tensor = torch.arange(PROBE_LENGTH, device=device) * 7919 % embedding_rows(model)
    return tokens[None]


def _own_logits(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """Return the logits of the model's own forward pass; None where it fails."""
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    finally:
        model.train(was_training)
    return logits


def embedding_rows(model: nn.Module) -> int:
    """Return the number of ids of a model's input embedding, which may be wrapped."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def text_config(config: Any) -> Any:
    """Return the language part of a configuration that may describe several modalities."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@torch.no_grad()
def _agree(model: nn.Module, parts: Parts) -> bool:
    """Return whether head(trunk(x)) equals the model's own logits on a few tokens.

    The head's input has to equal the trunk's output, up to rounding: this detects a factor or a
    norm in between. The logits may differ by the rounding of the products in the model's dtype.
    """
    weight: Any = parts.head.weight
    tokens = _probe(model, weight.device)
    entered: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs:
            entered.append(inputs[0])

    with _hooked(parts.head, keep):
        whole = _own_logits(model, tokens)
    was_training = model.training
    model.eval()
    try:
        hidden = parts.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        sliced = parts.bound_head()(hidden)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    if whole is None or whole.shape != sliced.shape or len(entered) != 1:
        return False
    eps = torch.finfo(weight.dtype).eps
    if entered[0].shape != hidden.shape or not _near(entered[0], hidden, 4 * eps):
        return False
    return _near(whole, sliced, 16 * eps)


def _near(one: Tensor, other: Tensor, share: float) -> bool:
    """Return whether two tensors differ by at most a share of the largest number."""
    one, other = one.float(), other.float().to(one.device)
    return bool((one - other).abs().max() <= share * other.abs().max())
