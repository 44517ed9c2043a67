"""Test that a teacher split over two gloo ranks gives its logits, and builds its caches."""

import os

import numpy as np
import pytest
import torch

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.caching.plan import WHOLE
from sparselogits.cli.role import BuildRole, build_role
from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers import Systematic
from sparselogits.store import Cache, verify
from sparselogits.teacher import load_teacher
from tests.conftest import run_python

TOKENS = torch.arange(60).reshape(3, 20) * 17 % 500

SCRIPT = """
import sys, warnings
import numpy as np, torch, torch.distributed as dist
from sparselogits.cli import main
from sparselogits.teacher import check_engine, load_teacher
from sparselogits.teacher.loading import load_tokenizer
from sparselogits.teacher.tensor_parallel import Leader, follow

folder, out, *command = sys.argv[1:]
tokens = torch.arange(60).reshape(3, 20) * 17 % 500
starts = [np.array([0, 7]), np.array([3]), np.array([], np.int64)]
engine = load_teacher(folder, tokenizer=load_tokenizer(folder), tp_plan="auto", slice_positions=8)
held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel()
           for p in engine.model.parameters())
if dist.get_rank():
    follow(engine)
else:
    with Leader(engine) as leader:
        check_engine(leader, tokens)
        limit = leader.model.config.max_position_embeddings
        with warnings.catch_warnings(record=True) as warned:
            leader.check_window(limit + 1)  # a pass, in which every rank must take part
        leader.check_padding()
        next(leader.logits(tokens)).logits  # a pass of which the rest is not wanted
        found = {
            "plain": torch.cat([piece.logits for piece in leader.logits(tokens)]),
            "restarting": torch.cat([piece.logits for piece in leader.logits(tokens, starts)]),
            "identity": leader.identity,
            "sliced": engine.head is not None,
            "held": held,
            "warned": [str(each.message) for each in warned],
        }
    torch.save(found, out)
sys.argv[1:] = command
main()
"""


@pytest.mark.slow
def test_two_ranks_are_the_whole_teacher(tmp_path, teacher_folder, tokenizer, text):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ("--teacher", teacher_folder, "--data", text, "--window", 32, "--windows", "0:32")
    options = (*options, "--windows-per-shard", 16, "--budget", 6, "--threads", 1)
    command = [str(x) for x in ("cache", *options, "--out", tmp_path / "cache")]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    job = [*launch, str(script), str(teacher_folder), str(tmp_path / "found.pt"), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run_python(*job, "--tp-plan", "auto", check=True, env=environment)
    whole = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    starts = [np.array([0, 7]), np.array([3]), np.array([], np.int64)]
    for name, where in (("plain", None), ("restarting", starts)):
        expected = torch.cat([piece.logits for piece in whole.logits(TOKENS, where)])
        torch.testing.assert_close(found[name], expected, msg=name)
    assert found["identity"] == whole.identity
    assert "longer than" in found["warned"][0]
    assert found["sliced"], "the head runs over slices of positions"
    assert found["held"] < 0.6 * sum(p.numel() for p in whole.model.parameters())

    build_caches(
        whole,
        PackedCorpus.open(tmp_path / "cache" / "corpus"),
        [CacheRequest(tmp_path / "alone", Systematic(), budget=6)],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        windows_per_shard=16,
        only=(0, 32),
    )
    together, alone = Cache.open(tmp_path / "cache"), Cache.open(tmp_path / "alone")
    assert together.identity == alone.identity
    assert together.provenance(0) == {**alone.provenance(0), "ranks": 2}
    assert verify(together).ok
    assert len(together) == len(alone) == 32
    for i in range(32):
        one, other = together.read(i), alone.read(i)
        assert one.teacher_loss == pytest.approx(other.teacher_loss, rel=1e-5)
        # a rounding of the logits moves a draw only where u lies within it of a boundary
        differing = set(one.targets.ids.tolist()) ^ set(other.targets.ids.tolist())
        assert len(differing) <= 2


def test_the_ranks_of_a_split_teacher_are_one_worker():
    with pytest.raises(InvalidArgumentError, match="one worker"):
        build_role("torchrun", None, None, None, "cpu", split=True)


def test_a_split_teacher_needs_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidArgumentError, match="torchrun"):
        build_role("local", None, None, None, "cpu", split=True)


def test_only_the_first_rank_of_a_split_teacher_prints_the_source():
    assert BuildRole("auto", WHOLE, rank=0).is_first
    assert not BuildRole("auto", WHOLE, rank=1).is_first
