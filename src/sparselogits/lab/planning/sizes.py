"""Parse quantities such as 8B, and count the parameters of a model from its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning.memory import Shape, shape_of

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15}
NUMBER = re.compile(r"(\d+(?:[._]\d+)*(?:[eE]\+?\d+)?)\s*([KMBGTP]?)")


def quantity(text: str, what: str) -> float:
    """Parse a positive number with an optional suffix K, M, B (or G), T or P.

    Args:
        text: text such as '8B', '1.5T' or '2e9'.
        what: name of the quantity, for the error message.

    Raises:
        InvalidArgumentError: If the text is not a number with an optional suffix, or the number is
            not positive and finite.

    Examples:
        >>> quantity("1.5T", "tokens")
        1500000000000.0
    """
    found = NUMBER.fullmatch(text.strip().upper().replace("_", ""))
    try:
        value = float(found[1]) * SUFFIXES[found[2]] if found else 0.0
    except ValueError:  # text such as 1.2.3
        value = 0.0
    if not 0 < value < float("inf"):
        raise InvalidArgumentError(
            f"{what} is {text!r}; give a positive number such as 300M, 8B, 1.5T or 2e9"
        )
    return value


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Args:
        parameters: number of parameters.
        shape: dimensions of the model, or a plausible shape (see `shape_of`) if they are unknown.
    """

    parameters: float
    shape: Shape


def size_of(text: str, what: str) -> ModelSize:
    """Return the size of a model from a count of parameters or from a configuration.

    A head that is tied to the embedding counts once.

    Args:
        text: count such as '8B', or path of a folder with a config.json.
        what: name of the model, for the error message.

    Raises:
        InvalidArgumentError: If the text is neither a count nor a model folder, or if the
            configuration is not that of a causal language model.
    """
    folder = Path(text)
    if not folder.is_dir():
        if NUMBER.fullmatch(text.strip().upper().replace("_", "")) is None:
            raise InvalidArgumentError(
                f"{what} is {text!r}, which is neither a folder nor a number; give a count of "
                "parameters (8B) or a local folder with a config.json"
            )
        count = quantity(text, what)
        return ModelSize(count, shape_of(count))
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"{what}: {folder} has no config.json; give a model's folder, or a count such as 8B"
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            f"{what}: {folder}/config.json is not the configuration of a causal language model "
            f"of transformers ({error}); give a count such as 8B"
        ) from error
    count = float(sum(p.numel() for p in model.parameters()))
    text_config = config.get_text_config()
    dimensions = [_number(text_config, name) for name in ("hidden_size", "num_hidden_layers")]
    dimensions.append(_active_intermediate(text_config))
    if not all(dimensions):  # the architecture names its dimensions differently
        return ModelSize(count, shape_of(count))
    return ModelSize(count, Shape(folder.resolve().name, count, *dimensions))


def _number(config: object, name: str) -> int:
    """Return a number of a configuration; 0 if it is missing, or a list with a value per layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _active_intermediate(config: object) -> int:
    """Return the intermediate size of the largest MLP, summed over active experts; 0 if unknown."""

    def first(*names: str) -> int:
        return next((value for name in names if (value := _number(config, name))), 0)

    dense = _number(config, "intermediate_size")
    expert = _number(config, "moe_intermediate_size") or dense
    experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    active = first("num_experts_per_tok", "top_k_experts")
    shared = first("shared_expert_intermediate_size", "shared_intermediate_size")
    shared_experts = first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    shared = shared or shared_experts * expert
    if mlp := _number(config, "intermediate_size_mlp"):  # Llama 4, with experts of the other size
        # its layers of experts have a shared one, and transformers runs all experts on all tokens
        return max(mlp, (experts + 1) * dense)
    if getattr(config, "enable_moe_block", False):  # Gemma 4, whose experts run beside the MLP
        shared = dense
    if experts > 1 and not active:
        return 0
    return max(dense, active * expert + shared)
