"""Test that a folder gets one text, for any number of processes, start times and failures."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import files_of

from sparselogits.corpus import PackedCorpus, open_source, pack, packing_for
from sparselogits.corpus.claims import claimed, is_abandoned
from sparselogits.corpus.packed import Paths
from sparselogits.errors import CorpusError, IdentityMismatchError, SparseLogitsError
from sparselogits.locks import Held, lock_file

STARTS = 8
A, B = {"source": {"fingerprint": "a"}}, {"source": {"fingerprint": "b"}}


def texts(folder: Path) -> dict[str, Path]:
    """Two texts of the same lengths."""
    found = {}
    for name in "ab":
        found[name] = folder / f"{name}.txt"
        found[name].write_text("".join(f"{name} line {i}\n" for i in range(400)))
    return found


def pack_text(path: Path, tokenizer: Any, out: Path, at: float = 0.0) -> None:
    packing = packing_for(tokenizer, window_length=16, separator_id=0)
    time.sleep(max(0.0, at - time.monotonic()))
    pack(open_source(path), tokenizer, packing, out, vocab_size=len(tokenizer), part_bytes=1000)


def fork(work: Callable[..., object], *args: object) -> BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=_outcome, args=(work, *args))
    child.start()
    return child


def _outcome(work: Callable[..., object], *args: object) -> None:
    try:
        work(*args)
    except SparseLogitsError:
        os._exit(2)


def test_two_texts_at_once_leave_one(tokenizer, tmp_path):
    """Started together in a new folder, in every order: one is packed, the other is refused."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    paths = texts(tmp_path)
    whole = {}
    for name, path in paths.items():
        pack_text(path, tokenizer, tmp_path / f"whole-{name}")
        whole[name] = files_of(tmp_path / f"whole-{name}")
    assert whole["a"] != whole["b"]
    winners = set()
    for number in range(STARTS):
        out = tmp_path / f"out-{number}"
        at = time.monotonic() + 0.05
        order = "ab" if number % 2 else "ba"
        pair = [fork(pack_text, paths[name], tokenizer, out, at) for name in order]
        for child in pair:
            child.join()
        codes = [child.exitcode for child in pair]
        assert sorted(codes) == [0, 2], codes
        winner = order[codes.index(0)]
        winners.add(winner)
        assert files_of(out) == whole[winner]
    assert winners == {"a", "b"}


def test_workers_of_one_build_share_a_folder(tokenizer, tmp_path):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    path = texts(tmp_path)["a"]
    pack_text(path, tokenizer, tmp_path / "whole")
    workers = [fork(pack_text, path, tokenizer, tmp_path / "out") for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _claim_and_hold(folder: Path, made_from: dict[str, Any], ready: Any) -> None:
    with claimed(Paths(folder), made_from):
        ready.set()
        time.sleep(60)


def held_elsewhere(folder: Path, made_from: dict[str, Any]) -> BaseProcess:
    ready = multiprocessing.get_context("fork").Event()
    child = fork(_claim_and_hold, folder, made_from, ready)
    assert ready.wait(30)
    return child


def kill(child: BaseProcess) -> None:
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def take(folder: Path, made_from: dict[str, Any]) -> None:
    with claimed(Paths(folder), made_from):
        pass


def test_a_claim_is_renewed_when_its_maker_is_dead(tmp_path):
    paths = Paths(tmp_path / "out")
    child = held_elsewhere(paths.folder, A)
    assert not is_abandoned(paths)
    take(paths.folder, A)
    with pytest.raises(IdentityMismatchError, match=r"source.fingerprint: 'a' there, 'b' now"):
        take(paths.folder, B)
    assert b'"a"' in paths.made_from.read_bytes()
    kill(child)
    assert is_abandoned(paths)
    paths.holdout.mkdir()
    (paths.holdout / "part-00000000.parquet").write_text("a table of the text before")
    take(paths.folder, B)
    assert b'"b"' in paths.made_from.read_bytes()
    assert not paths.holdout.exists()


def test_a_claim_with_a_finished_part_is_never_renewed(tmp_path):
    paths = Paths(tmp_path / "out")
    kill(held_elsewhere(paths.folder, A))
    paths.training.mkdir()
    (paths.training / "part-00000000.parquet").write_text("finished")
    assert not is_abandoned(paths)
    with pytest.raises(IdentityMismatchError, match=r"if no process is packing.*delete"):
        take(paths.folder, B)


def test_parts_of_an_unknown_text_are_not_taken_for_this_one(tmp_path):
    paths = Paths(tmp_path / "out")
    paths.training.mkdir(parents=True)
    (paths.training / "part-00000000.parquet").write_text("of some text")
    with pytest.raises(CorpusError, match=r"no corpus.json.*delete the folder"):
        take(paths.folder, A)
    assert (paths.training / "part-00000000.parquet").exists()


def test_a_damaged_description_is_reported(tmp_path):
    paths = Paths(tmp_path / "out")
    paths.folder.mkdir()
    paths.made_from.write_text('{"source": 3}')
    with pytest.raises(CorpusError, match=r"corpus\.json is damaged .*\. Delete .*out and pack"):
        take(paths.folder, A)


def test_without_locks_a_claim_is_never_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr("sparselogits.locks.fcntl", None)
    take(tmp_path / "out", A)
    take(tmp_path / "out", A)
    assert not is_abandoned(Paths(tmp_path / "out"))
    with pytest.raises(IdentityMismatchError):
        take(tmp_path / "out", B)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Lustre without -o flock, and NFS without its lock daemon, answer so."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("sparselogits.locks.fcntl.flock", flock)
    take(tmp_path / "out", A)
    with lock_file(tmp_path / "lock") as lock:
        assert lock.held is Held.UNSUPPORTED
    with pytest.raises(IdentityMismatchError):
        take(tmp_path / "out", B)


def test_no_lock_file_stays_beside_a_complete_corpus(tokenizer, tmp_path):
    path = texts(tmp_path)["a"]
    pack_text(path, tokenizer, tmp_path / "out")
    pack_text(path, tokenizer, tmp_path / "out")
    assert not Paths(tmp_path / "out").lock.exists()
    assert PackedCorpus.open(tmp_path / "out").windows


def _hold(path: Path, ready: Any, alone: bool) -> None:
    with lock_file(path, alone=alone):
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize(("alone", "expected"), [(True, Held.TAKEN), (False, Held.SHARED)])
def test_a_lock_of_another_process(tmp_path, alone, expected):
    ready = multiprocessing.get_context("fork").Event()
    child = fork(_hold, tmp_path / "lock", ready, alone)
    assert ready.wait(30)
    with lock_file(tmp_path / "lock") as lock:
        assert lock.held is Held.TAKEN
    with lock_file(tmp_path / "lock", alone=False) as lock:
        assert lock.held is expected
    kill(child)
    with lock_file(tmp_path / "lock") as lock:
        assert lock.held is Held.ALONE
    assert not (tmp_path / "lock").exists()


def test_a_lock_file_that_was_removed_is_made_anew(tmp_path):
    """Two processes never both hold a lock because one of them has an old file open."""
    path = tmp_path / "lock"
    with lock_file(path) as first:
        first.remove()
        with lock_file(path) as second:  # of the new file
            assert second.held is Held.ALONE
            with lock_file(path) as third:
                assert third.held is Held.TAKEN
