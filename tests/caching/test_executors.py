"""Test that ranks of torchrun and Slurm and a Ray cluster with killed workers write one cache.

Every cache is compared byte for byte with that of a single process with the same number of threads.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparselogits.caching import CacheRequest, Job, begin_job, shard_ranges
from sparselogits.caching.executors import (
    Workers,
    build_caches_on_ray,
    rank_from_environment,
    wait_for_first_rank,
)
from sparselogits.caching.plan import Share
from sparselogits.corpus import PackedCorpus
from sparselogits.errors import CacheError, InvalidArgumentError, TeacherError
from sparselogits.samplers import Systematic
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_tokenizer
from tests.conftest import run_python

WINDOW, SHARD = 32, 16


def words(teacher: Path, text: Path, out: Path, *more: object) -> list[str]:
    options = ("--teacher", teacher, "--data", text, "--out", out, "--window", WINDOW)
    fixed = ("--windows-per-shard", SHARD, "--threads", 1, "--device", "cpu", "--budget", 6)
    return [str(word) for word in ("-m", "sparselogits", "cache", *options, *fixed, *more)]


def environment(**changes: str) -> dict[str, str]:
    launchers = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    return plain | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"} | changes


def shards(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "shards").iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher_folder, short) -> Path:
    out = tmp_path_factory.mktemp("alone") / "cache"
    run_python(*words(teacher_folder, short, out), check=True, env=environment())
    assert len(shards(out)) > 8
    return out


@pytest.mark.slow
def test_two_torchrun_ranks(tmp_path, teacher_folder, short, alone):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    told = words(teacher_folder, short, tmp_path / "cache", "--executor", "torchrun")
    subprocess.run([sys.executable, *launch, *told], check=True, env=environment(), timeout=120)
    assert shards(tmp_path / "cache") == shards(alone)


@pytest.mark.slow
def test_tasks_of_a_slurm_array(tmp_path, teacher_folder, short, alone):
    """The second is there first, and waits until the first has packed the text."""
    told = words(teacher_folder, short, tmp_path / "cache", "--executor", "torchrun")

    def task(index: int) -> subprocess.Popen[bytes]:
        variables = {"SLURM_ARRAY_TASK_ID": str(index + 1), "SLURM_ARRAY_TASK_COUNT": "2"}
        variables["SLURM_ARRAY_TASK_MIN"] = "1"
        return subprocess.Popen([sys.executable, *told], env=environment(**variables))

    second = task(1)
    first = task(0)
    assert first.wait(120) == 0
    assert second.wait(120) == 0
    assert shards(tmp_path / "cache") == shards(alone)


@pytest.mark.parametrize(
    ("variables", "index", "count", "local"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 3, 8, 1),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, 5, 6, 2),
        (
            {
                "SLURM_ARRAY_TASK_ID": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "8",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            3,
            8,
            0,
        ),
        # a batch script's own process: it has a number, and nobody started the other tasks
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
            },
            2,
            3,
            0,
        ),
    ],
)
def test_rank_from_environment(variables, index, count, local):
    rank = rank_from_environment(variables)
    assert (rank.share, rank.local) == (Share(index, count), local)


def test_shares_are_all_of_the_work():
    ranges = shard_ranges(1000, 7)
    parts = [Share(i, 6).of(ranges) for i in range(6)]
    assert sorted(span for part in parts for span in part) == ranges


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "torchrun --nproc-per-node"),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, "no gaps"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
    ],
)
def test_an_environment_without_ranks(variables, said):
    with pytest.raises(InvalidArgumentError, match=said):
        rank_from_environment(variables)


def test_a_first_rank_that_never_begins():
    with pytest.raises(CacheError, match="has not created"):
        wait_for_first_rank(lambda: False, seconds=0.02, every=0.005)


@pytest.fixture(scope="module")
def ray(tmp_path_factory) -> Iterator[Any]:
    """A cluster of this machine with room for three workers of one CPU."""
    module = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        module.init(
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=80 * 2**20,
        )
        yield module
        module.shutdown()


@pytest.fixture
def job(tmp_path, alone, teacher_folder) -> Job:
    """The build of `alone`, begun anew elsewhere."""
    tokenizer = load_tokenizer(str(teacher_folder))
    from sparselogits.corpus import tokenizer_fingerprint

    return begin_job(
        load_teacher(str(teacher_folder), tokenizer=tokenizer),
        PackedCorpus.open(alone / "corpus"),
        [CacheRequest(str(tmp_path / "cache"), Systematic(), budget=6)],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        batch=8,
        windows_per_shard=SHARD,
    )


class KilledOnce:
    """A teacher that takes its process down at a given forward pass, once for each marker."""

    def __init__(self, folder: Path, marker: Path, at: int) -> None:
        self._engine = load_teacher(str(folder), tokenizer=load_tokenizer(str(folder)))
        self._marker, self._left = marker, at
        self.vocab_size, self.identity = self._engine.vocab_size, self._engine.identity
        self.token_mask, self.device = self._engine.token_mask, self._engine.device

    def logits(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.logits(*arguments)


@pytest.mark.slow
def test_ray_with_workers_killed(ray, job, tmp_path, teacher_folder, alone):
    """One dies by itself in mid-range, another process is killed from outside; none is missed."""
    ranges = shard_ranges(job.corpus.windows, SHARD)
    load = partial(KilledOnce, teacher_folder, tmp_path / "marker", 4)
    seen: list[int] = []
    killed: list[int] = []

    def watch(done: int, total: int) -> None:
        seen.append(done)
        assert total == job.corpus.windows
        if done >= total // 3 and not killed:
            killed.append(kill_a_worker())

    report = build_caches_on_ray(load, job, ranges, Workers(3, threads=1), progress=watch)
    assert (tmp_path / "marker").exists()
    assert killed[0] > 0
    assert seen == sorted(seen)
    assert seen[-1] == report.windows_built == job.corpus.windows
    assert shards(tmp_path / "cache") == shards(alone)
    again = build_caches_on_ray(load, job, ranges, Workers(3, threads=1))
    assert (again.windows_built, again.windows_found) == (0, job.corpus.windows)


def kill_a_worker() -> int:
    """SIGKILL to one process of a living actor."""

    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ray::RangeWorker") and descends(int(folder.name)):
                os.kill(int(folder.name), signal.SIGKILL)
                return int(folder.name)
    return 0


def descends(process: int) -> bool:
    """Whether this process is an ancestor of another."""
    while process > 1:
        status = Path(f"/proc/{process}/stat").read_text()
        process = int(status.rpartition(")")[2].split()[1])
        if process == os.getpid():
            return True
    return False


@pytest.mark.slow
def test_the_ray_command(ray, tmp_path, teacher_folder, short, alone):
    """It joins the cluster of RAY_ADDRESS, and the process that it runs in builds nothing."""
    told = words(teacher_folder, short, tmp_path / "cache", "--executor", "ray", "--workers", 2)
    address = ray.get_runtime_context().gcs_address
    run_python(*told, "--gpus", "0", check=True, env=environment(RAY_ADDRESS=address))
    assert shards(tmp_path / "cache") == shards(alone)


@pytest.mark.slow
def test_ray_says_what_a_worker_raised(ray, job, tmp_path):
    load = partial(load_nothing, str(tmp_path / "no-teacher"))
    ranges = shard_ranges(job.corpus.windows, SHARD)
    with pytest.raises(TeacherError, match="no-teacher"):
        build_caches_on_ray(load, job, ranges, Workers(2, threads=1))


def load_nothing(name: str) -> Any:
    return load_teacher(name, tokenizer=None)
