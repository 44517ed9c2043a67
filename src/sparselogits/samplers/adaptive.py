"""Adaptive rounds: a student's own view decides where the rounds go. Unbiased all the same.

Per position, the number of rounds follows a signal of the student: how far it still is from the
teacher there (total variation), or how noisy its gradient is there (the variance of one independent
round after the student's unembedding, whose square root minimises the summed variance for a given
total of rounds). Per token, the proposal is q_i proportional to p_i * norm_i ** token_power, with
norm_i the norm of the student's unembedding row; the weights are exact importance weights, so the
mean is p for every student, however bad.

Cost: the student's forward pass over every window. As the number of rounds varies, targets carry
weights instead of counts, and cannot be thinned; experiments/samplers_at_equal_bytes.py measures
what that costs against what it buys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.samplers.distribution import Blocks, position_slices
from sparselogits.samplers.rounds import count_runs
from sparselogits.targets import SparseTargets
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.loading import load_causal_lm, module_fingerprint

_MOST_FACTOR = 8  # times the nominal rounds, at any one position


@dataclass(frozen=True)
class Adaptive:
    """Systematic rounds whose number and proposal follow a student.

    Args:
        student: folder or name of the student's checkpoint, or the model itself (then the sampler
            cannot be rebuilt from a cache's identity).
        nominal_rounds: rounds of a position whose signal equals `reference`; between 1 and 8 times
            as many are drawn elsewhere.
        reference: signal that earns the nominal rounds; take the mean over some pilot windows.
        signal: "distance", total variation between teacher and student; "variance", of one
            independent round after the student's unembedding.
        position_power: rounds grow with signal ** position_power; 0 spends them evenly.
        token_power: of the unembedding row's norm in the proposal; 0 leaves the teacher's own.
        fingerprint: of the student's weights, checked when given.

    Raises:
        InvalidArgumentError: for values out of range.
        IdentityMismatchError: when the student's weights are not those of the fingerprint.
    """

    student: str | nn.Module
    nominal_rounds: int = 21
    reference: float = 0.5
    signal: Literal["distance", "variance"] = "variance"
    position_power: float = 0.5
    token_power: float = 1.0
    fingerprint: str | None = None
    _engine: TransformersTeacher = field(init=False, repr=False, compare=False)
    _hidden: Tensor | None = field(init=False, repr=False, compare=False, default=None)

    name = "adaptive"
    unbiased = True
    rounds = None
    uniforms_per_position = 1

    def __post_init__(self) -> None:
        if self.nominal_rounds < 1 or self.reference <= 0:
            raise InvalidArgumentError("nominal_rounds must be at least 1 and reference positive")
        if self.signal not in ("distance", "variance"):
            raise InvalidArgumentError(f"signal is distance or variance, not {self.signal!r}")
        named = isinstance(self.student, str)
        model = load_causal_lm(self.student) if isinstance(self.student, str) else self.student
        found = module_fingerprint(model)
        if self.fingerprint not in (None, found):
            raise IdentityMismatchError(
                f"the student {self.student if named else 'given'} has weights {found[:12]}, "
                f"the sampler was made with {str(self.fingerprint)[:12]}"
            )
        object.__setattr__(self, "fingerprint", found)
        object.__setattr__(self, "_engine", TransformersTeacher(model, identity={}))
        if self._engine.head is None:
            raise InvalidArgumentError("a student whose head runs apart from its trunk is needed")

    @property
    def max_entries(self) -> int:
        """No position has more entries than this."""
        return _MOST_FACTOR * self.nominal_rounds

    def parameters(self) -> dict[str, Any]:
        """What rebuilds it, with its name, where the student is a checkpoint."""
        return {
            "student": self.student if isinstance(self.student, str) else None,
            "nominal_rounds": self.nominal_rounds,
            "reference": self.reference,
            "signal": self.signal,
            "position_power": self.position_power,
            "token_power": self.token_power,
            "fingerprint": self.fingerprint,
        }

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Adaptive:
        """The sampler with the student's hidden states of these positions of one window."""
        return _with_states(self, self._engine.hidden(tokens[None])[0, positions])

    @torch.no_grad()  # the student's head wants a gradient, and its graph would hold all logits
    def signals(self, logits: Tensor) -> Tensor:
        """float64 [P]: the signal at these positions, for choosing `reference`."""
        teacher = logits.float().softmax(-1)
        head = self._engine.head
        assert head is not None
        if self.signal == "distance":
            student = head(self._states(logits)).float()[:, : logits.shape[1]]
            return (teacher - student.softmax(-1)).abs().sum(-1).double() / 2
        rows = self._rows(logits.shape[1])
        mean = teacher @ rows
        spread = teacher @ rows.square().sum(-1) - mean.square().sum(-1)
        return spread.clamp_min(0).double()

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Draw; see `Sampler`. Call `at` first where the signal needs the student's states."""
        uniforms = uniforms.to(logits.device, torch.float64)
        parts = []
        for part in position_slices(logits, uniforms, 1):
            states = None if self._hidden is None else self._hidden[part]
            here = _with_states(self, states)
            parts.append(here._draw(logits[part], uniforms[part], part.start))
        return SparseTargets.cat(parts)

    def _draw(self, logits: Tensor, uniforms: Tensor, first_position: int) -> SparseTargets:
        teacher = Blocks.of(logits, first_position=first_position)
        tilt = self.token_power * self._rows(logits.shape[1]).norm(dim=-1).clamp_min(1e-6).log()
        tilted = logits.double() + tilt.double() if self.token_power else logits
        proposal = Blocks.of(tilted, first_position=first_position)
        rounds = self._rounds(logits)
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

    def _rounds(self, logits: Tensor) -> Tensor:
        """int64 [P], from logits and student alone: never from the uniforms, or it would bias."""
        most = float(_MOST_FACTOR * self.nominal_rounds)
        if self.position_power == 0:
            return torch.full_like(logits[:, 0], self.nominal_rounds, dtype=torch.int64)
        share = (self.signals(logits) / self.reference) ** self.position_power
        return (self.nominal_rounds * share).round().clamp(1, most).to(torch.int64)

    def _states(self, logits: Tensor) -> Tensor:
        if self._hidden is None or len(self._hidden) != len(logits):
            raise InvalidArgumentError(
                "the student has not read these positions: call sampler.at(tokens, positions) first"
            )
        return self._hidden

    def _rows(self, vocabulary: int) -> Tensor:
        weight: Tensor = self._engine.model.get_output_embeddings().weight.detach()  # type: ignore[operator]
        if weight.shape[0] < vocabulary:
            raise InvalidArgumentError(
                f"the student's vocabulary of {weight.shape[0]} is smaller than the teacher's "
                f"{vocabulary}"
            )
        return weight[:vocabulary].float()


def _with_states(sampler: Adaptive, hidden: Tensor | None) -> Adaptive:
    """The same sampler, student shared, with other hidden states."""
    other = object.__new__(Adaptive)
    for name, value in vars(sampler).items():
        object.__setattr__(other, name, value)
    object.__setattr__(other, "_hidden", hidden)
    return other
