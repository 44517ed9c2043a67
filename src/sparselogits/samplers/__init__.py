"""Samplers: a teacher's distribution -> `SparseTargets`, one file a family.

`Systematic` is the default, `Multinomial` the published method, `Threshold` and `Adaptive` are
unbiased alternatives, `TopK` and `TopP` the biased ones. docs/theory.md has the derivations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.adaptive import Adaptive
from sparselogits.samplers.budget import budget_parameter, fit_budget
from sparselogits.samplers.figures import Figures, draw_with_figures
from sparselogits.samplers.heads import TopK, TopP
from sparselogits.samplers.protocol import Sampler
from sparselogits.samplers.rounds import Multinomial, Systematic, Uniform
from sparselogits.samplers.threshold import Threshold
from sparselogits.samplers.uniforms import thinning_starts, window_uniforms

_BY_NAME: dict[str, Callable[..., Sampler]] = {
    kind.name: kind for kind in (Systematic, Multinomial, Uniform, TopK, TopP, Threshold, Adaptive)
}

SAMPLERS = tuple(_BY_NAME)
"""The names `from_parameters` knows."""


def from_parameters(identity: Mapping[str, Any]) -> Sampler:
    """Rebuild a sampler from what a cache's identity says of it.

    Args:
        identity: {"name": sampler.name, **sampler.parameters()}.

    Raises:
        InvalidArgumentError: for an unknown name, or parameters that sampler does not take.
    """
    parameters = dict(identity)
    name = parameters.pop("name", None)
    if name not in _BY_NAME:
        raise InvalidArgumentError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    try:
        return _BY_NAME[name](**parameters)
    except TypeError as error:
        raise InvalidArgumentError(f"sampler {name!r}: {error}") from error


__all__ = [
    "SAMPLERS",
    "Adaptive",
    "Figures",
    "Multinomial",
    "Sampler",
    "Systematic",
    "Threshold",
    "TopK",
    "TopP",
    "Uniform",
    "budget_parameter",
    "draw_with_figures",
    "fit_budget",
    "from_parameters",
    "thinning_starts",
    "window_uniforms",
]
