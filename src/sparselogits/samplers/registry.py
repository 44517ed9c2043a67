"""Know samplers by name: those of this package, and those that other packages declare.

Another package declares a sampler by an entry point, in its pyproject.toml:

    [project.entry-points."sparselogits.samplers"]
    likeliest = "my_package:Likeliest"

An entry point is there in every process that opens a cache (commands, ranks, Ray and DataLoader
workers). A call that registers a class would have to be made in each of them. A cache is
untrusted input: the name in it selects among installed samplers and is never imported.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sparselogits.entry_points import load_declared
from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.adaptive import Adaptive
from sparselogits.samplers.heads import TopK, TopP
from sparselogits.samplers.rounds import Multinomial, Systematic, Uniform
from sparselogits.samplers.sampler import Sampler
from sparselogits.samplers.threshold import Threshold
from sparselogits.untrusted import shown

GROUP = "sparselogits.samplers"
_OWN: dict[str, type[Sampler]] = {
    kind.name: kind for kind in (Systematic, Multinomial, Uniform, TopK, TopP, Threshold, Adaptive)
}


def samplers() -> dict[str, type[Sampler]]:
    """Return the class of each known sampler by name."""
    return _OWN | _of_packages()


def find_sampler(name: object) -> type[Sampler] | None:
    """Return the class of a sampler; None for an unknown name."""
    if not isinstance(name, str):
        return None
    return _OWN.get(name) or _of_packages().get(name)


@cache
def _of_packages() -> dict[str, type[Sampler]]:
    return {kind.name: kind for kind in load_declared(GROUP, "sampler", _checked)}


def _checked(name: str, kind: object) -> type[Sampler]:
    """Return the class that an entry point names, if it states all facts of a sampler.

    Raises:
        InvalidArgumentError: no sampler, or one that does not state a fact.
    """
    if not (isinstance(kind, type) and issubclass(kind, Sampler)):
        raise InvalidArgumentError(f"{kind!r} is no subclass of sparselogits.samplers.Sampler")
    missing = [f for f in ("name", "title", "unbiased") if not hasattr(kind, f)]
    missing += sorted(kind.__abstractmethods__) if inspect.isabstract(kind) else []
    if missing:
        raise InvalidArgumentError(f"the class {kind.__name__} does not define {missing[0]}")
    if kind.name != name or kind.name in _OWN:
        raise InvalidArgumentError(
            f"the class {kind.__name__} has the name {kind.name!r}; expected that of the entry "
            f"point, {name!r}, and none of {', '.join(_OWN)}"
        )
    if kind.budget_parameter is not None and kind.budget_parameter not in kind.declared():
        raise InvalidArgumentError(
            f"the budget parameter {kind.budget_parameter!r} of {kind.__name__} is not declared "
            "with `parameter`"
        )
    _require_field_names(kind)
    return kind


def _require_field_names(kind: type[Sampler]) -> None:
    """Check that recipes and the command line can tell a sampler's fields from other words."""
    kinds = {name: own.kind for known in _OWN.values() for name, own in known.declared().items()}
    for name, declared in kind.declared().items():
        if name in ("name", "budget") or kinds.get(name, declared.kind) is not declared.kind:
            raise InvalidArgumentError(
                f"the field {name!r} of {kind.__name__} has a name that is used for something "
                "else; choose another name"
            )


def known_sampler(name: object) -> type[Sampler]:
    """Return the class of a sampler.

    Raises:
        InvalidArgumentError: an unknown name, with the known ones.
    """
    kind = find_sampler(name)
    if kind is None:
        raise InvalidArgumentError(
            f"unknown sampler {shown(name)}; available: {', '.join(samplers())}. If another "
            f"package has it, install that package (entry point group {GROUP!r})"
        )
    return kind


def from_parameters(identity: Mapping[str, Any]) -> Sampler:
    """Make a sampler from what a cache's identity records of it; no model is loaded.

    Args:
        identity: {"name": sampler.name, **sampler.parameters()}, and perhaps the budget that a
            parameter was fitted to.

    Raises:
        InvalidArgumentError: for an unknown name, or parameters that the sampler does not take.
    """
    parameters = {name: value for name, value in identity.items() if name != "budget"}
    kind = known_sampler(parameters.pop("name", None))
    try:
        return kind.of(parameters)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"sampler {kind.name!r}: {error}") from error


@dataclass(frozen=True)
class SamplerChoice:
    """Hold the name of a sampler with the fields that were given for it; made by `choose`.

    Args:
        kind: class of the sampler.
        given: values of declared fields, in their types and order. What is absent has its default,
            or is set by a budget.
    """

    kind: type[Sampler]
    given: Mapping[str, Any]

    def parameters(self) -> dict[str, Any]:
        """Return the name and the given fields."""
        return {"name": self.kind.name, **self.given}

    def sampler(self) -> Sampler:
        """Make the sampler. Raises InvalidArgumentError."""
        return from_parameters(self.parameters())

    def title(self, budget: float | None) -> str:
        """Return the sampler's title for tables, with the budget and the fields that are set."""
        title = self.kind.title + ("" if budget is None else f" {budget:g}")
        declared = self.kind.declared()
        return title + "".join(declared[n].in_title(n, v) for n, v in self.given.items())


def choose(name: object, given: Mapping[str, Any], *, known: Iterable[str] = ()) -> SamplerChoice:
    """Check the fields that a user gives a sampler.

    Args:
        name: name of the sampler.
        given: values by field; None stands for one that is not given.
        known: further words that may have been meant by an unknown field.

    Raises:
        InvalidArgumentError: an unknown sampler or field, with the nearest known; a value of
            another type or out of range; a required field that is not given.
    """
    kind = known_sampler(name)
    declared = kind.declared()
    for field in given:
        if field not in declared:
            near = difflib.get_close_matches(str(field), [*declared, *known], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(declared)}"
            raise InvalidArgumentError(f"sampler {kind.name!r} has no field {shown(field)}; {hint}")
    for field, own in declared.items():
        if own.required and given.get(field) is None:
            raise InvalidArgumentError(
                f"sampler {kind.name!r} needs a value of {field}: {own.help.lower()}"
            )
    values = {n: p.converted(n, given[n]) for n, p in declared.items() if given.get(n) is not None}
    return SamplerChoice(kind, values)
