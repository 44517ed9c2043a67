"""Test that shards are written in the background, completely, in order, and with all errors."""

import pytest

from sparselogits.caching.writer import Writer
from sparselogits.errors import InvalidTargetsError
from sparselogits.store import Cache
from tests.store.draws import identity, records


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache.create(tmp_path / "cache", identity())


def test_the_bytes_are_those_of_committing_at_once(tmp_path, cache):
    other = Cache.create(tmp_path / "other", identity())
    with Writer([cache]) as writer:
        for start in (0, 20, 40):
            made = records("counts", start, start + 20)
            writer.write((start, start + 20), [made], {"threads": 1})
            other.commit(made, {"threads": 1})
    names = sorted(p.name for p in (tmp_path / "other/shards").iterdir())
    assert len(names) == 3
    for name in names:
        first, second = (tmp_path / c / "shards" / name for c in ("cache", "other"))
        assert first.read_bytes() == second.read_bytes()


def test_a_shard_that_is_there_is_left_alone(cache):
    path = cache.commit(records("counts", 0, 20), {"threads": 1})
    before = path.stat()
    with Writer([cache]) as writer:
        writer.write((0, 20), [records("counts", 0, 20)], {"threads": 2})
    assert path.stat() == before


def test_what_fails_is_raised_by_the_next_write(cache):
    wrong = records("counts", 3, 23)[::-1]
    with Writer([cache]) as writer:
        writer.write((0, 20), [wrong], {})
        with pytest.raises(InvalidTargetsError, match="found window 21, expected window 23"):
            writer.write((20, 40), [records("counts", 20, 40)], {})
    assert cache.finished() == []


def test_what_fails_last_is_raised_at_the_end(cache):
    def fail() -> None:
        with Writer([cache]) as writer:
            writer.write((0, 20), [records("counts", 3, 23)[::-1]], {})

    with pytest.raises(InvalidTargetsError, match="found window 21, expected window 23"):
        fail()


def test_an_interruption_passes_on_and_the_shard_on_its_way_is_whole(cache):
    def interrupted() -> None:
        with Writer([cache]) as writer:
            writer.write((0, 20), [records("counts", 0, 20)], {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert cache.finished() == [(0, 20)]
    assert len(cache) == 20
