"""Test that the numbers in the text of the documentation are those of the stored results."""

import pytest
from experiments.sentences import PAGES, missing


@pytest.mark.parametrize("page", PAGES)
def test_the_passages_of_a_page_are_computed_from_the_stored_results(page):
    assert missing(page) == []
