"""Mix several teachers online: the logits are the logarithm of the mixture of their distributions.

It is the reference for what students of a mixture of caches learn, and an engine like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError, TeacherError
from sparselogits.teacher.engine import Engine, LogitsSlice


class MixtureTeacher:
    """A teacher whose distribution is sum_m w_m p_m.

    Args:
        teachers: at least one engine. All have one tokenizer and yield slices of equal length.
        weights: positive weight of each, together 1.

    Raises:
        InvalidArgumentError: the weights are not positive shares of a whole.
    """

    def __init__(self, teachers: Sequence[Engine], weights: Sequence[float]) -> None:
        if len(weights) != len(teachers) or not teachers:
            raise InvalidArgumentError(
                f"{len(weights)} weights for {len(teachers)} teachers; give one per teacher"
            )
        if not all(w > 0 for w in weights) or abs(math.fsum(weights) - 1) > 1e-6:
            raise InvalidArgumentError(
                f"weights of teachers must be positive and their sum 1, found {list(weights)}"
            )
        self.teachers, self.weights = tuple(teachers), tuple(weights)
        self.vocab_size = max(teacher.vocab_size for teacher in teachers)
        self.token_mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        for teacher in teachers:
            self.token_mask[: teacher.vocab_size] |= teacher.token_mask.cpu()
        named = zip(weights, teachers, strict=True)
        self.identity: dict[str, Any] = {
            "name": ", ".join(f"{w:g} x {teacher.identity['name']}" for w, teacher in named),
            "weights": [teacher.identity["weights"] for teacher in teachers],
            "dtype": " and ".join(sorted({str(t.identity["dtype"]) for t in teachers})),
            "engine": "mixture",
            "quantization": [teacher.identity.get("quantization") for teacher in teachers],
            "mixture": list(weights),
        }

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`.

        Raises:
            TeacherError: the teachers divide a window into different slices.
        """
        streams = [teacher.logits(tokens, document_starts) for teacher in self.teachers]
        for parts in zip(*streams, strict=True):
            if len({(part.row, part.positions.start, part.positions.stop) for part in parts}) > 1:
                raise TeacherError(
                    "the teachers of a mixture yield slices of different lengths; give them the "
                    "same slice_positions"
                )
            first = parts[0]
            total = first.logits.new_full((len(first.logits), self.vocab_size), -torch.inf)
            for weight, part in zip(self.weights, parts, strict=True):
                own = part.logits.to(total.device).log_softmax(-1)
                kept = total[:, : own.shape[1]]
                torch.logaddexp(kept, own + math.log(weight), out=kept)
            yield LogitsSlice(first.row, first.positions, total)
