"""Measure a student's learning signal: its distance from the teacher, or its gradient's noise.

"distance" is the total variation between teacher and student. "variance" is the variance of one
independent round after the student's unembedding, whose square root minimises the summed variance
for a given total of rounds.

Cost: for the distance, the student's forward pass over every window, with its head; for the
variance, products with the student's unembedding alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.samplers.adaptive import NamedSignal
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.loading import load_causal_lm, module_fingerprint


@dataclass(frozen=True, eq=False)
class StudentSignal:
    """Hold the signal of a student in memory; made by `of` or `load`.

    Args:
        engine: runs the student.
        named: what a cache records of the signal.
        hidden: the student's states at the positions that are sampled next, float [P, D].
    """

    engine: TransformersTeacher
    named: NamedSignal
    hidden: Tensor | None = None

    @classmethod
    def of(
        cls, student: nn.Module, signal: str = "variance", path: str | None = None
    ) -> StudentSignal:
        """Make the signal of a model.

        Args:
            student: a causal language model whose head runs apart from its trunk.
            signal: distance or variance.
            path: folder or name that the student was loaded from, which a cache records.

        Raises:
            InvalidArgumentError: another signal, or a model without such a head.
        """
        engine = TransformersTeacher(student, identity={})
        if engine.head is None:
            raise InvalidArgumentError(
                f"the head of the student ({type(student).__name__}) cannot be run apart from its "
                "trunk; an adaptive sampler needs a student of an architecture where it can"
            )
        return cls(engine, NamedSignal(path, signal, module_fingerprint(student)))

    @classmethod
    def load(cls, named: NamedSignal) -> StudentSignal:
        """Load the student that a recipe or a cache names.

        Raises:
            InvalidArgumentError: no student is named.
            IdentityMismatchError: the student's weights are others than when it was recorded.
        """
        if named.student is None:
            raise InvalidArgumentError(
                "the cache was drawn with a student in memory, and names no checkpoint of it; "
                "expected the student itself: Adaptive(StudentSignal.of(student), ...)"
            )
        signal = cls.of(load_causal_lm(named.student), named.signal, named.student)
        if named.fingerprint not in (None, signal.named.fingerprint):
            raise IdentityMismatchError(
                f"the student at {named.student} has weights {str(signal.named.fingerprint)[:12]}, "
                f"the sampler was made with {str(named.fingerprint)[:12]}; restore the checkpoint "
                "that the cache was drawn with"
            )
        return signal

    @property
    def reads(self) -> bool:
        """Whether the signal depends on the student's states, and not on its unembedding alone."""
        return self.named.signal == "distance"

    def at(self, tokens: Tensor, positions: slice | Tensor) -> StudentSignal:
        """Return the signal for some positions of one window, which the student reads."""
        return self.with_states(self.engine.hidden(tokens[None])[0, positions])

    def with_states(self, hidden: Tensor | None) -> StudentSignal:
        """Return the signal with other states of the student."""
        return replace(self, hidden=hidden)

    def part(self, positions: slice) -> StudentSignal:
        """Return the signal for a run of the positions that the student has read."""
        return self if self.hidden is None else self.with_states(self.hidden[positions])

    @torch.no_grad()  # the student's head wants a gradient, and its graph would hold all logits
    def strength(self, logits: Tensor) -> Tensor:
        """Return the signal at each position, float64 [P].

        Args:
            logits: the teacher's, float [P, V].

        Raises:
            InvalidArgumentError: the student has not read these positions, or has too few ids.
        """
        teacher = logits.float().softmax(-1)
        if self.reads:
            head = self.engine.head
            assert head is not None
            student = head(self._states(len(logits))).float()[:, : logits.shape[1]]
            return (teacher - student.softmax(-1)).abs().sum(-1).double() / 2
        rows = self.unembedding(logits.shape[1])
        mean = teacher @ rows
        spread = teacher @ rows.square().sum(-1) - mean.square().sum(-1)
        return spread.clamp_min(0).double()

    def unembedding(self, vocabulary: int) -> Tensor:
        """Return the first V rows of the student's unembedding (LM head), float32 [V, D].

        Args:
            vocabulary: V, the vocabulary size of the teacher.

        Raises:
            InvalidArgumentError: the student's vocabulary is smaller than V.
        """
        weight: Tensor = self.engine.model.get_output_embeddings().weight.detach()  # type: ignore[operator]
        if weight.shape[0] < vocabulary:
            raise InvalidArgumentError(
                f"the student's vocabulary of {weight.shape[0]} is smaller than the teacher's "
                f"{vocabulary}; give a student that has all ids of the teacher"
            )
        return weight[:vocabulary].float()

    def _states(self, positions: int) -> Tensor:
        if self.hidden is None or len(self.hidden) != positions:
            raise InvalidArgumentError(
                "the student has not read these positions: call sampler.at(tokens, positions) first"
            )
        return self.hidden
