"""Use two torch modules as a teacher: a trunk from tokens to states, a head from states to logits.

This is for models that transformers does not support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.errors import TeacherError
from sparselogits.teacher.engine import LogitsSlice
from sparselogits.teacher.loading import module_fingerprint
from sparselogits.teacher.transformers_engine import SLICE_POSITIONS


class ModuleTeacher:
    """Teacher that consists of two plain modules; both are set to eval mode.

    Args:
        trunk: causal module from tokens int64 [B, L] to states [B, L, D].
        head: module from states [P, D] to logits [P, V], including scale and soft cap if any.
        token_mask: bool [V], true for ids that are tokens of the tokenizer.
        name: name for display; it is not compared.
        architecture: name and version of the modules' code; this text is compared.
        weights: fingerprint of the weights, such as a hub revision or a hash of files, for modules
            that do not contain all weights because the trunk calls an inference engine; None to
            hash the modules' state dicts.
        slice_positions: number of positions for which logits are in memory at a time.

    Raises:
        TeacherError: the modules have no parameters.

    Example:
        >>> head = nn.Linear(8, 32)
        >>> teacher = ModuleTeacher(
        ...     nn.Embedding(32, 8), head, token_mask=torch.ones(32, dtype=torch.bool),
        ...     name="bigrams", architecture="embedding and linear layer",
        ... )
        >>> [piece.logits.shape for piece in teacher.logits(torch.tensor([[3, 7]]))]
        [torch.Size([2, 32])]
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        token_mask: Tensor,
        name: str,
        architecture: str,
        weights: str | None = None,
        slice_positions: int = SLICE_POSITIONS,
    ) -> None:
        self.trunk, self.head = trunk.eval(), head.eval()
        both = nn.ModuleDict({"trunk": trunk, "head": head})
        first = next(both.parameters(), None)
        if first is None:
            raise TeacherError("trunk and head have no parameters; give modules with weights")
        self.device = first.device
        self.token_mask = token_mask
        self.vocab_size = len(token_mask)
        self.slice_positions = slice_positions
        self.identity: dict[str, Any] = {
            "name": name,
            "weights": weights or module_fingerprint(both),
            "dtype": str(first.dtype).removeprefix("torch."),
            "engine": f"module: {architecture}",
            "quantization": None,
        }
        self._not_tokens = (~token_mask).nonzero().flatten().to(self.device)

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`.

        Raises:
            TeacherError: `document_starts` is given, which this engine does not support, or a
                module returns a wrong shape.
        """
        if document_starts is not None:
            raise TeacherError(
                "this teacher cannot restart attention at document starts; build the cache without "
                "reset_attention"
            )
        states = self.trunk(tokens.to(self.device))
        if states.shape[:2] != tokens.shape:
            raise TeacherError(
                f"the trunk returned states of shape {tuple(states.shape)} for tokens of shape "
                f"{tuple(tokens.shape)}; expected [B, L, D]"
            )
        for row, window_states in enumerate(states):
            for start in range(0, len(window_states), self.slice_positions):
                positions = slice(start, min(start + self.slice_positions, len(window_states)))
                logits = self.head(window_states[positions])
                if logits.shape != (positions.stop - start, self.vocab_size):
                    raise TeacherError(
                        f"the head returned logits of shape {tuple(logits.shape)}; expected "
                        f"({positions.stop - start}, {self.vocab_size}), the last dimension being "
                        "that of token_mask"
                    )
                logits = logits.to(torch.float32, copy=True)  # the receiver may overwrite it
                yield LogitsSlice(row, positions, logits.index_fill_(1, self._not_tokens, -np.inf))
