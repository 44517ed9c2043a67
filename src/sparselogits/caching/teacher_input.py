"""Define the teacher's input for a window: its tokens, or corrupted tokens for a masked model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparselogits.corpus import Window
from sparselogits.corruption import Corrupted, Corruption
from sparselogits.objectives import CAUSAL, IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class TeacherInput:
    """Input of the teacher for one window.

    Args:
        window: window of text.
        inputs: token ids of the input, int64 [L].
        labels: int64 [L], the token that each position predicts; -100 if there is none.
        carries: bool [L], True for positions with a target.
        length: number of tokens before the padding; L if the window has none.
        corrupted: corruption of the window; None if the input is the text itself.
    """

    window: Window
    inputs: Tensor
    labels: Tensor
    carries: Tensor
    length: int
    corrupted: Corrupted | None

    @classmethod
    def of(cls, window: Window, corruption: Corruption | None) -> TeacherInput:
        """Create the input for a window; `corruption` is None for a causal teacher.

        Raises:
            InvalidArgumentError: the corruption chooses whole words, but the tokenizer does not
                mark word boundaries.
        """
        if corruption is None:
            carries = np.ones(len(window.tokens), np.bool_) if window.mask is None else window.mask
            inputs, labels, corrupted = window.tokens, CAUSAL.labels(window.tokens), None
            if window.text_length is not None:  # the padding after the text is not predicted
                padding = np.arange(len(labels)) >= window.text_length
                labels[CAUSAL.at_positions(padding, True)] = IGNORE_INDEX
        else:
            corrupted = corruption(window.tokens, window.index, learnt=window.learnt)
            inputs, carries = corrupted.inputs, corrupted.chosen
            labels = corruption.objective.labels(window.tokens, carries)
        return cls(
            window,
            torch.from_numpy(inputs.astype(np.int64)),
            torch.from_numpy(labels),
            torch.from_numpy(carries),
            len(window.tokens) if window.text_length is None else window.text_length,
            corrupted,
        )
