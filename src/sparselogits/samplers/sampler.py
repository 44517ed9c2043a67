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
        weights: the name of the weights in the codec's part of a cache's identity.
        rounds: rounds per position, where entries carry counts.
        tau: the weight that is not written out, where many entries share one.
    """

    weights: Literal["counts", "counts+float32", "float32", "threshold"]
    rounds: int | None = None
    tau: float | None = None

    @classmethod
    def counts(cls, rounds: int) -> Stored:
        """Store counts alone: every weight is count / rounds."""
        return cls("counts", rounds=rounds)

    @classmethod
    def counts_and_floats(cls, rounds: int) -> Stored:
        """Store counts, on which thinning works, and float32 weights."""
        return cls("counts+float32", rounds=rounds)

    @classmethod
    def shared_weight(cls, tau: float) -> Stored:
        """Store float32 weights, except for the entries that weigh exactly tau."""
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
        default: its value when it is not given; `dataclasses.MISSING` where it has to be.
        help: what it is, as a phrase without a full stop.
        least: smallest value, included.
        above: smallest value, excluded.
        most: largest value, included.
        choices: the allowed words; empty where there is no list.
        label: how a title shows the value, as a format string; "" leaves it out.
        is_size: whether it governs the number of entries, as the budget parameter does.
        required: whether recipes and the command line have to give it.
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
        """Return what a title says of the value."""
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
    """Declare a field of a sampler, in the place of `dataclasses.field`.

    Args:
        default: see `Parameter`.
        help: see `Parameter`.
        kind: type of the value; that of the default when None.
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
    """Check the fields of a dataclass against what it declares.

    Raises:
        InvalidArgumentError: a value of another type or outside its range.
    """
    for name, declared in declared_by(value).items():
        declared.converted(name, getattr(value, name))


class Sampler(ABC):
    """Map a teacher's logits and uniforms to sparse targets, deterministically.

    A subclass is a frozen dataclass whose fields are declared with `parameter`. A value of another
    type or outside its range raises InvalidArgumentError.

    Attributes:
        name: the word that selects the sampler and stands in a cache's identity.
        title: its name in tables and plots.
        unbiased: whether the expectation of the targets over the uniforms is the teacher's
            distribution. Missing-mass rules of the loss are for samplers where it is not.
        uniforms_per_position: columns U of the uniforms; 0 where nothing is random.
        budget_parameter: name of the field that a budget (mean entries per position) sets; None
            where no single field governs the number of entries.
        needs_size: whether a recipe has to give a budget or the budget parameter, whose default is
            for use in Python.
        largest_size: largest argument of `of_size` that a budget is searched up to.
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
        """Columns of the uniforms; a class attribute where it is a constant."""

    @property
    @abstractmethod
    def stores(self) -> Stored:
        """What a cache stores of the weights."""

    @abstractmethod
    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample a few positions; `__call__` has checked shapes and uniforms.

        Args:
            logits: float [R, V] of any floating dtype; ids that are no token hold -inf.
            uniforms: float64 [R, uniforms_per_position] in [0, 1), on the device of the logits.
            first_position: what to add to a row in error messages.

        Raises:
            InvalidLogitsError: NaN, +inf, or a row of -inf only.
        """

    def __post_init__(self) -> None:
        require_declared(self)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Sample.

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
        """Rounds per position, or None where entries are not drawn in rounds of equal weight."""
        return self.stores.rounds

    @property
    def is_random(self) -> bool:
        """Whether two draws with different seeds differ."""
        return self.uniforms_per_position > 0

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Self:
        """Return the sampler for some positions of one window.

        Args:
            tokens: int64 [L], the window's tokens.
            positions: those whose logits come next: a run, or int64 indices where some are masked.

        Returns:
            The sampler itself, unless it follows a student, which has to read the window.
        """
        return self

    def ready(self) -> Self:
        """Return the sampler with all that drawing needs.

        Returns:
            The sampler itself, unless it follows a student that has been named and not loaded.
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
            given: by name, as `parameters` returns them. What is absent has its default.
        """
        return cls(**given)

    def parameters(self) -> dict[str, Any]:
        """Return the JSON values from which `of` makes the sampler again.

        They stand in a cache's identity, with the name.
        """
        return {name: getattr(self, name) for name in self.declared()}

    def most_mass(self, vocab_size: int) -> float:
        """Return the largest sum of a position's weights, which readers of a cache enforce."""
        return float(vocab_size) ** 4

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the mean entries per position on pilot windows.

        They are measured by drawing. A sampler that knows a formula overrides this.
        """
        return pilot.drawn_entries(self)

    def of_size(self, size: int) -> Self:
        """Return the sampler with its budget parameter set; entries grow with the size."""
        assert self.budget_parameter is not None
        return dataclasses.replace(self, **{self.budget_parameter: size})  # type: ignore[type-var]

    def left_open(self, budget: float | None) -> tuple[str, ...]:
        """Return the names of the fields that `fitted` sets.

        Raises:
            InvalidArgumentError: a budget for a sampler without a budget parameter.
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
        """Return the sampler with the fields that are left open set on pilot windows.

        Args:
            pilot: the pilot windows.
            budget: mean entries per position; None where there is none to meet.

        Raises:
            InvalidArgumentError: a budget out of reach, or no pilot positions.
        """
        from sparselogits.samplers.budget import size_for_budget

        return self.of_size(size_for_budget(self, pilot, budget)) if budget is not None else self
