"""A causal language model taken apart: trunk, head, and what happens to the logits in between.

Teacher and student need the same thing of a transformers model: hidden states from the trunk, and
the head applied to them a slice of positions at a time, so that logits of [batch, length,
vocabulary] never exist. `split` finds the parts. What the model does to its logits after the head
(a scale, a soft cap) is measured rather than read from a list of names: known numbers are put in
the place of the head's output, in float32, and the model's own code turns them into logits. So a
bfloat16 model is checked as sharply as any, and `agrees_with_model` fails for a model that does
something else; the caller then takes the plain path.
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
    """Return the parts of a transformers causal language model, or None where they are unknown.

    A head that is not a plain linear layer (LoRA on it, quantised) has no weight that could be
    multiplied from outside, and what happens to the logits may be more than a scale and a soft
    cap: both count as unknown.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "get_decoder", lambda: None)()
    if type(head) is not nn.Linear or trunk is None or trunk is model:
        return None
    measured = _measured(model, head)
    if measured is None:
        return None
    return Parts(trunk, head, *measured)


@torch.no_grad()
def _measured(model: nn.Module, head: nn.Module) -> tuple[float, float | None] | None:
    """Return scale and soft cap of a model's logits; None where there is more, or it is unknown.

    The head's output is replaced by a ramp from 2^-10 to 2^16 of both signs that every column
    sees in parts; the smallest numbers give the scale, the largest the soft cap, all of them say
    whether that is everything.
    """
    weight: Any = head.weight
    if weight.is_meta:
        return None  # offloaded: there is no weight to multiply from outside
    magnitudes = torch.logspace(-10, 16, 79, base=2.0)
    ramp = torch.cat([magnitudes, -magnitudes]).to(weight.device)
    rows = torch.arange(PROBE_LENGTH, device=weight.device)[:, None] * 37
    columns = torch.arange(weight.shape[0], device=weight.device)[None]
    given = ramp[(rows + columns) % len(ramp)][None]

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        # a model that asks for the last position alone gets as many
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
    """Return the configured number (or its inverse) that was measured, where there is one."""
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
    """Return the logits of the model's own forward pass; None where it cannot be called."""
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
    """Return how many ids a model's input embedding has; wrapped embeddings included."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def text_config(config: Any) -> Any:
    """The language part of a configuration that may describe several modalities."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@torch.no_grad()
def agrees_with_model(model: nn.Module, parts: Parts) -> bool:
    """Return whether head(trunk(x)) equals the model's own logits on a few tokens.

    What enters the head has to be what the trunk gives, bit for bit or nearly: a factor or a norm
    in between would show. The logits may differ by the rounding of the products in the model's
    dtype.
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
    """Whether two tensors differ by a share of the largest number at most."""
    one, other = one.float(), other.float().to(one.device)
    return bool((one - other).abs().max() <= share * other.abs().max())
