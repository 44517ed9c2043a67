"""Run several teachers as one engine whose distribution is a mixture of their distributions.

The engine is the reference for students that are trained on a mixture of the teachers' caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError, TeacherError
from sparselogits.teacher.engine import Engine, LogitsSlice, logits_at


class MixtureTeacher:
    """Engine whose distribution is sum_m w_m p_m, for teachers with distributions p_m.

    Args:
        teachers: at least one engine, all with the same tokenizer and the same slices.
        weights: positive weight w_m of each teacher; their sum is 1.

    Raises:
        InvalidArgumentError: there is no teacher, the number of weights differs from the number of
            teachers, a weight is not positive, or the sum of the weights is not 1.

    Example:
        >>> from sparselogits.teacher import ModuleTeacher
        >>> def bigrams(name: str) -> ModuleTeacher:
        ...     layers = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)
        ...     mask = torch.ones(32, dtype=torch.bool)
        ...     return ModuleTeacher(*layers, token_mask=mask, name=name, architecture="bigrams")
        >>> MixtureTeacher([bigrams("one"), bigrams("other")], [0.25, 0.75]).identity["name"]
        '0.25 x one, 0.75 x other'
    """

    def __init__(self, teachers: Sequence[Engine], weights: Sequence[float]) -> None:
        if len(weights) != len(teachers) or not teachers:
            raise InvalidArgumentError(
                f"found {len(weights)} weights for {len(teachers)} teachers; give at least one "
                "teacher, and one weight per teacher"
            )
        require_shares(weights)
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

    def logits(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield the logarithm of the mixture's probabilities as logits; see `Engine.logits`.

        Raises:
            TeacherError: the teachers divide a window into different slices.
        """
        return self.logits_at(tokens, document_starts, None, attention_mask)

    @torch.no_grad()
    def logits_at(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None,
        wanted: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield the logits of wanted positions; see `logits` and `engine.logits_at`."""
        given = (tokens, document_starts, wanted, attention_mask)
        streams = [logits_at(teacher, *given) for teacher in self.teachers]
        for parts in zip(*streams, strict=True):
            if len({(part.row, part.positions.start, part.positions.stop) for part in parts}) > 1:
                raise TeacherError(
                    "the teachers of a mixture yield slices of different lengths; give them the "
                    "same slice_positions"
                )
            first = parts[0]
            total = first.logits.new_full((len(first.logits), self.vocab_size), -torch.inf)
            for weight, part in zip(self.weights, parts, strict=True):
                log_shares = part.logits.to(total.device).log_softmax(-1) + math.log(weight)
                view = total[:, : log_shares.shape[1]]
                torch.logaddexp(view, log_shares, out=view)
            yield LogitsSlice(first.row, first.positions, total)


def require_shares(weights: Sequence[float]) -> None:
    """Validate that weights are positive and sum to 1. Raises InvalidArgumentError."""
    if not all(w > 0 for w in weights) or abs(math.fsum(weights) - 1) > 1e-6:
        raise InvalidArgumentError(
            f"found the weights {list(weights)}; give positive numbers whose sum is 1, and leave "
            "out a teacher with the weight 0"
        )
