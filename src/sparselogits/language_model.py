"""Split a language model into trunk and head, and measure how it scales and caps its logits.

Teacher and student both compute hidden states by the trunk and apply the head to a slice of
positions at a time, which avoids logits of [batch, length, vocabulary]. A masked language model
transforms its hidden states before the head, in ways that differ by architecture, so its trunk is
the whole model, run without the matrix product of the head. A scale or soft cap is measured: known
float32 numbers replace the head's output, and the model's own code computes logits from them, so
the check is equally strict for a bfloat16 model. A model that transforms its logits in another way
is not split, and the caller uses its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparselogits.errors import InvalidArgumentError

_PROBE_LENGTH = 16
"""Number of tokens on which models are compared with their parts."""
_FAILURES = (AttributeError, IndexError, TypeError, ValueError, RuntimeError)
"""Errors of a forward pass on `probe_tokens`; IndexError if a model has too few positions."""


@dataclass(frozen=True)
class Head:
    """Language-model head that maps hidden states h to logits softcap(scale * (h W^T + b)).

    Args:
        weight: W, [V, D].
        bias: b, [V]; None for a head without bias.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: c in c * tanh(logits / c) (Gemma's `final_logit_softcapping`); None without a cap.
        module: module that computes h W^T + b if the weight is sharded over ranks, all of which
            must call it; None if the weight is a plain tensor.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    module: nn.Module | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V] for hidden states [..., D] of the weight's dtype."""
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
    """Trunk and head of a language model.

    Args:
        trunk: module that returns hidden states as `last_hidden_state`; the model itself if
            `in_model`.
        head: linear layer from hidden states to logits.
        scale: see `Head`.
        softcap: see `Head`.
        in_model: whether the trunk is the whole model, run without the head's matrix product.
    """

    trunk: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None
    in_model: bool = False

    def states(self, **inputs: Any) -> Tensor:
        """Run the trunk on inputs such as `input_ids`; return hidden states [B, L, D]."""
        states: Tensor
        if not self.in_model:
            states = self.trunk(**inputs, use_cache=False).last_hidden_state
            return states
        with self.without_product():
            states = self.trunk(**inputs, use_cache=False).logits
            return states

    @contextmanager
    def without_product(self) -> Iterator[None]:
        """Replace the head by the identity in a `with` block: the model's logits become states."""
        patched = self.head.__dict__.get("forward")  # set by libraries that patch an instance
        self.head.forward = lambda states: states
        try:
            yield
        finally:
            del self.head.forward
            if patched is not None:
                self.head.forward = patched

    def bound_head(self) -> Head:
        """Return the head with its current weights.

        Under FSDP, call this inside the model's forward, where the hooks have gathered the weights.
        """
        weight: Any = self.head.weight
        module = self.head if isinstance(weight, DTensor) else None
        return Head(weight, self.head.bias, self.scale, self.softcap, module)  # type: ignore[arg-type]


@contextmanager
def recording_last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the last hidden states of a model's base at each forward pass in a `with` block.

    The base is the model without its head and, in a masked language model, without the transform
    before the head. Each pass appends a tensor [B, L, D], which is not detached, to the yielded
    list.

    Raises:
        InvalidArgumentError: the model has no base from which the head is separate.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    base = getattr(inner, "base_model", inner)
    if base is inner:
        raise InvalidArgumentError(
            f"{type(inner).__name__} has no base model that is separate from its head, so its last "
            "hidden states are unknown; leave the cosine loss out"
        )
    recorded: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        recorded.append(output[0])

    with _forward_hook(base, record):
        yield recorded


def masked_classes(config: Any) -> set[str]:
    """Return the class names of transformers' masked language models, and the one in `auto_map`.

    `auto_map` is the configuration's table of classes that the model's folder defines. If it names
    no masked class, the set contains an empty string, which is no class name.
    """
    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForMaskedLM", "")
    return set(_masked_classes_by_type().values()) | {str(remote).rpartition(".")[2]}


@cache
def _causal_classes() -> frozenset[str]:
    """Return the class names of causal language models in transformers."""
    from transformers.models.auto import modeling_auto

    named = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return frozenset(name for value in named for name in ([value] if type(value) is str else value))


@cache
def _masked_classes_by_type() -> dict[str, str]:
    """Return the class names of transformers' masked language models by model type."""
    from transformers.models.auto import modeling_auto

    named = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    # XLM's class is in both mappings
    return {kind: name for kind, name in named.items() if name not in _causal_classes()}


def _refuse_encoder_decoder(config: Any, *names: str) -> None:
    """Validate that a configuration with class names does not describe an encoder-decoder.

    The decoder alone, with the name of a causal class, is accepted. Raises InvalidArgumentError.
    """
    decoder_alone = not _causal_classes().isdisjoint(names)
    if names and getattr(config, "is_encoder_decoder", False) and not decoder_alone:
        raise InvalidArgumentError(
            f"{names[0]} is an encoder-decoder, which reads two texts; expected a model of one. "
            "Use a causal or a masked language model"
        )


def names_masked_class(config: Any) -> bool:
    """Return whether a configuration describes a masked language model.

    The configuration of an encoder (BERT, RoBERTa) may also name another class (BertModel,
    BertForPreTraining), or no class. Such a configuration describes a masked language model unless
    it names a causal class, or sets `is_decoder` or `is_encoder_decoder`.

    Raises:
        InvalidArgumentError: the configuration names a class of an encoder-decoder (BART).
    """
    named = set(getattr(config, "architectures", None) or ())
    _refuse_encoder_decoder(config, *named)
    if not named.isdisjoint(masked_classes(config)):
        return True
    encoder = getattr(config, "model_type", None) in _masked_classes_by_type()
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return encoder and not decodes and named.isdisjoint(_causal_classes())


def predicts_masked(model: nn.Module) -> bool:
    """Return whether a model, with or without an adapter, is a masked language model.

    Raises:
        InvalidArgumentError: the model is an encoder-decoder (BART).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config, names = getattr(model, "config", None), [kind.__name__ for kind in type(inner).__mro__]
    _refuse_encoder_decoder(config, *names)
    return not masked_classes(config).isdisjoint(names)


def require_predicting(model: nn.Module, *, masked: bool, whose: str, of: str) -> None:
    """Validate that a model is of the required kind: a masked or a causal language model.

    Args:
        model: a transformers language model.
        masked: whether a masked language model is required, instead of a causal one.
        whose: name of the model for the message, as in "the student".
        of: name of the data that the model is used with for the message, as in "the cache".

    Raises:
        InvalidArgumentError: the model is of the other kind, or an encoder-decoder.
    """
    found = predicts_masked(model)
    if found == masked:
        return
    kinds = ("a causal language model", "a masked language model")
    raise InvalidArgumentError(
        f"{whose} ({type(model).__name__}) is {kinds[found]}, but {of} is for {kinds[masked]}: "
        "masked models predict tokens that their input hides, causal ones the next token. Use "
        f"{kinds[masked]}"
    )


def split(model: nn.Module) -> Parts | None:
    """Split a transformers language model into trunk and head.

    Args:
        model: a transformers language model, causal or masked.

    Returns:
        The parts; None if the head is not a plain linear layer (with LoRA, quantised or offloaded),
        if the model has no trunk apart from itself or cannot be run on `input_ids` alone, if it
        transforms its logits by more than a scale and a soft cap (a masked model: at all), or if
        head(trunk(x)) differs from the model's own logits by more than rounding.

    Raises:
        InvalidArgumentError: the model is an encoder-decoder with a linear head (BART).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:
        return None
    in_model = predicts_masked(model)
    trunk = model if in_model else getattr(model, "get_decoder", lambda: None)()
    if trunk is None or (trunk is model and not in_model):
        return None
    measured = _measure_scale_and_softcap(model, head)
    if measured is None or (in_model and measured != (1.0, None)):
        return None  # without the product, the model would scale or cap the states
    parts = Parts(trunk, head, *measured, in_model)
    return parts if _agree_with(model, parts) else None


@torch.no_grad()
def _measure_scale_and_softcap(
    model: nn.Module, head: nn.Module
) -> tuple[float, float | None] | None:
    """Return scale and soft cap of a model's logits; None if these do not explain the logits.

    The head's output is replaced by a ramp from 2^-10 to 2^16 with both signs, spread over the
    columns. The smallest numbers give the scale, the largest logit gives the soft cap, and all
    logits must equal the result of these two operations up to rounding. The result is also None if
    the weight is offloaded or the forward pass fails.
    """
    weight: Any = head.weight
    if weight.is_meta:
        return None  # an offloaded weight has no values in memory
    magnitudes = torch.logspace(-10, 16, 79, base=2.0)
    ramp = torch.cat([magnitudes, -magnitudes]).to(weight.device)
    rows = torch.arange(_PROBE_LENGTH, device=weight.device)[:, None] * 37
    columns = torch.arange(weight.shape[0], device=weight.device)[None]
    given = ramp[(rows + columns) % len(ramp)][None]

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        # a model may compute the last position only
        return given[:, : output.shape[1]].clone()

    with _forward_hook(head, replaced):
        found = _logits_of(model, probe_tokens(model, weight.device))
    if found is None or found.shape != given.shape:
        return None
    found = found.float()
    small = given.abs() < 2.0**-8
    scale = float((found[small] / given[small]).double().median())
    cap = float(found.abs().max())
    capped = cap < 0.5 * abs(scale) * float(magnitudes[-1])
    config = text_config(model.config)
    scale = _configured_value(config, scale)
    softcap = _configured_value(config, cap) if capped else None
    expected = given * scale
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-7):
        return None
    return scale, softcap


def _configured_value(config: Any, measured: float) -> float:
    """Replace a measured number by 1, or by a number of the configuration or its inverse.

    The replacement equals `measured` up to rounding; if there is none, `measured` is returned.
    """
    values = config.to_dict().values() if hasattr(config, "to_dict") else vars(config).values()
    known = [float(v) for v in values if isinstance(v, float | int) and not isinstance(v, bool)]
    candidates = [1.0, *known, *(1.0 / v for v in known if v)]
    nearest = min(candidates, key=lambda value: abs(value - measured))
    return nearest if abs(nearest - measured) <= 1e-5 * abs(measured) else measured


@contextmanager
def _forward_hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a hook after each forward pass of a module within a `with` block."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def probe_tokens(model: nn.Module, device: Any = "cpu") -> Tensor:
    """Return token ids, int64 [1, 16], on which a model is compared with its parts."""
    tokens: Tensor = torch.arange(_PROBE_LENGTH, device=device) * 7919 % embedding_rows(model)
    return tokens[None]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode within a `with` block, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # a module may override train()
        for module, training in modes:
            module.training = training


def _logits_of(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """Return the logits [1, L, V] of a model's own forward pass.

    The result is None if the pass raises one of `_FAILURES`.
    """
    try:
        with in_eval_mode(model):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    except _FAILURES:
        return None
    return logits


def output_columns(model: nn.Module) -> int:
    """Return the number of columns V of a model's logits.

    V is the number of rows of the head, except where a model multiplies the output of its head by
    the input embedding (DeBERTa). If the forward pass fails, the number of rows is returned.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    rows = int(head.weight.shape[0])
    if rows == embedding_rows(model):
        return rows
    with torch.no_grad():
        logits = _logits_of(model, probe_tokens(model, head.weight.device))
    return rows if logits is None else int(logits.shape[-1])


def embedding_rows(model: nn.Module) -> int:
    """Return the number of rows in a model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def text_config(config: Any) -> Any:
    """Return a language model's configuration, which may be nested in a multimodal one."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@torch.no_grad()
def _agree_with(model: nn.Module, parts: Parts) -> bool:
    """Return whether head(trunk(x)) equals the model's own logits on a few tokens up to rounding.

    The head's input must equal the trunk's output, too, which detects a factor or a normalisation
    between them.
    """
    weight: Any = parts.head.weight
    tokens = probe_tokens(model, weight.device)
    entered: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs:
            entered.append(inputs[0])

    with _forward_hook(parts.head, record):
        whole = _logits_of(model, tokens)
    try:
        with in_eval_mode(model):
            hidden = parts.states(input_ids=tokens)
            sliced = parts.bound_head()(hidden)
    except _FAILURES:
        return False
    if whole is None or whole.shape != sliced.shape or len(entered) != 1:
        return False
    eps = torch.finfo(weight.dtype).eps
    if entered[0].shape != hidden.shape or not _is_close(entered[0], hidden, 4 * eps):
        return False
    return _is_close(whole, sliced, 16 * eps)


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether tensors differ by at most `tolerance` times the largest expected magnitude."""
    actual, expected = actual.float(), expected.float().to(actual.device)
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
