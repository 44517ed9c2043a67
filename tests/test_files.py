"""Test that files are complete or absent, whatever happens while they are written."""

import errno
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparselogits import files
from sparselogits.corpus.locate import locate
from sparselogits.errors import InvalidArgumentError, StorageError
from sparselogits.files import (
    clean_leftovers,
    expanded,
    require_new_folder,
    temporary_name,
    whole_folder,
    with_home,
    write_whole,
    writing_whole,
)
from sparselogits.store.storage.local import LocalStorage


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_text_and_bytes_in_a_folder_that_is_made(tmp_path):
    write_whole(tmp_path / "a/b/text", "ä\n")
    write_whole(tmp_path / "a/b/bytes", b"\x00\xff")
    assert (tmp_path / "a/b/text").read_bytes() == "ä\n".encode()
    assert (tmp_path / "a/b/bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a", "a/b", "a/b/bytes", "a/b/text"]


def test_a_name_as_long_as_a_name_may_be(tmp_path):
    write_whole(tmp_path / ("n" * 255), "x")
    with pytest.raises(StorageError, match="shorter path"):
        write_whole(tmp_path / ("n" * 256), "x")


def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "notes"
    path.write_text("before")
    path.chmod(0o600)
    write_whole(path, "after")
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _fail_in_a_file(path: Path) -> None:
    with writing_whole(path) as handle:
        handle.write(b"half")
        raise KeyError


def _fail_in_a_folder(path: Path) -> None:
    with whole_folder(path) as folder:
        write_whole(folder / "half", "half")
        raise KeyError


def test_an_exception_in_the_block_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError):
        _fail_in_a_file(path)
    with pytest.raises(KeyError):
        _fail_in_a_folder(tmp_path / "folder")
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "before"


def _write_piecemeal(path: Path) -> None:
    with writing_whole(path) as handle:
        for _ in range(70):
            handle.write(b"x" * 1000)


def _save(path: Path, save: Callable[[Any, Path], object]) -> None:
    with whole_folder(path) as folder:
        save({"a": torch.zeros(20_000)}, folder / "weights")


def test_a_full_disk_changes_nothing_and_says_what_to_do(small_disk):
    path = small_disk / "file"
    write_whole(path, "before")
    with pytest.raises(StorageError, match=r"disk/file: No space left.*Free space"):
        write_whole(path, "x" * 70_000)
    with pytest.raises(StorageError, match=r"disk/file: No space left.*Free space"):
        _write_piecemeal(path)
    for save in (save_file, torch.save):
        with pytest.raises(StorageError, match=r"disk/model: No space left.*Free space"):
            _save(small_disk / "model", save)
    assert names(small_disk) == ["file"]
    assert path.read_text() == "before"


def test_a_disk_that_may_only_be_read(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"Read-only.*writable"):
        write_whole(small_disk / "file", "x")
    with (
        pytest.raises(StorageError, match=r"Read-only.*writable"),
        whole_folder(small_disk / "folder"),
    ):
        pass


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _link(path: Path) -> None:
    path.with_name("target").write_text("target")
    path.symlink_to("target")


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "link": _link,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "pipe": _pipe,
    "socket": _socket,
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    path = tmp_path / "out"
    KINDS[kind](path)
    before = path.lstat()
    with pytest.raises(
        InvalidArgumentError, match="expected a regular file or a path that does not exist"
    ):
        write_whole(path, "x")
    assert path.lstat().st_ino == before.st_ino
    assert set(names(tmp_path)) <= {"out", "target"}


def test_a_device_is_not_replaced():
    with pytest.raises(InvalidArgumentError, match="/dev/null is a device"):
        write_whole(Path("/dev/null"), "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def _die_while_writing(path: Path) -> None:
    if path.name == "file":
        with writing_whole(path) as handle:
            handle.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    with whole_folder(path) as folder:
        write_whole(folder / "half", "half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, name):
    child = multiprocessing.get_context("fork").Process(
        target=_die_while_writing, args=(tmp_path / name,)
    )
    child.start()
    child.join()
    assert len([n for n in names(tmp_path) if "/" not in n]) == 1
    live = temporary_name(tmp_path / "other")
    live.write_text("of a writer at work")
    write_whole(tmp_path / "file", "whole")
    assert names(tmp_path) == sorted([live.name, "file"])


def test_a_process_with_the_number_of_a_dead_one(tmp_path):
    """Containers that restart give their processes the same numbers again."""
    words = temporary_name(tmp_path / "x").name.split("-")
    reused = "-".join([*words[:3], str(int(words[3]) - 1), words[4]])
    (tmp_path / reused).write_text("half")
    assert clean_leftovers(tmp_path) == [reused]


def test_what_another_machine_left_is_removed_after_a_day(tmp_path):
    fresh = tmp_path / ".tmp-000000000000-1-1-000000000000"
    stale = tmp_path / ".tmp-000000000000-1-1-000000000001"
    busy = tmp_path / ".tmp-000000000000-1-1-000000000002"
    (busy / "shards").mkdir(parents=True)
    for path in (fresh, stale, busy / "shards/new"):
        path.write_text("half")
    old = time.time() - 2 * 86_400
    for path in (stale, busy / "shards", busy):
        os.utime(path, (old, old))
    assert clean_leftovers(tmp_path) == [stale.name]
    assert fresh.exists()
    assert busy.exists()


@pytest.mark.parametrize("name", [".tmp-", ".tmp-notes", ".tmp-0-1-2", "tmp", ".tmp-x-1-1-1"])
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("of somebody")
    os.utime(tmp_path / name, (0, 0))
    assert clean_leftovers(tmp_path) == []
    assert clean_leftovers(tmp_path / "nowhere") == []


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path):
    kept = tmp_path / "kept"
    write_whole(kept / "file", "kept")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    words = temporary_name(tmp_path / "x").name.split("-")
    link = tmp_path / "-".join([*words[:2], str(child.pid), *words[3:]])
    link.symlink_to(kept)
    assert clean_leftovers(tmp_path) == [link.name]
    assert (kept / "file").read_text() == "kept"


def test_a_folder_fills_one_that_is_empty_even_a_mount_point(small_disk):
    for path in (small_disk, small_disk / "new", small_disk / "empty"):
        if path.name == "empty":
            path.mkdir()
        with whole_folder(path) as folder:
            write_whole(folder / "a", "a")
            write_whole(folder / "b/c", "c")
        (small_disk / "a").unlink(missing_ok=True)
        if (small_disk / "b").exists():
            (small_disk / "b/c").unlink()
            (small_disk / "b").rmdir()
    assert names(small_disk) == [
        *("empty", "empty/a", "empty/b", "empty/b/c", "new", "new/a", "new/b", "new/b/c")
    ]


@pytest.mark.parametrize("name", ["lost+found", ".DS_Store", ".nfs00000001"])
def test_what_an_operating_system_leaves_is_not_in_the_way(tmp_path, name):
    (tmp_path / name).mkdir()
    with whole_folder(tmp_path) as folder:
        write_whole(folder / "a", "a")
    assert names(tmp_path) == sorted([name, "a"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_at_the_last_moment(tmp_path, monkeypatch, code):
    """Some disks, and network file systems, tell of a lost write when it is synced."""
    path = tmp_path / "file"
    write_whole(path, "before")

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(StorageError, match=f"file: {os.strerror(code)}"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["file"]


def fail_on_folders(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `os.fsync` fail on folders alone."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_loses_a_rename_is_told(tmp_path, monkeypatch, code):
    fail_on_folders(code, monkeypatch)
    with pytest.raises(StorageError, match=f"file: {os.strerror(code)}"):
        write_whole(tmp_path / "file", "x")
    with pytest.raises(StorageError, match=f"shard: {os.strerror(code)}"):
        LocalStorage(tmp_path).create("shard", b"x")
    assert names(tmp_path) == ["file", "shard"]  # both whole, but perhaps not after a power failure


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch, code):
    fail_on_folders(code, monkeypatch)
    write_whole(tmp_path / "file", "x")
    assert LocalStorage(tmp_path).create("shard", b"x")
    assert names(tmp_path) == ["file", "shard"]


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    assert expanded(Path("a/~")) == Path("a/~")
    message = r"'~nosuchuser/x' begins with a home folder that does not exist .*; give another path"
    for use in (
        expanded,
        lambda path: locate(path, "train"),
        lambda path: locate(path + "*", "train"),
    ):
        with pytest.raises(InvalidArgumentError, match=message.replace("x'", r"x\*?'")):
            use("~nosuchuser/x")


def test_paths_of_command_lines_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"out": "~/a", "cache": ["~/b", "s3://x/~/y", "./~/z"], "name": "~half", "steps": 3}
    assert with_home(given) == {
        **given,
        "out": f"{tmp_path}/a",
        "cache": [f"{tmp_path}/b", *given["cache"][1:]],
    }
    assert with_home("~") == str(tmp_path)
    with pytest.raises(InvalidArgumentError, match="'~nosuchuser/x' begins with a home folder"):
        with_home({"out": "~nosuchuser/x"})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="another user needs root")
def test_a_folder_that_cannot_be_listed_is_written_to():
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chown(folder, nobody, nobody)
        folder.chmod(0o300)
        os.seteuid(nobody)
        try:
            write_whole(folder / "file", "x")
            write_whole(folder / "file", "y")
            assert files.move(folder / "file", folder / "moved")
        finally:
            os.seteuid(0)
        assert (folder / "moved").read_text() == "y"


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"not empty.*contains file"):
        require_new_folder(tmp_path)
    with pytest.raises(InvalidArgumentError, match="is not a folder"):
        require_new_folder(tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InvalidArgumentError, match="is not a folder"):
        require_new_folder(tmp_path / "link")


def _write_many(path: Path, letter: str) -> None:
    for _ in range(20):
        write_whole(path, letter * 10_000)


def test_a_reader_beside_two_writers_sees_one_of_them(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "a" * 10_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, word)) for word in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["file"]


def test_a_disk_that_cannot_sync_a_file_is_written_to(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"
