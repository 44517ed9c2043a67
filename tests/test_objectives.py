"""What positions predict: shifts in both directions, and labels."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselogits.objectives import IGNORE_INDEX, Causal


@given(st.lists(st.integers(0, 99), max_size=20))
def test_every_token_but_the_first_comes_back_from_the_position_that_predicts_it(values):
    tokens = np.array(values, np.int64)
    positions = Causal().at_positions(tokens, -1)
    assert positions.tolist() == [*values[1:], -1][: len(values)]
    assert Causal().at_tokens(positions, -1).tolist() == [-1, *values[1:]][: len(values)]
    assert tokens.tolist() == values


def test_arrays_and_tensors_of_windows_are_shifted_along_their_last_axis():
    tokens = torch.arange(6).view(2, 3)
    assert Causal().at_positions(tokens, -1).tolist() == [[1, 2, -1], [4, 5, -1]]
    assert Causal().at_tokens(tokens.numpy(), 9).tolist() == [[9, 0, 1], [9, 3, 4]]


def test_masked_positions_and_first_tokens_of_documents_have_no_label():
    tokens = np.arange(10, 16, dtype=np.int32)
    mask = np.array([True, False, True, True, True, True])
    starts = np.array([0, 4], np.int32)
    none = IGNORE_INDEX
    assert Causal().labels(tokens).tolist() == [11, 12, 13, 14, 15, none]
    assert Causal().labels(tokens, mask).tolist() == [11, none, 13, 14, 15, none]
    assert Causal().labels(tokens, mask, starts).tolist() == [11, none, 13, none, 15, none]
