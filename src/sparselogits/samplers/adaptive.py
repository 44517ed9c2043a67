"""Draw more rounds where a student's learning signal is strong; unbiased for every student.

Per position, the number of rounds follows the signal (signal.py). Per token, the proposal is q_i
proportional to p_i * norm_i ** token_power, with norm_i the norm of the student's unembedding row;
the weights are exact importance weights, so the mean is p for every student, however bad.

Cost: that of the signal. As the number of rounds varies, targets carry weights instead of counts,
and cannot be thinned; experiments/samplers_at_equal_bytes.py measures what that costs against what
it buys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers.sampler import (
    Parameter,
    Sampler,
    Stored,
    declared_by,
    parameter,
    require_declared,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.samplers.budget import Pilot
    from sparselogits.samplers.signal import StudentSignal
    from sparselogits.targets import SparseTargets

_MOST_FACTOR = 8  # times the nominal rounds, at any one position


@dataclass(frozen=True)
class NamedSignal:
    """Record a student's signal, as a recipe or a cache does.

    Args:
        student: folder or name of the student's checkpoint; None for a student in memory.
        signal: distance or variance, see signal.py.
        fingerprint: hash of the student's weights; None where they have not been read yet.
    """

    student: str | None = parameter(
        None, "Folder or name of the student to follow", kind=str, label="", required=True
    )
    signal: str = parameter(
        "variance",
        "Learning signal of the student",
        choices=("distance", "variance"),
        label=" {}",
    )
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        require_declared(self)


@dataclass(frozen=True)
class Adaptive(Sampler):
    """Draw systematic rounds whose number and proposal follow a student.

    Args:
        signal: the student's learning signal, `StudentSignal.of(student)`; or the name of one, as
            a cache records it, until `ready` loads the student.
        nominal_rounds: rounds of a position whose signal equals `reference`; between 1 and 8 times
            as many are drawn elsewhere.
        reference: signal that earns the nominal rounds; None for its mean on pilot windows, which
            is taken when a cache is begun.
        position_power: rounds grow with signal ** position_power; 0 spends them evenly.
        token_power: power of the unembedding row's norm in the proposal; 0 leaves the teacher's
            own distribution.

    Examples:
        >>> from sparselogits.samplers import StudentSignal
        >>> from sparselogits.teacher.loading import load_causal_lm
        >>> signal = StudentSignal.of(load_causal_lm("my-student"), "distance")
        >>> Adaptive(signal, nominal_rounds=12).left_open(None)
        ('reference',)
    """

    signal: StudentSignal | NamedSignal
    nominal_rounds: int = parameter(
        21, "Rounds of a position with the reference signal", least=1, label=" N = {:g}"
    )
    reference: float | None = parameter(
        None, "Signal that earns the nominal rounds", kind=float, above=0, label=""
    )
    position_power: float = parameter(
        0.5, "Power of the signal that the rounds grow with", label=""
    )
    token_power: float = parameter(
        1.0, "Power of the norm of the student's unembedding row in the proposal", label=""
    )

    name = "adaptive"
    title = "adaptive"
    unbiased = True
    uniforms_per_position = 1
    budget_parameter = "nominal_rounds"
    needs_size = True
    largest_size = 4096
    on_command_line = False  # it follows a student that has been trained from another cache

    @property
    def stores(self) -> Stored:
        """Store weights, because the number of rounds varies."""
        return Stored.floats()

    @property
    def max_entries(self) -> int:
        """Largest number of entries per position."""
        return _MOST_FACTOR * self.nominal_rounds

    @classmethod
    def declared(cls) -> dict[str, Parameter]:
        """Return the fields, with those of the signal by name."""
        own, named = declared_by(cls), declared_by(NamedSignal)
        first = {name: own.pop(name) for name in ("nominal_rounds", "reference")}
        return {"student": named["student"], **first, "signal": named["signal"], **own}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Adaptive:
        """Make the sampler with the name of its signal; `ready` loads the student."""
        of_signal = {n: v for n, v in given.items() if n in ("student", "signal", "fingerprint")}
        others = {n: v for n, v in given.items() if n not in of_signal}
        return cls(NamedSignal(**of_signal), **others)

    def parameters(self) -> dict[str, Any]:
        """Return what a cache records: the numbers, and the name of the signal."""
        named = self.signal if isinstance(self.signal, NamedSignal) else self.signal.named
        return {
            "student": named.student,
            "nominal_rounds": self.nominal_rounds,
            "reference": self.reference,
            "signal": named.signal,
            "position_power": self.position_power,
            "token_power": self.token_power,
            "fingerprint": named.fingerprint,
        }

    def ready(self) -> Adaptive:
        """Return the sampler with the student in memory, loaded if it is only named.

        Raises:
            InvalidArgumentError: the cache was drawn with a student in memory.
            IdentityMismatchError: the student's weights have changed.
        """
        if not isinstance(self.signal, NamedSignal):
            return self
        from sparselogits.samplers.signal import StudentSignal

        return replace(self, signal=StudentSignal.load(self.signal))

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Adaptive:
        """Return the sampler for some positions of one window.

        The student runs over the window if the signal is the distance.
        """
        student = self._student()
        return replace(self, signal=student.at(tokens, positions)) if student.reads else self

    def signals(self, logits: Tensor) -> Tensor:
        """Return the signal at the positions of `at`, float64 [P], for choosing `reference`."""
        return self._student().strength(logits)

    def left_open(self, budget: float | None) -> tuple[str, ...]:
        """Return the names of the fields that pilot windows set."""
        return super().left_open(budget) + (("reference",) if self.reference is None else ())

    def fitted(self, pilot: Pilot, budget: float | None) -> Adaptive:
        """Return the sampler with its reference and, for a budget, its rounds set."""
        import torch

        sampler = self.ready()
        if sampler.reference is None:
            means = torch.cat(
                [sampler.at(p.tokens, p.positions).signals(p.logits) for p in pilot.few()]
            )
            sampler = replace(sampler, reference=float(means.mean()))
        return super(Adaptive, sampler).fitted(pilot, budget)

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample a few positions; call `at` first where the signal needs the student's states."""
        import torch

        from sparselogits.samplers.distribution import Blocks, count_runs
        from sparselogits.targets import SparseTargets

        student = self._student().part(slice(first_position, first_position + len(logits)))
        teacher = Blocks.of(logits, first_position=first_position)
        norms = student.unembedding(logits.shape[1]).norm(dim=-1).clamp_min(1e-6)
        tilt = self.token_power * norms.log()
        tilted = logits.double() + tilt.double() if self.token_power else logits
        proposal = Blocks.of(tilted, first_position=first_position)
        rounds = self._rounds_at(student, logits)
        edges, _ = proposal.edges()
        top = edges[:, -1:]
        most = int(rounds.max()) if len(rounds) else 0
        ordinal = torch.arange(1, most + 1, device=logits.device).double()
        points = ((ordinal - uniforms) / rounds[:, None]).clamp_max(1)
        levels = (points * top).ceil().to(torch.int64).clamp_min(1).minimum(top)
        tokens = proposal.tokens_at(edges, levels)
        ids, counts, offsets = count_runs(tokens, drawn=ordinal <= rounds[:, None])
        rows = torch.arange(len(rounds), device=ids.device).repeat_interleave(offsets.diff())
        log_p = logits[rows, ids].double() - teacher.shift[rows, 0] - teacher.total[rows, 0].log()
        log_q = tilted[rows, ids].double() - proposal.shift[rows, 0] - proposal.total[rows, 0].log()
        weights = counts / rounds[rows] * (log_p - log_q).exp()
        return SparseTargets(ids, weights.to(torch.float32), offsets, logits.shape[1], check=False)

    def _rounds_at(self, student: StudentSignal, logits: Tensor) -> Tensor:
        """Return the rounds per position, int64 [P].

        They depend on logits and student alone. If they depended on the uniforms, the targets would
        be biased.
        """
        import torch

        if self.position_power == 0:
            return torch.full_like(logits[:, 0], self.nominal_rounds, dtype=torch.int64)
        strength = student.strength(logits)
        if self.reference is None:
            raise InvalidArgumentError(
                "the reference signal of the adaptive sampler is not set; give a number, or build "
                "a cache, which takes the mean on pilot windows"
            )
        most = float(_MOST_FACTOR * self.nominal_rounds)
        share = (strength / self.reference) ** self.position_power
        return (self.nominal_rounds * share).round().clamp(1, most).to(torch.int64)

    def _student(self) -> StudentSignal:
        if isinstance(self.signal, NamedSignal):
            raise InvalidArgumentError(
                f"the student of the adaptive sampler ({self.signal.student or 'in memory'}) is "
                "not loaded, and drawing needs it; call sampler.ready()"
            )
        return self.signal
