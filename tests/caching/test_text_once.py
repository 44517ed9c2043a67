"""Test that a build reads its text once, and that resuming reads a bounded part again."""

import pytest

from sparselogits.caching import CacheRequest, begin_job, build_caches, job, shard_ranges
from sparselogits.corpus import PackedCorpus, fingerprint, tokenizer_fingerprint
from sparselogits.errors import IdentityMismatchError
from sparselogits.samplers import Systematic
from sparselogits.store import Cache
from sparselogits.teacher import TransformersTeacher, load_teacher

SHARD = 16


@pytest.fixture
def corpus(cache) -> PackedCorpus:
    return PackedCorpus.open(cache / "corpus")


@pytest.fixture
def engine(teacher_folder, tokenizer) -> TransformersTeacher:
    return load_teacher(str(teacher_folder), tokenizer=tokenizer)


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """The ranges of windows that are read from here on."""
    noted: list[tuple[int, int]] = []
    read = PackedCorpus.read

    def noting(self: PackedCorpus, start: int, stop: int) -> object:
        noted.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(PackedCorpus, "read", noting)
    return noted


def test_the_teacher_s_pass_over_the_text_is_the_only_one(
    tmp_path, corpus, engine, tokenizer, reads, monkeypatch
):
    """Shards carry the fingerprint of their windows, which nobody has read besides."""
    requests = [CacheRequest(tmp_path / name, Systematic(5)) for name in ("a", "b")]
    how = {"tokenizer_hash": tokenizer_fingerprint(tokenizer), "windows_per_shard": SHARD}
    begin_job(engine, corpus, requests, batch=8, **how)
    reads.clear()  # of the pilot
    build_caches(engine, corpus, requests, **how)
    ranges = shard_ranges(corpus.windows, SHARD)
    assert len(ranges) > 8
    assert reads == ranges
    for span in ranges:
        expected = fingerprint(corpus.read(*span))
        for request in requests:
            assert Cache.open(request.root).provenance(span[0])["corpus"] == expected

    reads.clear()
    build_caches(engine, corpus, requests, **how)
    assert reads == ranges, "each finished shard's text, once, and no pass of the teacher"
    monkeypatch.setattr(job, "CHECKED_SHARDS", 3)
    reads.clear()
    build_caches(engine, corpus, requests, **how)
    assert len(reads) == 3
    assert len(set(reads)) == 3


def test_other_text_is_noticed_in_a_sample(tmp_path, corpus, engine, tokenizer, monkeypatch):
    """Text that moved by a window differs in every shard."""
    request = CacheRequest(tmp_path / "cache", Systematic(5))
    how = {"tokenizer_hash": tokenizer_fingerprint(tokenizer), "windows_per_shard": SHARD}
    build_caches(engine, corpus, [request], only=(0, 4 * SHARD), **how)
    monkeypatch.setattr(job, "CHECKED_SHARDS", 1)
    read = PackedCorpus.read
    monkeypatch.setattr(PackedCorpus, "read", lambda self, a, b: read(self, a + 1, b + 1))
    with pytest.raises(IdentityMismatchError, match="built from other text"):
        build_caches(engine, corpus, [request], only=(0, 5 * SHARD), **how)
