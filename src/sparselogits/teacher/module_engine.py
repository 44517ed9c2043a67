"""Use two torch modules as a teacher: a trunk from tokens to states, a head from states to logits.

This serves models that transformers does not know. `slice_positions` rows of logits exist at a
time.
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
    """A teacher made of plain modules, which are set to eval mode.

    Args:
        trunk: int64 [B, L] tokens -> [B, L, D] states, causal.
        head: [P, D] states -> [P, V] logits, including everything the model does to them.
        token_mask: bool [V], true for ids that are tokens of the tokenizer.
        name: name for people; the identity depends on the weights.
        architecture: text that distinguishes the code of the modules from that of others with the
            same weights.
        weights: description of all weights, where the modules lack some because the trunk calls an
            inference engine: a hub revision, a hash of files (`weights_fingerprint`).
        slice_positions: number of rows of logits that exist at a time.

    Raises:
        TeacherError: the modules have no parameters.
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
            TeacherError: `document_starts` is given, which a plain trunk cannot obey, or a module
                returns a wrong shape.
        """
        if document_starts is not None:
            raise TeacherError(
                "this teacher cannot restart its attention at documents; pack the text without "
                "reset_attention"
            )
        states = self.trunk(tokens.to(self.device))
        if states.shape[:2] != tokens.shape:
            raise TeacherError(
                f"the trunk returned states of shape {tuple(states.shape)} for tokens of shape "
                f"{tuple(tokens.shape)}; expected [B, L, D]"
            )
        for row, of_window in enumerate(states):
            for start in range(0, len(of_window), self.slice_positions):
                positions = slice(start, min(start + self.slice_positions, len(of_window)))
                logits = self.head(of_window[positions])
                if logits.shape != (positions.stop - start, self.vocab_size):
                    raise TeacherError(
                        f"the head returned logits of shape {tuple(logits.shape)}; expected "
                        f"({positions.stop - start}, {self.vocab_size}), as long as token_mask"
                    )
                logits = logits.to(torch.float32, copy=True)  # the receiver may overwrite it
                yield LogitsSlice(row, positions, logits.index_fill_(1, self._not_tokens, -np.inf))
