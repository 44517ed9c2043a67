"""Draw more sampling rounds at positions where a student's learning signal is strong.

By default, the number of rounds at a position grows with the signal (signal.py). Each round draws
token i with probability q_i proportional to p_i * norm_i ** token_power, where norm_i is the
Euclidean norm of row i of the student's unembedding. The weights are exact importance weights, so
the expectation of the targets is p for every student.

Cost: computing the signal, and larger targets. Because the number of rounds varies, targets store
weights instead of counts and cannot be thinned. experiments/samplers_at_equal_bytes.py compares the
noise at equal size.
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

_LARGEST_FACTOR = 8
"""Largest number of rounds per position, as a multiple of `nominal_rounds`."""


@dataclass(frozen=True)
class NamedSignal:
    """Description of a student's signal in a recipe or a cache, without the student's weights.

    Args:
        student: folder or hub name of the student's checkpoint; None for a student in memory.
        signal: "distance" or "variance"; see signal.py.
        fingerprint: hash of the student's weights; None if the weights have not been read yet.

    Raises:
        InvalidArgumentError: `signal` is neither "distance" nor "variance", or `student` is neither
            a string nor None.
    """

    student: str | None = parameter(
        None, "Folder or hub name of the student", kind=str, label="", required=True
    )
    signal: str = parameter(
        "variance",
        "Learning signal: distance from the teacher, or variance of a sampled round",
        choices=("distance", "variance"),
        label=" {}",
    )
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        require_declared(self)


@dataclass(frozen=True)
class Adaptive(Sampler):
    """Sampler of systematic rounds whose number and proposal depend on a student.

    Args:
        signal: the student's learning signal: `StudentSignal.of(student)`, or a `NamedSignal`, for
            which `ready` loads the student.
        nominal_rounds: number of rounds at a position whose signal equals `reference`. Other
            positions have from 1 to 8 * nominal_rounds rounds.
        reference: signal at which nominal_rounds rounds are drawn; None for the mean signal on
            pilot windows, which is computed when a cache is created.
        position_power: exponent of the signal; the number of rounds before rounding and limits is
            proportional to the signal to this power. With 0 all positions have the same number.
        token_power: exponent t in the proposal, which is proportional to p_i * norm_i ** t, where
            norm_i is the norm of row i of the student's unembedding. With 0 the proposal is the
            teacher's distribution p.

    Examples:
        >>> from sparselogits.samplers import StudentSignal
        >>> from sparselogits.teacher.loading import load_language_model
        >>> signal = StudentSignal.of(load_language_model("my-student"), "distance")
        >>> Adaptive(signal, nominal_rounds=12).left_open(None)
        ('reference',)
    """

    signal: StudentSignal | NamedSignal
    nominal_rounds: int = parameter(
        21, "Rounds at a position with the reference signal", least=1, label=" N = {:g}"
    )
    reference: float | None = parameter(
        None, "Signal at which the nominal rounds are drawn", kind=float, above=0, label=""
    )
    position_power: float = parameter(
        0.5, "Exponent of the signal in the number of rounds", label=""
    )
    token_power: float = parameter(
        1.0, "Exponent of the norm of the student's unembedding row in the proposal", label=""
    )

    name = "adaptive"
    title = "adaptive"
    unbiased = True
    uniforms_per_position = 1
    budget_parameter = "nominal_rounds"
    needs_size = True
    largest_size = 4096
    on_command_line = False  # needs a student, which is trained from another cache first

    @property
    def stores(self) -> Stored:
        """Kind of the stored weights: float32, because the number of rounds varies."""
        return Stored.floats()

    @classmethod
    def declared(cls) -> dict[str, Parameter]:
        """Return the declarations of the fields; those of `NamedSignal` replace `signal`."""
        own, named = declared_by(cls), declared_by(NamedSignal)
        first = {name: own.pop(name) for name in ("nominal_rounds", "reference")}
        return {"student": named["student"], **first, "signal": named["signal"], **own}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Adaptive:
        """Create the sampler from values of `parameters`, without loading the student.

        `ready` loads the student.
        """
        of_signal = {n: v for n, v in given.items() if n in ("student", "signal", "fingerprint")}
        others = {n: v for n, v in given.items() if n not in of_signal}
        return cls(NamedSignal(**of_signal), **others)

    def parameters(self) -> dict[str, Any]:
        """Return the fields as a cache records them, with the student's name and fingerprint."""
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
        """Return the sampler with the student loaded into memory.

        Raises:
            InvalidArgumentError: the signal names no checkpoint of the student, or the student's
                head cannot be run separately.
            IdentityMismatchError: the checkpoint's weights differ from the recorded fingerprint.
            TeacherError: the checkpoint cannot be loaded, or has no language-model head.
        """
        if not isinstance(self.signal, NamedSignal):
            return self
        from sparselogits.samplers.signal import StudentSignal

        return replace(self, signal=StudentSignal.load(self.signal))

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Adaptive:
        """Return the sampler for some positions of one window; see `Sampler.at`.

        If the signal is the distance, the student runs over the window.

        Raises:
            InvalidArgumentError: the student is not loaded; see `ready`.
        """
        student = self._student()
        return replace(self, signal=student.at(tokens, positions)) if student.needs_states else self

    def signals(self, logits: Tensor) -> Tensor:
        """Return the signal, float64 [P], given the teacher's logits [P, V].

        For the distance, the logits must be those of the positions passed to `at`.
        """
        return self._student().strength(logits)

    def left_open(self, budget: float | None) -> tuple[str, ...]:
        """Return the names of the fields that `fitted` sets; see `Sampler.left_open`."""
        return super().left_open(budget) + (("reference",) if self.reference is None else ())

    def fitted(self, pilot: Pilot, budget: float | None) -> Adaptive:
        """Return the sampler with a loaded student and with the fields of `left_open` fitted.

        Raises:
            InvalidArgumentError: the signal is 0 at all pilot positions, or there are none; see
                also `ready` and `Sampler.fitted`.
        """
        import torch

        sampler = self.ready()
        if sampler.reference is None:
            strengths = [
                sampler.at(p.tokens, p.positions).signals(p.logits) for p in pilot.subset()
            ]
            if not sum(map(len, strengths)):
                raise InvalidArgumentError(
                    "there are no pilot positions to measure the student's signal on; pass logits "
                    "of at least one, or reference="
                )
            reference = float(torch.cat(strengths).mean())
            if reference == 0:
                raise InvalidArgumentError(
                    "the student's signal is 0 at all positions of the pilot windows; expected a "
                    "student that differs from the teacher. Use another student, or pass reference="
                )
            sampler = replace(sampler, reference=reference)
        return super(Adaptive, sampler).fitted(pilot, budget)

    def draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        """Sample targets at a few positions; see `Sampler.draw`.

        Raises:
            InvalidArgumentError: the student is not loaded (see `ready`), a distance signal has no
                hidden states for the positions (see `at`), the student's vocabulary is smaller than
                V, or the reference is not set although the number of rounds depends on the signal.
        """
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
        log_p = logits[rows, ids].double() - teacher.log_normaliser[rows, 0]
        log_q = tilted[rows, ids].double() - proposal.log_normaliser[rows, 0]
        weights = counts / rounds[rows] * (log_p - log_q).exp()
        return SparseTargets(ids, weights.to(torch.float32), offsets, logits.shape[1], check=False)

    def _rounds_at(self, student: StudentSignal, logits: Tensor) -> Tensor:
        """Return the number of rounds per position, int64 [P].

        The numbers must not depend on the uniforms, because the targets would then be biased.
        """
        import torch

        if self.position_power == 0:
            return torch.full_like(logits[:, 0], self.nominal_rounds, dtype=torch.int64)
        strength = student.strength(logits)
        if self.reference is None:
            raise InvalidArgumentError(
                "the reference signal of the adaptive sampler is not set; expected a number. Pass "
                "reference=..., or build a cache, which computes the mean signal on pilot windows"
            )
        most = float(_LARGEST_FACTOR * self.nominal_rounds)
        share = (strength / self.reference) ** self.position_power
        return (self.nominal_rounds * share).round().clamp(1, most).to(torch.int64)

    def _student(self) -> StudentSignal:
        if isinstance(self.signal, NamedSignal):
            raise InvalidArgumentError(
                f"the student of the adaptive sampler ({self.signal.student or 'in memory'}) is "
                "not loaded, and sampling needs it; call sampler.ready() first"
            )
        return self.signal
