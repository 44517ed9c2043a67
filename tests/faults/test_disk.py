"""Test a full disk, a read-only one, too many open files, differing builds, a jumping clock.

The first two need root for a small tmpfs, and are skipped without it.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparselogits.errors import CacheError, IdentityMismatchError, StorageError
from sparselogits.store import Cache, repair, verify
from tests.conftest import files_of
from tests.faults.builds import WINDOWS, build, undisturbed
from tests.store.draws import identity

FIRST = "shards/windows-000000000000-000000000004.parquet"


def fill(disk: Path, ballast: Path, *, leaving: int) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast.write_bytes(b"x" * (free - leaving))


@pytest.mark.parametrize("file", range(5))
def test_a_full_disk_leaves_nothing_half_done(tmp_path, small_disk, file):
    """Full at cache.json, at the card, and at each of three shards."""
    root, ballast = small_disk / "c", small_disk / "ballast"
    whole = undisturbed(tmp_path / "one")
    sizes = [len(whole["cache.json"]), len(whole["README.md"]), *[len(whole[FIRST])] * 3]
    pages = sum(-(-size // 4096) for size in sizes[:file])
    fill(small_disk, ballast, leaving=4096 * pages + 2048)
    with pytest.raises(CacheError, match="No space left"):
        build(root)
    left = files_of(root) if root.exists() else {}
    assert left.items() <= whole.items()
    ballast.unlink()
    build(root)
    assert files_of(root) == whole
    assert verify(Cache.open(root), stop=12).ok


def test_a_disk_that_turns_read_only(tmp_path, small_disk):
    root = small_disk / "c"
    cache = Cache.create(root, identity())
    first, *rest = WINDOWS.values()
    cache.commit(first, {"batch": 4})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CacheError, match="Read-only"):
        cache.commit(rest[0], {"batch": 4})
    assert verify(Cache.open(root)).ok
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    build(root)
    assert files_of(root) == undisturbed(tmp_path / "whole")


@pytest.fixture
def exfat(tmp_path) -> Iterator[Path]:
    """A file system without hard links."""
    if not (shutil.which("mkfs.exfat") and shutil.which("mount.exfat-fuse") and os.geteuid() == 0):
        pytest.skip("needs root, exfat-fuse and exfatprogs")
    image, path = tmp_path / "image", tmp_path / "exfat"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.exfat", str(image)], check=True, capture_output=True)
    loop = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True
    ).stdout.strip()
    mounted = subprocess.run(["mount.exfat-fuse", loop, str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs loop devices and FUSE")
    yield path
    subprocess.run(["umount", str(path)], check=True)
    subprocess.run(["losetup", "-d", loop], check=True)


def test_a_file_system_without_hard_links(tmp_path, exfat):
    build(exfat / "c")
    cache = Cache.open(exfat / "c")
    with pytest.raises(OSError, match="not permitted"):
        os.link(exfat / "c/cache.json", exfat / "c/other")
    first, second, third = sorted((exfat / "c/shards").iterdir())
    for path in (first, second):
        path.write_bytes(path.read_bytes()[:-5])
    third.unlink()
    third.mkdir()
    assert len(repair(cache).set_aside) == 3
    build(exfat / "c")
    whole = undisturbed(tmp_path / "whole")
    assert {n: d for n, d in files_of(exfat / "c").items() if not n.startswith("damaged")} == whole
    assert not cache.storage.create(first.relative_to(exfat / "c").as_posix(), b"other")


def _build_as(root: Path, seed: int, results: object) -> None:
    try:
        build(root, seed=seed)
        results.put((seed, "built"))
    except IdentityMismatchError as error:
        results.put((seed, str(error)))


def test_of_builds_that_differ_one_gets_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    for seed in range(6):
        context.Process(target=_build_as, args=(tmp_path / "c", seed % 2, results)).start()
    said = [results.get(timeout=60) for _ in range(6)]
    winner = Cache.open(tmp_path / "c").identity.seed
    assert {seed for seed, word in said if word == "built"} == {winner}
    assert all("seed" in word for seed, word in said if seed != winner)
    build(tmp_path / "whole", seed=winner)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_a_shard_that_may_not_be_opened_is_not_a_damaged_one(tmp_path):
    build(tmp_path)
    cache = Cache.open(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(tmp_path / "cache.json", os.O_RDONLY))
        os.close(opened.pop())  # one for the listing
        cache.finished()
        opened.append(os.open(tmp_path / "cache.json", os.O_RDONLY))
        with pytest.raises(StorageError, match="does not mean that the data"):
            cache.read(0)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert repair(cache).set_aside == ()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) { static long n; return (++n % 2 ? 1 : -1) * (n * 179424673 % 1000000000); }
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += jump();
    return result;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""

UNDER_A_CLOCK_THAT_JUMPS = """
import sys, time
from pathlib import Path
from sparselogits.store import Cache, CopyFolder, verify
from sparselogits.store.storage.local_copy import LocalCopy
from sparselogits.store.storage.local import LocalStorage
from tests.faults.builds import build
seen = [time.time() for _ in range(20)]
assert max(seen) - min(seen) > 1e9, seen
build(Path(sys.argv[1]))
copied = Cache.open(LocalCopy(LocalStorage(sys.argv[1]), CopyFolder(sys.argv[2], 20_000)))
assert [copied.read(i).window_index for i in (3, 11, 6, 3, 0)] == [3, 11, 6, 3, 0]
assert verify(copied, stop=12).ok
"""


def test_a_clock_that_jumps_by_decades(tmp_path):
    """Forward and back at every look, for a whole build, a bounded copy, and a check of both."""
    source, library, root = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "c"
    source.write_text(CLOCK)
    if shutil.which("cc") is None:
        pytest.skip("a clock is bent with a C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    command = [sys.executable, "-c", UNDER_A_CLOCK_THAT_JUMPS, str(root), str(tmp_path / "copy")]
    bent = os.environ | {"LD_PRELOAD": str(library)}
    subprocess.run(command, env=bent, cwd=Path(__file__).parents[2], check=True)
    assert files_of(root) == undisturbed(tmp_path / "whole")
