"""Create tiny random models of many architectures, for comparisons with their own forward."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

VOCABULARY = 96
POSITIONS = 64

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    name: {"vocab_size": VOCABULARY, **fields}
    for name, fields in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
    if name != "_shared"
}
"""Fields of the configuration of a tiny model and its `class`, by name of the architecture."""


def tiny_config(architecture: str) -> Any:
    """Return the configuration of a key of `CONFIGURATIONS`."""
    fields = deepcopy(CONFIGURATIONS[architecture])
    return getattr(transformers, fields.pop("class"))(**fields)


def tiny_model(architecture: str, *, sharpness: float = 4.0) -> nn.Module:
    """Return a random model, in eval mode, whose layers matter to its logits.

    Args:
        architecture: a key of `CONFIGURATIONS`.
        sharpness: factor on weight matrices, because initial weights are so small that the states
            of a tiny model hardly depend on the previous tokens.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name and "conv" not in name:
                parameter.mul_(sharpness)
    return model
