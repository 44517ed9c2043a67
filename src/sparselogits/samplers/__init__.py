"""Sample a teacher's distribution into `SparseTargets`, with one module per family of samplers.

`Systematic` is the default, and `Multinomial` is the published method (RS-KD). `Threshold`,
`Adaptive` and `Uniform` are unbiased alternatives; `TopK` and `TopP` are biased. docs/theory.md
derives the estimators.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparselogits.samplers.adaptive import Adaptive, NamedSignal
from sparselogits.samplers.heads import TopK, TopP
from sparselogits.samplers.registry import (
    SamplerChoice,
    choose,
    find_sampler,
    from_parameters,
    samplers,
)
from sparselogits.samplers.rounds import Multinomial, Systematic, Uniform
from sparselogits.samplers.sampler import Parameter, Sampler, Stored, parameter
from sparselogits.samplers.threshold import Threshold

if TYPE_CHECKING:
    from sparselogits.samplers.budget import Pilot, PilotSlice, fit_budget
    from sparselogits.samplers.signal import StudentSignal
    from sparselogits.samplers.statistics import DistributionStatistics, draw_with_statistics
    from sparselogits.samplers.uniforms import thinning_starts, window_uniforms

# Modules of the names that are imported on first use, because these modules import torch.
_LAZY = {
    **dict.fromkeys(("Pilot", "PilotSlice", "fit_budget"), "budget"),
    **dict.fromkeys(("DistributionStatistics", "draw_with_statistics"), "statistics"),
    "StudentSignal": "signal",
    **dict.fromkeys(("thinning_starts", "window_uniforms"), "uniforms"),
}

__all__ = [
    "Adaptive",
    "DistributionStatistics",
    "Multinomial",
    "NamedSignal",
    "Parameter",
    "Pilot",
    "PilotSlice",
    "Sampler",
    "SamplerChoice",
    "Stored",
    "StudentSignal",
    "Systematic",
    "Threshold",
    "TopK",
    "TopP",
    "Uniform",
    "choose",
    "draw_with_statistics",
    "find_sampler",
    "fit_budget",
    "from_parameters",
    "parameter",
    "samplers",
    "thinning_starts",
    "window_uniforms",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
