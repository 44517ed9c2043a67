"""Look up samplers by name, both built-in ones and those of other packages.

Another package declares a sampler by an entry point in its pyproject.toml:

    [project.entry-points."sparselogits.samplers"]
    likeliest = "my_package:Likeliest"

A cache is untrusted input: the name in a cache selects among installed samplers and is never
imported.
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
"""Entry point group of samplers."""

_BUILT_IN: dict[str, type[Sampler]] = {
    kind.name: kind for kind in (Systematic, Multinomial, Uniform, TopK, TopP, Threshold, Adaptive)
}


def samplers() -> dict[str, type[Sampler]]:
    """Return the built-in sampler classes and the valid ones of other packages by name."""
    return _BUILT_IN | _from_packages()


def find_sampler(name: object) -> type[Sampler] | None:
    """Return the sampler class with the given name; None if the name is unknown."""
    if not isinstance(name, str):
        return None
    return _BUILT_IN.get(name) or _from_packages().get(name)


@cache
def _from_packages() -> dict[str, type[Sampler]]:
    """Return the valid sampler classes of other packages by name; warn about the others."""
    return {kind.name: kind for kind in load_declared(GROUP, "sampler", _checked)}


def _checked(name: str, kind: object) -> type[Sampler]:
    """Validate that an entry point's object is a usable sampler class, and return it."""
    if not (isinstance(kind, type) and issubclass(kind, Sampler)):
        raise InvalidArgumentError(
            f"found {kind!r}, expected a subclass of sparselogits.samplers.Sampler"
        )
    missing = [f for f in ("name", "title", "unbiased") if not hasattr(kind, f)]
    missing += sorted(kind.__abstractmethods__) if inspect.isabstract(kind) else []
    if missing:
        raise InvalidArgumentError(
            f"the class {kind.__name__} does not define {missing[0]}; define it"
        )
    if kind.name != name or kind.name in _BUILT_IN:
        raise InvalidArgumentError(
            f"the class {kind.__name__} has the name {kind.name!r}; expected the name of the entry "
            f"point, {name!r}, and none of {', '.join(_BUILT_IN)}"
        )
    if kind.budget_parameter is not None and kind.budget_parameter not in kind.declared():
        raise InvalidArgumentError(
            f"the budget parameter {kind.budget_parameter!r} of {kind.__name__} is not a field "
            "declared with `parameter`; declare it"
        )
    kinds = {  # fields are keys of recipes and options of `cache`, so their names must not conflict
        name: parameter.kind
        for known in _BUILT_IN.values()
        for name, parameter in known.declared().items()
    }
    for name, declared in kind.declared().items():
        if name in ("name", "budget") or kinds.get(name, declared.kind) is not declared.kind:
            raise InvalidArgumentError(
                f"the field {name!r} of {kind.__name__} has the name of another option; choose "
                "another name"
            )
    return kind


def known_sampler(name: object) -> type[Sampler]:
    """Return the sampler class with the given name. Raises InvalidArgumentError if unknown."""
    kind = find_sampler(name)
    if kind is None:
        raise InvalidArgumentError(
            f"unknown sampler {shown(name)}; available: {', '.join(samplers())}. If another "
            f"package defines this sampler, install that package (entry point group {GROUP!r})"
        )
    return kind


def from_parameters(identity: Mapping[str, Any]) -> Sampler:
    """Create a sampler from the `sampler` field of a cache's identity; no model is loaded.

    Args:
        identity: {"name": sampler.name, **sampler.parameters()}; a "budget" is ignored.

    Raises:
        InvalidArgumentError: the name or a parameter is unknown, or a value is not allowed.

    Examples:
        >>> from_parameters({"name": "topk", "k": 12})
        TopK(k=12)
    """
    parameters = {name: value for name, value in identity.items() if name != "budget"}
    kind = known_sampler(parameters.pop("name", None))
    try:
        return kind.of(parameters)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"sampler {kind.name!r}: {error}") from error


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler class with values for some of its fields; created by `choose`.

    Args:
        kind: class of the sampler.
        given: converted values by field, in the order of declaration. Absent fields have their
            defaults, or are set by a budget.
    """

    kind: type[Sampler]
    given: Mapping[str, Any]

    def parameters(self) -> dict[str, Any]:
        """Return the name of the sampler and the given fields."""
        return {"name": self.kind.name, **self.given}

    def sampler(self) -> Sampler:
        """Create the sampler.

        Raises:
            InvalidArgumentError: the values do not fit each other.
        """
        return from_parameters(self.parameters())

    def title(self, budget: float | None) -> str:
        """Return the sampler's title for tables, with the budget and the given fields.

        Args:
            budget: mean entries per position; None for no budget.
        """
        title = self.kind.title + ("" if budget is None else f" {budget:g}")
        declared = self.kind.declared()
        return title + "".join(declared[n].in_title(n, v) for n, v in self.given.items())


def choose(name: object, given: Mapping[str, Any], *, known: Iterable[str] = ()) -> SamplerChoice:
    """Validate a user's choice of a sampler by name and fields.

    Args:
        name: name of the sampler.
        given: values by field; None for a field that is not given.
        known: other names to suggest if a field is unknown.

    Raises:
        InvalidArgumentError: the sampler or a field is unknown, a value has another type or is out
            of range, or a required field is not given.

    Examples:
        >>> choose("topk", {"k": 12}).title(None)
        'Top-K 12'
    """
    kind = known_sampler(name)
    declared = kind.declared()
    for field in given:
        if field not in declared:
            near = difflib.get_close_matches(str(field), [*declared, *known], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"available: {', '.join(declared)}"
            raise InvalidArgumentError(f"sampler {kind.name!r} has no field {shown(field)}; {hint}")
    for field, parameter in declared.items():
        if parameter.required and given.get(field) is None:
            raise InvalidArgumentError(
                f"sampler {kind.name!r} requires a value for {field} ({parameter.help.lower()}), "
                "but none is given; give one"
            )
    values = {n: p.converted(n, given[n]) for n, p in declared.items() if given.get(n) is not None}
    return SamplerChoice(kind, values)
