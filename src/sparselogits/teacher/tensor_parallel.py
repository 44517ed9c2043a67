"""A teacher whose layers are spread over the ranks of a job: one rank leads, the others follow.

Every rank holds a slice of each layer, so a forward pass is run by all of them together. What is
built, and when, is the first rank's business alone: it is given a `Leader`, an engine like any
other, and tells the others which windows it asks for; they `follow`, and throw the logits away.
So only the first rank samples, encodes and writes, and a build knows nothing of ranks.

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
    """The first rank's engine. Leaving it as a context lets the followers go, whatever happened.

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
        """See `Engine.logits`. A pass that is begun is run to its end, since the others do so."""
        _from_the_first((tokens.cpu(), document_starts))
        slices = self._teacher.logits(tokens, document_starts)
        try:
            while (piece := next(slices, None)) is not None:
                yield piece
        finally:
            for _ in slices:
                pass


def follow(teacher: TransformersTeacher) -> None:
    """Run the passes that the first rank runs, until it lets go.

    Args:
        teacher: this rank's slice of the model.
    """
    while (asked := _from_the_first(None)) is not None:
        for _ in teacher.logits(*asked):
            pass


def _from_the_first(asked: Any) -> Any:
    """What the first rank says, on every rank."""
    message = [asked]
    dist.broadcast_object_list(message, src=0)
    return message[0]
