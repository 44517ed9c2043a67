"""Measure a student's learning signal: distance from the teacher, or sampling variance.

"distance" is the total variation distance between the distributions of teacher and student.
"variance" is the variance of the student's unembedding row for a token drawn from the teacher, that
is, the noise of one independent round in the student's hidden space. For a given total number of
independent rounds, the total variance is least if the number of rounds at each position is
proportional to the square root of the variance there.

Cost: the distance needs a forward pass of the student, with its head, over every window; the
variance needs only products with the student's unembedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.samplers.adaptive import NamedSignal
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.loading import load_language_model, module_fingerprint


@dataclass(frozen=True, eq=False)
class StudentSignal:
    """Learning signal of a student in memory; created by `of` or `load`.

    Args:
        engine: engine that runs the student.
        named: description of the signal, as a cache records it.
        hidden: hidden states of the student at the positions to sample next, float [P, D]; None
            before `at` is called.
    """

    engine: TransformersTeacher
    named: NamedSignal
    hidden: Tensor | None = None

    @classmethod
    def of(
        cls, student: nn.Module, signal: str = "variance", path: str | None = None
    ) -> StudentSignal:
        """Create the signal of a model.

        Args:
            student: a language model whose head can be run separately from its trunk.
            signal: "distance" or "variance".
            path: folder or hub name from which the student was loaded, to be recorded in a cache;
                None for a student without a checkpoint.

        Raises:
            InvalidArgumentError: the signal is unknown, or the head cannot be run separately.
            TeacherError: the model has no language-model head.

        Examples:
            >>> from sparselogits.teacher.loading import load_language_model
            >>> signal = StudentSignal.of(load_language_model("my-student"), "distance")
        """
        engine = TransformersTeacher(student, identity={})
        if engine.head is None:
            raise InvalidArgumentError(
                f"the head of the student ({type(student).__name__}) cannot be run separately from "
                "its trunk, which an adaptive sampler requires; use a student of another "
                "architecture, or another sampler"
            )
        return cls(engine, NamedSignal(path, signal, module_fingerprint(student)))

    @classmethod
    def load(cls, named: NamedSignal) -> StudentSignal:
        """Load the student that a recipe or a cache names, and return its signal.

        Raises:
            InvalidArgumentError: the description names no checkpoint, or the student's head cannot
                be run separately.
            IdentityMismatchError: the checkpoint's weights differ from the recorded fingerprint.
            TeacherError: the checkpoint cannot be loaded, or has no language-model head.
        """
        if named.student is None:
            raise InvalidArgumentError(
                "the cache was drawn with a student in memory and names no checkpoint; pass the "
                "student: Adaptive(StudentSignal.of(student), ...)"
            )
        signal = cls.of(load_language_model(named.student), named.signal, named.student)
        if named.fingerprint not in (None, signal.named.fingerprint):
            raise IdentityMismatchError(
                f"the weights of the student at {named.student} have the fingerprint "
                f"{str(signal.named.fingerprint)[:12]}, expected {str(named.fingerprint)[:12]}; "
                "restore the checkpoint with which the cache was begun"
            )
        return signal

    @property
    def needs_states(self) -> bool:
        """Whether the signal depends on the student's hidden states, not only its unembedding."""
        return self.named.signal == "distance"

    def at(self, tokens: Tensor, positions: slice | Tensor) -> StudentSignal:
        """Run the student over one window, and return the signal for some of its positions.

        Args:
            tokens: int64 [L], tokens of the window as the student reads them.
            positions: positions whose hidden states are kept: a slice, or int64 indices.
        """
        return replace(self, hidden=self.engine.hidden(tokens[None])[0, positions])

    def part(self, positions: slice) -> StudentSignal:
        """Return the signal for a contiguous part of the positions passed to `at`."""
        return self if self.hidden is None else replace(self, hidden=self.hidden[positions])

    @torch.no_grad()  # the graph of the student's head would keep all logits in memory
    def strength(self, logits: Tensor) -> Tensor:
        """Return the signal at each position, float64 [P].

        Args:
            logits: logits of the teacher, float [P, V].

        Raises:
            InvalidArgumentError: the signal is the distance and there are no hidden states of P
                positions, or the student's vocabulary is smaller than V.
        """
        teacher = logits.float().softmax(-1)
        if self.needs_states:
            head = self.engine.head
            assert head is not None
            student = head(self._states(len(logits))).float()
            _require_ids(student.shape[1], logits.shape[1])
            student = student[:, : logits.shape[1]]
            return (teacher - student.softmax(-1)).abs().sum(-1).double() / 2
        rows = self.unembedding(logits.shape[1])
        mean = teacher @ rows
        spread = teacher @ rows.square().sum(-1) - mean.square().sum(-1)
        return spread.clamp_min(0).double()

    def unembedding(self, vocabulary: int) -> Tensor:
        """Return the first V rows of the student's unembedding (LM head), float32 [V, D].

        Args:
            vocabulary: vocabulary size V of the teacher.

        Raises:
            InvalidArgumentError: the student's vocabulary is smaller than V.
        """
        weight: Tensor = self.engine.model.get_output_embeddings().weight.detach()  # type: ignore[operator]
        _require_ids(weight.shape[0], vocabulary)
        return weight[:vocabulary].float()

    def _states(self, positions: int) -> Tensor:
        """Return the hidden states after validating that there is one per position."""
        if self.hidden is None or len(self.hidden) != positions:
            found = 0 if self.hidden is None else len(self.hidden)
            raise InvalidArgumentError(
                f"the student's hidden states are known at {found} positions, expected "
                f"{positions}; call sampler.at(tokens, positions) first"
            )
        return self.hidden


def _require_ids(student: int, teacher: int) -> None:
    """Validate that a student has at least as many ids as the teacher.

    Raises InvalidArgumentError.
    """
    if student < teacher:
        raise InvalidArgumentError(
            f"the student's vocabulary has {student} ids, expected at least the teacher's "
            f"{teacher}; use a student with the teacher's vocabulary"
        )
