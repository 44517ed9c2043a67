"""Run a teacher whose layers are sharded over ranks: one rank leads, the others follow.

Every rank holds a slice of each layer, so all of them run a forward pass together. The first rank
uses a `Leader`, an engine like any other, which broadcasts the windows of each pass; the others
`follow` and discard the logits. So only the first rank samples, encodes and writes, and a build
does not depend on ranks.

    engine = load_teacher(name, tokenizer=tokenizer, tp_plan="auto")    # on every rank
    if torch.distributed.get_rank() == 0:
        with Leader(engine) as leader:
            build_caches(leader, corpus, requests, ...)
    else:
        follow(engine)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from sparselogits.teacher.engine import LogitsSlice
from sparselogits.teacher.transformers_engine import TransformersTeacher


class Leader:
    """The first rank's engine; at the end of its context, the followers return.

    Args:
        teacher: this rank's slice of the model.
    """

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher = teacher
        self.vocab_size, self.token_mask = teacher.vocab_size, teacher.token_mask
        self.identity, self.device = teacher.identity, teacher.device
        self.ranks = dist.get_world_size()

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *error: object) -> None:
        _from_the_first(None)

    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`. A pass is always completed, as the other ranks do."""
        _from_the_first((tokens.cpu(), document_starts))
        slices = self._teacher.logits(tokens, document_starts)
        try:
            while (piece := next(slices, None)) is not None:
                yield piece
        finally:
            for _ in slices:
                pass


def follow(teacher: TransformersTeacher) -> None:
    """Run the passes of the first rank until its `Leader` ends.

    Args:
        teacher: this rank's slice of the model.
    """
    while (asked := _from_the_first(None)) is not None:
        for _ in teacher.logits(*asked):
            pass


def _from_the_first(asked: Any) -> Any:
    """Return the first rank's message on every rank."""
    message = [asked]
    dist.broadcast_object_list(message, src=0)
    return message[0]
