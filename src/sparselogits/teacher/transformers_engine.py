"""Use a transformers language model, causal or masked, as a teacher.

The trunk runs over a batch of windows; the head runs over slices of at most `slice_positions`
positions, so that the logits of one slice are in memory at a time. If a model cannot be split into
trunk and head (see `language_model`), the model's forward pass runs one window at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.documents import Documents, require_masked_padding, restarting_positions
from sparselogits.errors import SparseLogitsWarning, TeacherError
from sparselogits.language_model import Head, output_columns, split
from sparselogits.positions import check_window, positions_explained
from sparselogits.teacher.engine import LogitsSlice

SLICE_POSITIONS = 256
"""Default number of positions for which logits are in memory at a time."""

REMEMBERED_BYTES = 1 << 28
"""Maximum size in bytes of the hidden states that `TransformersTeacher.remembering` caches."""


class TransformersTeacher:
    """Teacher that runs a transformers model in this process.

    Args:
        model: a transformers language model, causal or masked; it is set to eval mode.
        token_mask: bool [V], true for ids that are tokens of the tokenizer; None if all ids are.
        identity: description of the teacher, see `Identity.teacher`.
        slice_positions: number of positions for which logits are in memory at a time.

    Raises:
        TeacherError: the model has no language-model head, or `token_mask` has another shape.
        InvalidArgumentError: the model is an encoder-decoder (BART).

    Warns:
        SparseLogitsWarning: the model cannot be split into trunk and head, so the logits of a whole
            window are in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        token_mask: Tensor | None = None,
        identity: dict[str, Any],
        slice_positions: int = SLICE_POSITIONS,
    ) -> None:
        self.model = model.eval()
        self.device = entrance(model)
        self.identity = identity
        self.slice_positions = slice_positions
        embeddings = getattr(model, "get_output_embeddings", lambda: None)()
        if embeddings is None:
            raise TeacherError(
                f"{type(model).__name__} has no language-model head; give a causal or a masked "
                "language model (AutoModelForCausalLM, AutoModelForMaskedLM)"
            )
        parts = split(model)
        if parts is None:
            warnings.warn(
                f"{type(model).__name__}: head and trunk cannot be run separately; the model's own "
                "forward pass is used, which allocates the logits of a whole window. If memory is "
                "insufficient, use shorter windows",
                SparseLogitsWarning,
                stacklevel=2,
            )
        self._parts = parts
        self.vocab_size = output_columns(model)
        mask = torch.ones(self.vocab_size, dtype=torch.bool) if token_mask is None else token_mask
        if mask.shape != (self.vocab_size,):
            raise TeacherError(
                f"token_mask has shape {tuple(mask.shape)}; expected ({self.vocab_size},), one "
                "element per column of the logits"
            )
        self.token_mask = mask
        self._not_tokens = (~mask).nonzero().flatten().to(self.device)
        self._remembers = False
        self._remembered: dict[tuple[bytes, ...], Tensor] = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Cache the hidden states of batches that are run within a `with` block.

        Use this for text on which several students are evaluated in turn: if the same batch of
        windows is run again within such a block, only the head is computed, and the logits are
        bitwise equal. The cache occupies up to `REMEMBERED_BYTES` and exists as long as the
        teacher. Batches that do not fit into the cache are run each time, and so are all batches of
        a model that cannot be split into trunk and head.
        """
        self._remembers = True
        try:
            yield
        finally:
            self._remembers = False

    @property
    def head(self) -> Head | None:
        """Head of the model; None if the model cannot be split."""
        return None if self._parts is None else self._parts.bound_head()

    @cached_property
    def documents(self) -> Documents:
        """Method by which the model runs packed windows, probed at the first access."""
        return Documents.probe(self.model, self._run)

    def check_window(self, length: int, *, restarts: bool = False) -> None:
        """Validate that the model can run windows of a given length.

        The arguments and errors are those of `positions.check_window`.
        """
        check_window(self.model, self._run, length, restarts=restarts)

    def check_padding(self) -> None:
        """Validate that padding changes no output; see `documents.require_masked_padding`."""
        require_masked_padding(self.model, self._run)

    @torch.no_grad()
    def hidden(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states [B, L, D] of windows, in the model's dtype.

        The arguments are those of `Engine.logits`.

        Raises:
            TeacherError: the model cannot be split into trunk and head.
            InvalidArgumentError: the model cannot separate the documents of a window, or fails
                because a window is longer than its positions.
        """
        if self._parts is None:
            raise TeacherError(
                "the trunk of this teacher cannot be run without its head; use its logits instead"
            )
        if not self._remembers:
            return self._forward(tokens, document_starts, attention_mask)
        starts = () if document_starts is None else map(np.ndarray.tobytes, document_starts)
        mask = b"" if attention_mask is None else attention_mask.cpu().numpy().tobytes()
        key = (str(tuple(tokens.shape)).encode(), tokens.cpu().numpy().tobytes(), mask, *starts)
        found = self._remembered.get(key)
        if found is None:
            found = self._forward(tokens, document_starts, attention_mask)
            kept = sum(states.nbytes for states in self._remembered.values())
            if kept + found.nbytes <= REMEMBERED_BYTES:
                self._remembered[key] = found
        return found

    def logits(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`."""
        return self.logits_at(tokens, document_starts, None, attention_mask)

    @torch.no_grad()
    def logits_at(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None,
        wanted: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[LogitsSlice]:
        """Yield the logits of wanted positions; see `engine.logits_at`."""
        head = self.head
        for row, states in self._states_by_window(tokens, document_starts, attention_mask):
            for start in range(0, len(states), self.slice_positions):
                positions = slice(start, min(start + self.slice_positions, len(states)))
                rows = states[positions]
                if wanted is not None and not bool((kept := wanted[row, positions]).all()):
                    rows = rows[kept.to(rows.device)]
                logits = rows.float() if head is None else head(rows)
                # a model on several devices returns logits on its last one
                not_tokens = self._not_tokens.to(logits.device)
                yield LogitsSlice(row, positions, logits.index_fill_(1, not_tokens, -torch.inf))

    def _states_by_window(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None,
        attention_mask: Tensor | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each window's index and hidden states, or logits if the model is not split."""
        if self._parts is not None:
            yield from enumerate(self.hidden(tokens, document_starts, attention_mask))
            return
        for row in range(len(tokens)):  # one by one, because logits need much memory
            own = slice(row, row + 1)
            starts = None if document_starts is None else document_starts[own]
            mask = None if attention_mask is None else attention_mask[own]
            yield row, self._forward(tokens[own], starts, mask)[0]

    def _forward(
        self,
        tokens: Tensor,
        document_starts: Sequence[np.ndarray] | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Return hidden states [B, L, D], or logits [B, L, V] if the model is not split."""
        tokens = tokens.to(self.device)
        mask: dict[str, Any] = {}
        if attention_mask is not None:
            mask["attention_mask"] = attention_mask.to(self.device)
        with positions_explained(self.model, tokens.shape[1]):
            if document_starts is None or all(not np.any(starts) for starts in document_starts):
                return self._run(input_ids=tokens, **mask)
            positions = restarting_positions(tokens.shape[1], document_starts)
            return self.documents.run(self._run, tokens, positions, **mask)

    def _run(self, **inputs: Any) -> Tensor:
        """Run one forward pass; return hidden states, or logits if the model is not split."""
        if self._parts is None:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
            # an adapter may prepend a learned prompt, which has logits as well
            return logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
        return self._parts.states(**inputs)


def entrance(model: nn.Module) -> torch.device:
    """Return the device for input tokens: that of the first weight that is not offloaded.

    If all weights are offloaded, this is the device on which accelerate runs the model.
    """
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")
