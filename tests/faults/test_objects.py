"""Test a failing object store: lost responses, errors, truncated bodies, killed builders."""

import multiprocessing
import os
import random
import time
from multiprocessing.process import BaseProcess

import pytest

from sparselogits.errors import IdentityMismatchError, StorageError
from sparselogits.store import Cache, verify
from sparselogits.store.cache import same_record
from sparselogits.store.storage.objects import ObjectStorage
from tests.faults.builds import RANGES, WINDOWS, undisturbed
from tests.store.draws import identity, record
from tests.store.s3 import CONFLICT, DROP_AFTER, DROP_BEFORE, DROP_MIDWAY, REFUSE, S3, S3Server

FAULTS = (REFUSE, DROP_BEFORE, DROP_AFTER, DROP_MIDWAY)


def build(url: str, *, reverse: bool = False, seed: int = 0) -> None:
    cache = Cache.create(url, identity(seed=seed))
    for r in sorted(set(RANGES) - set(cache.finished()), reverse=reverse):
        cache.commit(WINDOWS[r], {"batch": 4})


@pytest.mark.parametrize("fault", [*FAULTS, CONFLICT])
def test_a_build_gets_through_failing_puts(tmp_path, shaky_s3, fault):
    assert shaky_s3.proxy is not None
    shaky_s3.proxy.fail("PUT", fault, fault, fault)
    build(shaky_s3.url)
    assert shaky_s3.proxy.failed[fault] == 3
    assert shaky_s3.objects() == undisturbed(tmp_path / "whole")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_gets_through_failing_gets(shaky_s3, fault):
    assert shaky_s3.proxy is not None
    build(shaky_s3.url)
    shaky_s3.proxy.fail("GET", fault, fault)  # cache.json and the listing
    cache = Cache.open(shaky_s3.url)
    assert len(cache) == 12
    for i in (0, 5, 11):
        shaky_s3.proxy.fail("GET", fault)
        assert same_record(cache.read(i), record("counts", i))
    assert shaky_s3.proxy.failed[fault] == 5


def test_a_store_that_stays_away_is_an_error_and_costs_nothing(tmp_path, shaky_s3, monkeypatch):
    assert shaky_s3.proxy is not None
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    cache = Cache.create(shaky_s3.url, identity())
    shaky_s3.proxy.fail("PUT", *[REFUSE] * 50)
    with pytest.raises(StorageError, match="cannot write s3://"):
        cache.commit(WINDOWS[0, 4], {"batch": 4})
    shaky_s3.proxy.fail("PUT", clear=True)
    assert cache.finished() == []
    build(shaky_s3.url)
    assert shaky_s3.objects() == undisturbed(tmp_path / "whole")


def _start(url: str, *, reverse: bool) -> BaseProcess:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=build, args=(url,), kwargs={"reverse": reverse})
    child.start()
    return child


def killed_on_s3_at_random(server: S3Server, moments: int, writers: int, seed: int) -> int:
    """Kills a group of writers at each of many random moments; returns writers killed at work.

    What stands there at any time is whole; a build that goes on ends with the objects of an
    undisturbed one.
    """
    whole = S3.reached(server, os.environ.__setitem__)
    build(whole.url)
    expected, begun = whole.objects(), time.monotonic()
    children = [_start(f"{whole.url}-timed", reverse=bool(i % 2)) for i in range(writers)]
    for child in children:
        child.join(60)
    chance, hits, longest = random.Random(seed), 0, time.monotonic() - begun
    for _ in range(moments):
        s3 = S3.reached(server, os.environ.__setitem__)
        children = [_start(s3.url, reverse=bool(i % 2)) for i in range(writers)]
        time.sleep(chance.uniform(0, longest))
        for child in children:
            hits += child.is_alive()
            child.kill()
        for child in children:
            child.join(60)
        assert s3.objects().items() <= expected.items(), "an object stood there but not whole"
        build(s3.url)
        assert s3.objects() == expected
    return hits


@pytest.mark.parametrize("writers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_random_moments(s3_server, s3, monkeypatch, writers):
    assert killed_on_s3_at_random(s3_server, 3, writers, seed=writers) > 0


def _build_as(url: str, seed: int, results: object) -> None:
    try:
        build(url, seed=seed)
        results.put((seed, "built"))
    except IdentityMismatchError as error:
        results.put((seed, str(error)))


def test_of_builds_that_differ_one_gets_the_prefix(s3):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    for seed in range(2):
        context.Process(target=_build_as, args=(s3.url, seed, results)).start()
    said = [results.get(timeout=60) for _ in range(2)]
    winner = Cache.open(s3.url).identity.seed
    assert {seed for seed, word in said if word == "built"} == {winner}
    assert all("seed" in word for seed, word in said if seed != winner)
    assert verify(Cache.open(s3.url), stop=12).ok


def test_a_put_whose_answer_was_lost_finds_its_own_object(shaky_s3):
    assert shaky_s3.proxy is not None
    storage = ObjectStorage(shaky_s3.url)
    assert storage.create("shards/w", b"the first")
    shaky_s3.proxy.fail("PUT", DROP_AFTER)
    assert storage.create("shards/x", b"whole") is False
    assert storage.read("shards/x") == b"whole"


def test_a_server_that_ignores_the_condition_is_refused(shaky_s3):
    assert shaky_s3.proxy is not None
    shaky_s3.proxy.ignores_conditions = True
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        Cache.create(shaky_s3.url, identity())
