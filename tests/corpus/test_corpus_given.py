"""Test text given as `datasets` objects and iterables, compared with files."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tests.conftest import tiny_llama, write_lines

from sparselogits.caching import CacheRequest, build_caches, place_of_text
from sparselogits.corpus import fingerprint, open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.errors import CorpusError, IdentityMismatchError, StorageError
from sparselogits.samplers import Systematic
from sparselogits.teacher import TransformersTeacher

VOCAB = 700


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def rows(stories: list[str]) -> list[dict[str, Any]]:
    return [{"id": number, "text": story} for number, story in enumerate(stories)]


GIVEN = {
    "list": rows,
    "generator": lambda stories: iter(rows(stories)),
    "dataset": lambda stories: Dataset.from_list(rows(stories)),
    "part of a dataset": lambda stories: Dataset.from_list([*rows(stories), {"text": "no"}]).select(
        range(len(stories))
    ),
    "dataset of tensors": lambda stories: Dataset.from_list(rows(stories)).with_format("numpy"),
    "splits": lambda stories: DatasetDict({"train": Dataset.from_list(rows(stories))}),
    "iterable": lambda stories: Dataset.from_list(rows(stories)).to_iterable_dataset(),
    "stream": lambda stories: IterableDataset.from_generator(lambda: iter(rows(stories))),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_same_records_are_the_same_source(stories, kind):
    source = open_source(GIVEN[kind](stories))
    assert list(source.documents()) == stories
    assert source.fingerprint == open_source(rows(stories)).fingerprint
    # columns that hold no text do not matter; one letter does
    assert source.fingerprint == open_source([{"text": s} for s in stories]).fingerprint
    assert source.fingerprint != open_source(rows([*stories[:-1], "other"])).fingerprint


def test_windows_of_a_dataset_are_those_of_its_file(tmp_path, stories, tokenizer):
    packing = packing_for(tokenizer, window_length=64, holdout=0.2)
    file = write_lines(tmp_path / "stories.jsonl", rows(stories))
    made = [
        pack(open_source(given), tokenizer, packing, tmp_path / name, vocab_size=VOCAB)
        for name, given in (("a", file), ("b", Dataset.from_list(rows(stories))))
    ]
    there, here = (corpus.read(0, corpus.windows) for corpus in made)
    assert fingerprint(there) == fingerprint(here)
    assert np.array_equal(made[0].token_frequencies, made[1].token_frequencies)


def test_a_cache_from_a_dataset_goes_on_with_an_equal_one(tmp_path, stories, tokenizer):
    engine = TransformersTeacher(
        tiny_llama(vocab_size=VOCAB), identity={"name": "t", "weights": "w"}
    )
    packing = packing_for(tokenizer, window_length=64)
    out = tmp_path / "cache"

    def build(records: Any, only: tuple[int, int] | None = None) -> Any:
        source = open_source(records)
        place = place_of_text(out, source, packing, append=False)
        corpus = pack(source, tokenizer, packing, place.folder, vocab_size=VOCAB)
        return build_caches(
            engine,
            corpus,
            [CacheRequest(out, Systematic(4))],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            windows_per_shard=16,
            only=only,
        )

    first = build(Dataset.from_list(rows(stories)), (0, 16))
    assert first.windows_built == 16
    again = build(IterableDataset.from_generator(lambda: iter(rows(stories))))
    assert again.windows_found == 16
    assert again.windows_built > 16
    with pytest.raises(IdentityMismatchError, match="begun with other text"):
        build(Dataset.from_list(rows(stories[1:])))


MISTAKES = {
    "no records": ([], "empty"),
    "no text": ([{"body": "x"}], "record 0 has no field `text`"),
    "strings": (["x"], "record 0 is a str"),
    "bytes": ({"text": b"x"}, "no split `train`"),
    "images": ([{"text": "x"}, {"text": b"x"}], "record 1 contains a value that is not text"),
    "surrogate": ([{"text": "\ud800"}], "record 0 contains a value that is not text"),
    "number": (7, "cannot read text from a int"),
    "other splits": (DatasetDict({"test": Dataset.from_list([{"text": "x"}])}), "splits are test"),
}


def test_a_split_of_records_without_splits():
    records = [{"text": "a"}]
    with pytest.raises(CorpusError, match="records have no split `test`"):
        open_source(records, split="test")
    given = Dataset.from_list(records, split="test")
    assert list(open_source(given, split="test").documents()) == ["a"]
    with pytest.raises(CorpusError, match="records have no split `valid`"):
        open_source(given, split="valid")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    records, said = MISTAKES[mistake]
    with pytest.raises(CorpusError, match=said):
        open_source(records, work=tmp_path / "work")
    assert not list((tmp_path / "work").glob("*"))  # nothing is left lying


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*/file"):
        open_source([{"text": "x"}], work=tmp_path / "file")
