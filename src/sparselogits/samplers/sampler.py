"""Define the interface of a sampler, and the metadata that each sampler class declares.

The codec, recipes, the command line, budgets, tables and plots read this metadata, so a new sampler
needs only its class and a registration (docs/extending.md). The built-in samplers import torch
inside their methods, because `sparselogits cache --help` lists their fields without loading torch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sparselogits.errors import InvalidArgumentError, python_number
from sparselogits.untrusted import shown

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.targets import SparseTargets

COUNTS, COUNTS_AND_FLOATS, FLOATS, THRESHOLD = "counts", "counts+float32", "float32", "threshold"
"""Kinds of stored weights; see the constructors of `Stored`."""

ROUNDING = 1e-3
"""Tolerance for sums of weights and for means, because float32 numbers are rounded."""


@dataclass(frozen=True)
class Stored:
    """Form in which a cache stores the weights of a sampler's entries.

    Create an instance with `counts`, `counts_and_floats`, `shared_weight` or `floats`. By default,
    a cache rounds float32 weights to levels; see `store.codec_for`.

    Args:
        weights: kind of the weights, as in the `codec` field of a cache's identity.
        rounds: number of rounds per position; None if entries have no counts.
        tau: weight that many entries share and that is stored only once; None if no weight is
            shared.
    """

    weights: Literal["counts", "counts+float32", "float32", "threshold"]
    rounds: int | None = None
    tau: float | None = None

    @classmethod
    def counts(cls, rounds: int) -> Stored:
        """Return the form for counts only, where every weight is count / rounds."""
        return cls("counts", rounds=rounds)

    @classmethod
    def counts_and_floats(cls, rounds: int) -> Stored:
        """Return the form for float32 weights and counts; counts are stored for thinning."""
        return cls("counts+float32", rounds=rounds)

    @classmethod
    def shared_weight(cls, tau: float) -> Stored:
        """Return the form for float32 weights in which weights equal to tau are omitted."""
        return cls("threshold", tau=tau)

    @classmethod
    def floats(cls) -> Stored:
        """Return the form for one float32 weight per entry."""
        return cls("float32")


@dataclass(frozen=True)
class Parameter:
    """Declaration of a sampler's field: its type, range, help text and label.

    Args:
        kind: type of the value: int, float or str.
        default: default value.
        help: help text of the command-line option, a phrase without a full stop.
        least: smallest allowed value, inclusive.
        above: exclusive lower bound.
        most: largest allowed value, inclusive.
        choices: allowed strings; empty if strings are not restricted.
        label: format string for the value in titles; "" omits the value, None formats the field's
            name and the value.
        is_size: whether the field governs the number of entries, like the budget parameter.
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
        """Validate a value and convert it to this parameter's type, such as 1 to 1.0.

        None is valid if it is the default.

        Raises:
            InvalidArgumentError: the value has another type or is not allowed.
        """
        if value is None and self.default is None:
            return None
        # numbers.Integral and Real include the numbers of NumPy
        fits = isinstance(value, {int: Integral, float: Real, str: str}[self.kind])
        fits = fits and not isinstance(value, bool)
        if fits and self.choices:
            fits = value in self.choices
        elif fits and self.kind is not str:
            fits = self.least <= value <= self.most and value > self.above
        if not fits:
            raise InvalidArgumentError(f"{name} is {shown(value)}; expected {self.expected()}")
        return self.kind(value)

    def expected(self) -> str:
        """Return a phrase that describes the allowed values."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind is str:
            return "a string"
        number = "a whole number" if self.kind is int else "a number"
        low = f" of at least {self.least:g}" if self.least > -sys.float_info.max else ""
        low = f" above {self.above:g}" if self.above > -math.inf else low
        return number + low + (f", at most {self.most:,}" if self.most < sys.float_info.max else "")

    def in_title(self, name: str, value: Any) -> str:
        """Return the value of the field called `name`, formatted for a sampler's title."""
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
    """Declare a field of a sampler, in place of `dataclasses.field`.

    Args:
        default: default value.
        help: help text of the command-line option, a phrase without a full stop.
        kind: type of the value; None for the type of the default.
        facts: other arguments of `Parameter`.

    Examples:
        >>> from dataclasses import dataclass
        >>> from sparselogits.samplers.sampler import declared_by
        >>> @dataclass(frozen=True)
        ... class Example:
        ...     k: int = parameter(12, "Entries per token", least=1)
        >>> declared_by(Example)["k"].expected()
        'a whole number of at least 1'
    """
    declared = Parameter(kind or type(default), default, help, **facts)
    return dataclasses.field(default=default, metadata={"parameter": declared})


def declared_by(cls: Any) -> dict[str, Parameter]:
    """Return the declarations of a dataclass's fields by name; other fields are omitted."""
    return {
        field.name: field.metadata["parameter"]
        for field in dataclasses.fields(cls)
        if "parameter" in field.metadata
    }


def require_declared(value: Any) -> None:
    """Validate the declared fields of a dataclass instance; numbers become Python's.

    Raises InvalidArgumentError.
    """
    for name, declared in declared_by(value).items():
        given = getattr(value, name)
        declared.converted(name, given)
        # 1 does not become 1.0, which would be another fingerprint for an existing identity
        object.__setattr__(value, name, python_number(given))


class Sampler(ABC):
    """Base class of samplers, which are deterministic functions of logits and uniforms.

    A subclass is a frozen dataclass whose constructor validates the fields that are declared with
    `parameter`. docs/extending.md has an example.

    Attributes:
        name: name of the sampler in options, recipes and cache identities.
        title: name of the sampler in tables and plots.
        unbiased: whether the expectation of the targets over the uniforms is the teacher's
            distribution. Of the missing-mass rules of the loss, only "drop" applies to an unbiased
            sampler.
        uniforms_per_position: number U of uniforms per position; 0 if the sampler is not random.
        budget_parameter: name of the field that a budget (mean entries per position) sets; None
            if no single field determines the number of entries.
        needs_size: whether a recipe must give a budget or the budget parameter. The default of that
            parameter is then used in Python only.
        largest_size: largest size that the search for a budget passes to `of_size`.
        on_command_line: whether `sparselogits cache --sampler` accepts the sampler.

    Raises:
        InvalidArgumentError: a field has another type or is out of range.
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
        """Number U of uniforms per position; a class attribute if it is constant."""

    @property
    @abstractmethod
    def stores(self) -> Stored:
        """Form in which a cache stores the weights."""

    @abstractmethod
    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample targets at a few positions; `__call__` has validated shapes and uniforms.

        Args:
            logits: [R, V] of any floating-point dtype; -inf for ids that are not tokens.
            uniforms: float64 [R, uniforms_per_position] in [0, 1), on the device of the logits.
            first_position: index of the first row in the logits passed to `__call__`, for error
                messages and for states that `at` prepared.

        Raises:
            InvalidLogitsError: a logit is NaN, or the largest logit of a position is beyond 2**24
                in magnitude.
        """

    def __post_init__(self) -> None:
        require_declared(self)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Sample sparse targets from the teacher's distributions at P positions.

        Args:
            logits: [P, V] of any floating-point dtype; -inf for ids that are not tokens. No
                gradient flows into the targets.
            uniforms: float64 [P, uniforms_per_position] in [0, 1); see `window_uniforms`.

        Returns:
            Targets of P positions, on the device of the logits.

        Raises:
            InvalidLogitsError: a logit is NaN; the largest logit of a position is beyond 2**24 in
                magnitude; or a shape, the dtype of the logits or a uniform is invalid.
        """
        from sparselogits.samplers.distribution import position_slices
        from sparselogits.targets import SparseTargets

        logits, uniforms = logits.detach(), uniforms.to(logits.device).double()
        return SparseTargets.cat(
            [
                self.draw(logits[part], uniforms[part], part.start)
                for part in position_slices(logits, uniforms, self.uniforms_per_position)
            ]
        )

    @property
    def rounds(self) -> int | None:
        """Number of rounds per position; None if no counts of rounds are stored."""
        return self.stores.rounds

    @property
    def is_random(self) -> bool:
        """Whether targets depend on the uniforms."""
        return self.uniforms_per_position > 0

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Self:
        """Return the sampler prepared for some positions of one window.

        Args:
            tokens: int64 [L], tokens of the window as the teacher reads them.
            positions: positions whose logits will be passed: a slice, or int64 indices.

        Returns:
            The sampler itself; a sampler that needs the hidden states of a student returns a copy
            with the states at these positions.
        """
        return self

    def ready(self) -> Self:
        """Return the sampler after loading everything that drawing requires.

        Returns:
            The sampler itself; a sampler that names a student returns a copy with it loaded.
        """
        return self

    @classmethod
    def declared(cls) -> dict[str, Parameter]:
        """Return the declarations of the fields by name, as used in recipes and options."""
        return declared_by(cls)

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Return the names of the fields that govern the number of entries."""
        return tuple(
            name
            for name, declared in cls.declared().items()
            if declared.is_size or name == cls.budget_parameter
        )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Create a sampler from the values of its declared fields.

        Args:
            given: values by name, as `parameters` returns them; absent fields have their defaults.

        Raises:
            InvalidArgumentError: a value has another type or is out of range.
            TypeError: a name is unknown.
        """
        return cls(**given)

    def parameters(self) -> dict[str, Any]:
        """Return the sampler's parameters as JSON values, for a cache's identity and for `of`."""
        return {name: getattr(self, name) for name in self.declared()}

    def most_mass(self, vocab_size: int) -> float:
        """Return the largest valid sum of a position's weights.

        A cache's codec enforces this bound, except for weights that are counts or share tau, whose
        bounds are fixed (`bounds.mass_bound`).
        """
        return float(vocab_size) ** 4

    def expected_entries(self, pilot: Pilot) -> float:
        """Return the mean entries per position on pilot windows.

        This method draws from a few of the windows; a sampler with a formula overrides it.
        """
        return pilot.drawn_entries(self)

    def of_size(self, size: int) -> Self:
        """Return a copy whose budget parameter is set from an integer size, by default to `size`.

        The mean entries per position must not decrease with the size.
        """
        assert self.budget_parameter is not None
        return dataclasses.replace(self, **{self.budget_parameter: size})  # type: ignore[type-var]

    def left_open(self, budget: float | None) -> tuple[str, ...]:
        """Return the names of the fields that `fitted` sets.

        Args:
            budget: mean entries per position; None for no budget.

        Raises:
            InvalidArgumentError: the budget is below 1 or not finite, or the sampler has no budget
                parameter.
        """
        if budget is None:
            return ()
        if isinstance(budget, bool) or not 1 <= budget < math.inf:  # a comparison with NaN is False
            raise InvalidArgumentError(
                f"the budget is {shown(budget)}; give a finite mean number of entries per position "
                "of at least 1 (--budget)"
            )
        if self.budget_parameter is None:
            raise InvalidArgumentError(
                f"sampler {self.name!r} has no parameter that a budget of {budget:g} entries "
                f"could set; give its parameters instead: {', '.join(self.declared())}"
            )
        return (self.budget_parameter,)

    def fitted(self, pilot: Pilot, budget: float | None) -> Self:
        """Return the sampler with the fields of `left_open` fitted on pilot windows.

        Args:
            pilot: pilot windows.
            budget: mean entries per position, which `left_open` accepts; None for no budget.

        Raises:
            InvalidArgumentError: the budget cannot be met, or there are no pilot positions to fit
                it on.
        """
        from sparselogits.samplers.budget import size_for_budget

        return self.of_size(size_for_budget(self, pilot, budget)) if budget is not None else self
