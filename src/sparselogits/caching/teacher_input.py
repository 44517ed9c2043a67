"""Define how the teacher reads a window: as text, or corrupted for a masked language model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparselogits.corpus import Window
from sparselogits.corruption import Corrupted, Corruption
from sparselogits.errors import InvalidArgumentError
from sparselogits.objectives import CAUSAL


@dataclass(frozen=True, eq=False)
class TeacherInput:
    """A window as the teacher reads it.

    Args:
        window: the window of text.
        inputs: int64 [L], the tokens that the teacher reads.
        labels: int64 [L], the token that each position predicts; -100 where there is none.
        carries: bool [L], true where the position carries a target.
        corrupted: the corruption of the window; None if the teacher reads the text.
    """

    window: Window
    inputs: Tensor
    labels: Tensor
    carries: Tensor
    corrupted: Corrupted | None

    @classmethod
    def of(cls, window: Window, corruption: Corruption | None) -> TeacherInput:
        """Return a window as the teacher reads it.

        Raises:
            InvalidArgumentError: the window is to be corrupted, and has positions that are not to
                be learnt, or words are to be chosen that its tokenizer does not mark.
        """
        if corruption is None:
            carries = np.ones(len(window.tokens), np.bool_) if window.mask is None else window.mask
            inputs, labels, corrupted = window.tokens, CAUSAL.labels(window.tokens), None
        elif window.mask is not None:
            raise InvalidArgumentError(
                f"window {window.index} has tokens that are not to be learnt, as conversations "
                "have, and windows for a masked language model are corrupted everywhere; expected "
                "plain text. Use text without roles, or a causal teacher"
            )
        else:
            corrupted = corruption(window.tokens, window.index)
            inputs, carries = corrupted.inputs, corrupted.chosen
            labels = corruption.objective.labels(window.tokens, carries)
        return cls(
            window,
            torch.from_numpy(inputs.astype(np.int64)),
            torch.from_numpy(labels),
            torch.from_numpy(carries),
            corrupted,
        )
