"""Quantise a student: fake quantisation during training, real quantisation when it is loaded.

Quantisation-aware training rounds weights (and activations, if the format quantises them) in the
forward pass and passes gradients through the rounding. torchao implements both steps: `prepare` a
model, train it, save it in full precision, and load it by `load_quantized`, which rounds the
weights. The quantised model then computes the logits of the fake-quantised one up to rounding. The
head is excluded, because most runtimes store it in full precision, and it may be tied to the
embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from sparselogits.errors import InvalidArgumentError, MissingDependencyError
from sparselogits.language_model import names_masked_class

QuantizationFormat = Literal[
    "int8-weight-only", "int4-weight-only", "int3-weight-only", "int2-weight-only",
    "int8-dynamic-int8", "int8-dynamic-int4",
]  # fmt: skip
"""Name of a quantisation format.

`intN-weight-only` quantises weights to N bits; `int8-dynamic-intN` also quantises activations to 8
bits, per token, with ranges computed from the data.
"""

FORMATS: tuple[str, ...] = get_args(QuantizationFormat)
"""Names of all quantisation formats."""


@dataclass(frozen=True)
class Quantization:
    """Quantisation format of torchao.

    Args:
        format: name of the format; see `QuantizationFormat`.
        group_size: number of consecutive inputs to a linear layer that share a scale; None
            for one scale per output channel.

    Raises:
        InvalidArgumentError: the format is unknown, or the group size is below 1.

    Example:
        >>> Quantization("int4-weight-only", group_size=32).described
        'int4-weight-only, groups of 32'
    """

    format: QuantizationFormat
    group_size: int | None = 32

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InvalidArgumentError(
                f"unknown quantisation format {self.format!r}; available: {', '.join(FORMATS)}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise InvalidArgumentError(
                f"group_size={self.group_size}: expected a number from 1, or None for one scale "
                "per output channel"
            )

    @property
    def described(self) -> str:
        """Description of the format for display."""
        size = self.group_size
        return f"{self.format}, {'one scale per channel' if size is None else f'groups of {size}'}"

    def torchao_config(self) -> Any:
        """Return torchao's configuration object. Raises MissingDependencyError without torchao."""
        try:
            import torch
            from torchao.quantization import (
                Int8DynamicActivationIntxWeightConfig,
                IntxWeightOnlyConfig,
                PerAxis,
                PerGroup,
            )
        except ImportError as error:
            raise MissingDependencyError(
                "quantised students need torchao, which is not installed: pip install "
                "'sparselogits[quantize]'"
            ) from error
        scales = PerAxis(0) if self.group_size is None else PerGroup(self.group_size)
        weights, _, kind = self.format.removeprefix("int8-dynamic-").partition("-")
        dtype = getattr(torch, weights)
        if kind == "weight-only":
            return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=scales)
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=scales)


def prepare(model: nn.Module, quantization: Quantization) -> None:
    """Replace a model's plain linear layers, except the head, by fake-quantised ones in place.

    The names and the precision of the weights do not change, so checkpoints and optimisers are not
    affected.

    Raises:
        InvalidArgumentError: the group size does not divide the inputs of a layer, or the model has
            no linear layers in full precision besides its head.
        MissingDependencyError: torchao is not installed.
    """
    config = quantization.torchao_config()
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    layers = _linear_layers(model)
    if not layers:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no linear layers besides its head that could be "
            "quantised; give a model in full precision"
        )
    size = quantization.group_size
    for name, layer in layers.items():
        if size is not None and layer.in_features % size:
            raise InvalidArgumentError(
                f"group_size={size} does not divide the {layer.in_features} inputs of {name}; "
                "choose a divisor, or None for one scale per output channel"
            )
    quantize_(model, QATConfig(config, step="prepare"), lambda _, name: name in layers)


def load_quantized(folder: Path, quantization: Quantization) -> nn.Module:
    """Load a language model that was saved in full precision, and quantise its weights.

    The folder contains a causal or masked model that was trained after `prepare`; for any other
    model this is post-training quantisation. `save_pretrained` of the result writes the quantised
    weights in a format that transformers loads without further arguments.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        TorchAoConfig,
    )

    settings = TorchAoConfig(quantization.torchao_config())
    masked = names_masked_class(AutoConfig.from_pretrained(folder))
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(
        folder, quantization_config=settings, use_safetensors=True
    )
    return model


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers in full precision, except the head, by name."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = model.named_modules()
    return {name: m for name, m in modules if type(m) is nn.Linear and m is not head}
