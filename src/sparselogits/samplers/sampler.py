"""Define the interface of a sampler, and the facts that a sampler's class states about itself.

The codec, the recipes, the command line, budgets, tables and plots read these facts, so a new
sampler is one class (docs/extending.md). The files of the samplers in this package import torch
where they draw, because `sparselogits cache --help` lists their fields without loading it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sparselogits.errors import InvalidArgumentError
from sparselogits.untrusted import shown

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.targets import SparseTargets

COUNTS, COUNTS_AND_FLOATS, FLOATS, THRESHOLD = "counts", "counts+float32", "float32", "threshold"
ROUNDING = 1e-3
"""Relative error of a sum of float32 numbers."""


@dataclass(frozen=True)
class Stored:
    """State what a cache stores of the weights of a sampler's entries.

    Make one with `counts`, `counts_and_floats`, `shared_weight` or `floats`.

    Args:
        weights: name of the kind of weights, as in the codec's part of a cache's identity.
        rounds: rounds per position, where entries carry counts.
        tau: the weight that many entries share and that is stored once; None otherwise.
    """

    weights: Literal["counts", "counts+float32", "float32", "threshold"]
    rounds: int | None = None
    tau: float | None = None

    @classmethod
    def counts(cls, rounds: int) -> Stored:
        """Store counts only: every weight is count / rounds."""
        return cls("counts", rounds=rounds)

    @classmethod
    def counts_and_floats(cls, rounds: int) -> Stored:
        """Store counts, which thinning needs, and float32 weights."""
        return cls("counts+float32", rounds=rounds)

    @classmethod
    def shared_weight(cls, tau: float) -> Stored:
        """Store float32 weights, except those that are exactly tau."""
        return cls("threshold", tau=tau)

    @classmethod
    def floats(cls) -> Stored:
        """Store a float32 weight per entry."""
        return cls("float32")


@dataclass(frozen=True)
class Parameter:
    """Describe a declared field of a sampler.

    Args:
        kind: int, float or str.
        default: default value; `dataclasses.MISSING` for a field that must be given.
        help: help text, a phrase without a full stop.
        least: smallest value, included.
        above: smallest value, excluded.
        most: largest value, included.
        choices: the allowed words; empty if any value in the range is allowed.
        label: format string for the value in titles; "" omits the value.
        is_size: whether the field determines the number of entries, like the budget parameter.
        required: whether recipes and the command line must give the field.
    """

    kind: type[int] | type[float] | type[str]
    default: Any
    help: str
    least: float = -sys.float_info.max
    above: float = -math.inf
    most: float = sys.float_info.max
    choices: tuple[str, ...] = ()
    label: str | None = None
    is_size: bool = False
    required: bool = False

    def converted(self, name: str, value: Any) -> Any:
        """Return the value in this parameter's type: 1 as 1.0 where the type is float.

        Raises:
            InvalidArgumentError: another type, or a value outside the range.
        """
        if value is None and self.default is None:
            return None
        kinds: tuple[type, ...] = (int, float) if self.kind is float else (self.kind,)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if fits and self.choices:
            fits = value in self.choices
        elif fits and self.kind is not str:
            fits = self.least <= value <= self.most and value > self.above
        if not fits:
            raise InvalidArgumentError(f"{name} is {shown(value)}; expected {self.expected()}")
        return self.kind(value)

    def expected(self) -> str:
        """Return the allowed values in words."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind is str:
            return "a text"
        number = "a whole number" if self.kind is int else "a number"
        high = f"{self.most:,}" if self.most < sys.float_info.max else ""
        if self.above > -math.inf:
            return f"{number} above {self.above:g}" + (f", at most {high}" if high else "")
        if self.least == -sys.float_info.max:
            return number
        return (
            f"{number} from {self.least:g} to {high}"
            if high
            else f"{number} of at least {self.least:g}"
        )

    def in_title(self, name: str, value: Any) -> str:
        """Return the value as a title shows it."""
        if self.label is not None:
            return self.label.format(value)
        text = value if isinstance(value, str) else f"{value:g}"
        return f", {name.replace('_', ' ')} {text}"


def parameter(
    default: Any,
    help: str,  # noqa: A002
    *,
    kind: type[int] | type[float] | type[str] | None = None,
    **facts: Any,
) -> Any:
    """Declare a field of a sampler; use this instead of `dataclasses.field`.

    Args:
        default: see `Parameter`.
        help: see `Parameter`.
        kind: type of the value; None for the type of the default.
        facts: further arguments of `Parameter`.

    Examples:
        >>> from dataclasses import dataclass
        >>> from sparselogits.samplers.sampler import declared_by
        >>> @dataclass(frozen=True)
        ... class Declared:
        ...     k: int = parameter(12, "Entries per token", least=1)
        >>> declared_by(Declared)["k"].expected()
        'a whole number of at least 1'
    """
    declared = Parameter(kind or type(default), default, help, **facts)
    return dataclasses.field(default=default, metadata={"parameter": declared})


def declared_by(cls: Any) -> dict[str, Parameter]:
    """Return the parameters that a dataclass declares, by name, in order."""
    return {
        field.name: field.metadata["parameter"]
        for field in dataclasses.fields(cls)
        if "parameter" in field.metadata
    }


def require_declared(value: Any) -> None:
    """Validate the fields of a dataclass against their declarations.

    Raises:
        InvalidArgumentError: a value has another type or is outside its range.
    """
    for name, declared in declared_by(value).items():
        declared.converted(name, getattr(value, name))


class Sampler(ABC):
    """Map a teacher's logits and uniforms to sparse targets, deterministically.

    A subclass is a frozen dataclass whose fields are declared with `parameter`. A value of another
    type or outside its range raises InvalidArgumentError.

    Attributes:
        name: word that selects the sampler, recorded in a cache's identity.
        title: name in tables and plots.
        unbiased: whether the expectation of the targets over the uniforms is the teacher's
            distribution. Missing-mass rules of the loss apply only to biased samplers.
        uniforms_per_position: columns U of the uniforms; 0 if the sampler is not random.
        budget_parameter: name of the field that a budget (mean entries per position) sets; None
            if no single field determines the number of entries.
        needs_size: whether a recipe must give a budget or the budget parameter; the default of the
            parameter is for Python only.
        largest_size: largest argument of `of_size` in the search for a budget.
        on_command_line: whether `sparselogits cache` offers it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unbiased: ClassVar[bool]
    budget_parameter: ClassVar[str | None] = None
    needs_size: ClassVar[bool] = False
    largest_size: ClassVar[int] = 2**16
    on_command_line: ClassVar[bool] = True

    @property
    @abstractmethod
    def uniforms_per_position(self) -> int:
        """Return the number of columns of the uniforms; a constant may be a class attribute."""

    @property
    @abstractmethod
    def stores(self) -> Stored:
        """Return how a cache stores the weights."""

    @abstractmethod
    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample a few positions, whose shapes and uniforms `__call__` has validated.

        Args:
            logits: float [R, V] of any floating dtype; ids that are no token hold -inf.
            uniforms: float64 [R, uniforms_per_position] in [0, 1), on the device of the logits.
            first_position: position of the first row, for error messages.

        Raises:
            InvalidLogitsError: NaN, +inf, or a row of -inf only.
        """

    def __post_init__(self) -> None:
        require_declared(self)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Sample sparse targets from the distributions of some positions.

        Args:
            logits: float [P, V] of any floating dtype; ids that are no token hold -inf.
            uniforms: float64 [P, uniforms_per_position] in [0, 1).

        Raises:
            InvalidLogitsError: NaN, +inf, a row of -inf only, or shapes that do not fit.
        """
        from sparselogits.samplers.distribution import position_slices
        from sparselogits.targets import SparseTargets

        uniforms = uniforms.to(logits.device).double()
        return SparseTargets.cat(
            [
                self.draw(logits[part], uniforms[part], part.start)
                for part in position_slices(logits, uniforms, self.uniforms_per_position)
            ]
        )

    @property
    def rounds(self) -> int | None:
        """Return the rounds per position; None if there are no rounds of equal weight."""
        return self.stores.rounds

    @property
    def is_random(self) -> bool:
        """Return whether draws with different seeds differ."""
        return self.uniforms_per_position > 0

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Self:
        """Return the sampler for some positions of one window.

        Args:
            tokens: int64 [L], the window's tokens.
            positions: positions whose logits will be passed: a slice, or int64 indices.

        Returns:
            The sampler itself; for one that follows a student, a sampler that has read the window.
        """
        return self

    def ready(self) -> Self:
        """Return the sampler ready to draw.

        Returns:
            The sampler itself; for one that names a student, a sampler with the student loaded.
        """
        return self

    @classmethod
    def declared(cls) -> dict[str, Parameter]:
        """Return the fields that recipes and the command line give, by name."""
        return declared_by(cls)

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Return the names of the fields that govern the number of entries."""
        return tuple(
            n for n, own in cls.declared().items() if own.is_size or n == cls.budget_parameter
        )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Make a sampler from values of its declared fields.

        Args:
            given: values by name, as `parameters` returns them; absent fields get their defaults.
        """
        return cls(**given)

    def parameters(self) -> dict[str, Any]:
        """Return the JSON values from which `of` makes the sampler again.

        A cache's identity records them, with the name.
        """
        return {name: getattr(self, name) for name in self.declared()}

    def most_mass(self, vocab_size: int) -> float:
        """Return the largest sum of a position's weights, which readers of a cache enforce."""
        return float(vocab_size) ** 4

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the mean entries per position on pilot windows.

        They are measured by drawing; a sampler with a formula overrides this.
        """
        return pilot.drawn_entries(self)

    def of_size(self, size: int) -> Self:
        """Return the sampler with its budget parameter set; entries grow with the size."""
        assert self.budget_parameter is not None
        return dataclasses.replace(self, **{self.budget_parameter: size})  # type: ignore[type-var]

    def left_open(self, budget: float | None) -> tuple[str, ...]:
        """Return the names of the fields that `fitted` sets.

        Raises:
            InvalidArgumentError: there is a budget, and the sampler has no budget parameter.
        """
        if budget is None:
            return ()
        if self.budget_parameter is None:
            raise InvalidArgumentError(
                f"sampler {self.name!r} cannot be fitted to a budget of {budget:g} entries; give "
                f"its own parameters: {', '.join(self.declared())}"
            )
        return (self.budget_parameter,)

    def fitted(self, pilot: Pilot, budget: float | None) -> Self:
        """Return the sampler with its open fields (see `left_open`) set on pilot windows.

        Args:
            pilot: the pilot windows.
            budget: mean entries per position; None for no budget.

        Raises:
            InvalidArgumentError: the budget cannot be met, or there are no pilot positions.
        """
        from sparselogits.samplers.budget import size_for_budget

        return self.of_size(size_for_budget(self, pilot, budget)) if budget is not None else self
