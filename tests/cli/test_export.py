"""Test `sparselogits export` in every format."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from sparselogits import CacheDataset


@pytest.fixture(params=["pipe", "terminal"])
def shown_on(request, monkeypatch) -> str:
    """Where progress goes: the display on a terminal holds locks that lines in a pipe do not."""
    if request.param == "terminal":
        monkeypatch.setattr("sparselogits.console._can_draw_bar", lambda: True)
    return request.param


@pytest.mark.usefixtures("shown_on")
@pytest.mark.parametrize("form", ["lists", "topk", "datasets"])
def test_a_format_is_written_and_read_back(form, cache, tmp_path, monkeypatch, line):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "unused"))
    out = tmp_path / "out"
    assert line("export", cache, "--out", out, "--format", form).code == 0
    expected = CacheDataset(cache)
    if form == "datasets":
        from datasets import load_from_disk

        rows = load_from_disk(str(out)).to_list()
        assert not list(out.glob(".work*")), "an intermediate copy was left behind"
    else:
        rows = [row for path in sorted(out.iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(expected)
    targets = expected[3]["targets"]
    assert rows[3]["tokens"] == expected[3]["input_ids"].tolist()
    first = targets[0:1]
    if form == "topk":
        heaviest = sorted(np.exp(rows[3]["top_logprobs"][0]), reverse=True)[: first.entries]
        assert np.allclose(heaviest, sorted(first.weights.tolist(), reverse=True))
    else:
        assert rows[3]["ids"][0] == first.ids.tolist()
        assert np.float32(rows[3]["weights"][0]).tolist() == first.weights.tolist()


@pytest.mark.parametrize(
    "words",
    [
        ("export", "{cache}"),
        ("draft-vocabulary", "{cache}", "--size", "8"),
        ("view", "{cache}"),
        ("report", "{cache}"),
        ("train", "--cache", "{cache}", "--student-config", "tiny"),
    ],
    ids=lambda words: words[0],
)
def test_a_url_is_no_name_of_a_local_folder(words, cache, tmp_path, monkeypatch, line):
    """It became a folder named `s3:` in the current one, so the results were not where named."""
    monkeypatch.chdir(tmp_path)
    found = line(*(word.format(cache=cache) for word in words), "--out", "s3://bucket/x")
    assert found.code == 2
    assert "s3:/bucket/x is a URL; expected a path on this machine" in found.err
    assert not list(tmp_path.iterdir())
