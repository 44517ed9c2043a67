"""Test that packing killed at any moment resumes and ends with the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.conftest import files_of, write_lines

from sparselogits.corpus import PackedCorpus, Packing, Source, open_source, pack, packer
from sparselogits.errors import CorpusError, IdentityMismatchError, StorageError

PACKING = Packing(64, 0, None, holdout=0.2)
fork = multiprocessing.get_context("fork")


@pytest.fixture
def source(tmp_path, stories) -> Source:
    path = write_lines(tmp_path / "stories.jsonl", ({"text": text} for text in stories))
    return open_source(path)


@pytest.fixture
def small_batches(monkeypatch) -> None:
    """So that progress is reported, and the kill can fall, many times within a part."""
    monkeypatch.setattr(packer, "_BATCH_BYTES", 500)


def run(source: Source, tokenizer: object, out: Path, **options: object) -> PackedCorpus:
    return pack(source, tokenizer, PACKING, out, vocab_size=600, part_bytes=8000, **options)


def killed_at(moment: int, source: Source, tokenizer: object, out: Path) -> None:
    """Pack in a child that SIGKILLs itself at its `moment`-th report of progress."""

    def packs() -> None:
        calls = iter(range(1 << 30))

        def progress(done: int, total: int | None) -> None:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        run(source, tokenizer, out, progress=progress)
        os._exit(0)

    child = fork.Process(target=packs)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.usefixtures("small_batches")
def test_killed_at_ten_random_moments(source, tokenizer, tmp_path):
    reports: list[int] = []
    run(source, tokenizer, tmp_path / "whole", progress=lambda done, _: reports.append(done))
    expected = files_of(tmp_path / "whole")
    assert len(reports) > 50
    for moment in random.Random(11).sample(range(len(reports)), 10):
        out = tmp_path / f"killed at {moment}"
        killed_at(moment, source, tokenizer, out)
        kept = {path: path.stat().st_ino for path in out.rglob("part-*.parquet")}
        corpus = run(source, tokenizer, out)
        assert files_of(out) == expected, moment
        assert all(path.stat().st_ino == inode for path, inode in kept.items())
        assert corpus.windows > 0


def test_workers_end_with_a_killed_parent(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    parent = fork.Process(target=run, args=(source, tokenizer, out), kwargs={"processes": 2})
    parent.start()
    deadline = time.monotonic() + 60
    while not list(out.glob("training/part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(parent.pid).children(recursive=True)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in alive)
    run(source, tokenizer, out)
    run(source, tokenizer, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_interrupt_ends_the_workers_at_once(source, tokenizer, tmp_path):
    def progress(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, tokenizer, out, processes=2, progress=progress)
    assert not multiprocessing.active_children()
    assert not [name for name in files_of(out) if ".tmp-" in name]
    run(source, tokenizer, out)
    run(source, tokenizer, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


def test_text_changed_meanwhile_is_noticed(source, tokenizer, tmp_path):
    killed_at(3, source, tokenizer, tmp_path / "out")
    before = files_of(tmp_path / "out")
    before.pop("lock", None)  # of the dead process; the next one removes it
    [file] = source.files
    file.path.write_text(file.path.read_text() + json.dumps({"text": "more"}))
    with pytest.raises(IdentityMismatchError, match=r"source\.fingerprint"):
        run(open_source(file.path), tokenizer, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_a_failed_first_attempt_is_not_in_the_way(tokenizer, tmp_path, stories):
    path = write_lines(tmp_path / "body.jsonl", ({"body": text} for text in stories))
    with pytest.raises(CorpusError, match="no field `text`"):
        run(open_source(path), tokenizer, tmp_path / "out")
    corpus = run(open_source(path, text_field="body"), tokenizer, tmp_path / "out")
    assert corpus.summary.documents + corpus.summary.holdout_documents == len(stories)


def test_a_full_disk_keeps_what_is_finished(source, tokenizer, tmp_path, monkeypatch):
    out, fsync, calls = tmp_path / "out", os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*Free space.*same command again"):
        run(source, tokenizer, out)
    monkeypatch.undo()
    kept = files_of(out)
    assert any(name.startswith("training/part-") for name in kept)
    assert not any(".tmp-" in name for name in kept)
    run(source, tokenizer, out)
    run(source, tokenizer, tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")
    assert kept.items() <= files_of(out).items()
