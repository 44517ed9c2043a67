"""Run a teacher whose layers are sharded over ranks (tensor parallelism).

Every rank has a slice of each layer, so all ranks must run a forward pass together. The first rank
uses a `Leader`, an engine that broadcasts each call that runs a pass; the other ranks call
`follow`, which makes the same calls and discards the logits. So only the first rank samples,
encodes and writes, and the code of a build does not depend on the ranks.

    engine = load_teacher(name, tokenizer=tokenizer, tp_plan="auto")    # on every rank
    if torch.distributed.get_rank() == 0:
        with Leader(engine) as leader:
            build_caches(leader, corpus, requests, ...)
    else:
        follow(engine)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.teacher.engine import LogitsSlice
from sparselogits.teacher.transformers_engine import TransformersTeacher


class Leader:
    """Engine of the first rank, which broadcasts each call that runs a pass to the other ranks.

    Use it in a `with` block: when the block ends, `follow` returns on the other ranks.

    Args:
        teacher: teacher with this rank's slices of the layers.
    """

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher, self.model = teacher, teacher.model
        self.vocab_size, self.token_mask = teacher.vocab_size, teacher.token_mask
        self.identity, self.device = teacher.identity, teacher.device
        self.ranks = dist.get_world_size()

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *error: object) -> None:
        _broadcast(None)

    def logits(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`.

        A pass is completed even if the iterator is closed early, because the other ranks run it
        completely.
        """
        mask = None if attention_mask is None else attention_mask.cpu()
        _broadcast(("logits", (tokens.cpu(), document_starts, mask)))
        slices = self._teacher.logits(tokens, document_starts, attention_mask)
        try:
            while (piece := next(slices, None)) is not None:
                yield piece
        finally:
            for _ in slices:
                pass

    def check_window(self, length: int, *, restarts: bool = False) -> None:
        """Validate the length of windows; see `TransformersTeacher.check_window`."""
        _broadcast(("check_window", (length,)))
        self._teacher.check_window(length, restarts=restarts)

    def check_padding(self) -> None:
        """Validate that padding changes no output; see `TransformersTeacher.check_padding`."""
        _broadcast(("check_padding", ()))
        self._teacher.check_padding()


def follow(teacher: TransformersTeacher) -> None:
    """Repeat the calls of the first rank's `Leader` until the `Leader`'s `with` block ends.

    An InvalidArgumentError is ignored, because the first rank handles the same one.

    Args:
        teacher: teacher with this rank's slices of the layers.
    """
    while (call := _broadcast(None)) is not None:
        name, arguments = call
        with suppress(InvalidArgumentError):
            for _ in getattr(teacher, name)(*arguments) or ():
                pass


def _broadcast(value: Any) -> Any:
    """Return the first rank's value on every rank."""
    message = [value]
    dist.broadcast_object_list(message, src=0)
    return message[0]
