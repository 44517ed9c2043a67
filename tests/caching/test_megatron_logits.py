"""Megatron-LM's offline logits, written here by their layout, become the teacher's own targets."""

import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from sparselogits.caching import import_collected
from tests.caching.test_collected import LENGTH, V, same_targets, sequences, teachers_targets
from tests.caching.test_collected_forms import top, write_rows

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_logits.py"
K, RANKS, MICROBATCHES, BATCH = 5, 2, 2, 3
PER_ITERATION = RANKS * MICROBATCHES * BATCH


def packed(texts: list[torch.Tensor], nucleus: int) -> dict[str, Any]:
    """One microbatch of a rank: [sequence, batch, K], the least likely entries masked by top-p."""
    lists = [top(tokens, K) for tokens in texts]
    ids = torch.stack([torch.from_numpy(own) for own, _ in lists], 1)
    values = torch.stack([torch.from_numpy(logs) for _, logs in lists], 1).half()
    ids[::2, :, nucleus:], values[::2, :, nucleus:] = -1, -1e4
    low, high = (ids & 0xFFFF).to(torch.uint16), (ids >> 16).to(torch.bool)
    return {"values": values, "indices_low": low, "bit_17": high}


def write_archives(folder: Path, texts: list[torch.Tensor]) -> Path:
    """Samples go to microbatches in turn, and within one to the ranks in slices."""
    folder.mkdir()
    for rank in range(RANKS):
        for number in range(len(texts) // PER_ITERATION):
            own = []
            for microbatch in range(MICROBATCHES):
                at = number * PER_ITERATION + microbatch * RANKS * BATCH + rank * BATCH
                own.append(packed(texts[at : at + BATCH], nucleus=3))
            tensors = {name: [part[name] for part in own] for name in own[0]}
            path = folder / f"cp0_dp{rank}__{number + 9}.tar"
            write_archive(path, f"{number + 9}.pt.zst", tensors)
    return folder


def write_archive(path: Path, member: str, tensors: dict[str, Any], **saver: int) -> None:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    data = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
    meta = json.dumps({"saver": saver}).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in (("_meta.json", meta), (member, data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_archives_become_rows_in_the_order_of_training(tmp_path, tokenizer):
    texts = sequences(2 * PER_ITERATION)
    folder = write_archives(tmp_path / "logits", texts)
    rows = [{"input_ids": tokens.tolist()} for tokens in texts]
    data = write_rows(tmp_path / "tokens.jsonl", rows)
    done = convert(folder, "--tokens", data, "--out", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == len(texts)
    options: dict[str, Any] = {"vocab_size": V, "k": K, "exact_weights": True}
    cache = import_collected(str(tmp_path / "rows"), tokenizer, tmp_path / "c", **options).cache
    for number, tokens in enumerate(texts):
        record = cache.read(number)
        assert record.tokens.tolist() == tokens.tolist()
        for position in range(LENGTH):
            k = K if position % 2 else 3
            expected = teachers_targets(tokens, k)[position : position + 1]
            same_targets(record.targets[position : position + 1], expected, rtol=4e-3)
    write_rows(tmp_path / "tokens.jsonl", rows[:5])
    done = convert(folder, "--tokens", data, "--out", tmp_path / "fewer")
    assert "sample 5 has logprobs of 32 positions and no tokens" in done.stderr
    (folder / "cp0_dp0__9.tar").rename(folder / "cp1_dp0__9.tar")
    done = convert(folder, "--tokens", data, "--out", tmp_path / "parts")
    assert "is of context-parallel rank 1" in done.stderr
    (folder / "cp1_dp0__9.tar").unlink()
    done = convert(folder, "--tokens", data, "--out", tmp_path / "missing")
    assert "the ranks have the iterations [9, 10] at the same place" in done.stderr


@pytest.mark.parametrize("name", ["a.tar", "cp0_dp1__3.tar"])
def test_a_folder_of_other_archives_is_refused(name, tmp_path):
    (tmp_path / "logits").mkdir()
    (tmp_path / "logits" / name).write_bytes(b"")
    done = convert(tmp_path / "logits", "--tokens", "x", "--out", tmp_path / "out")
    assert "expected dp0__*.tar or cp0_dp0__*.tar" in done.stderr


@pytest.mark.parametrize("names", ["dp{}__{}.tar", "dp{}__{}-9.tar"])
def test_both_layouts_give_the_same_samples(names, tmp_path):
    """In layout 2 a rank's microbatches are one tensor, and _meta.json has their size."""
    script = runpy.run_path(str(SCRIPT))
    folder = write_archives(tmp_path / "lists", sequences(2 * PER_ITERATION))
    expected = list(script["samples"](script["archives"](folder)))
    assert len(expected) == 2 * PER_ITERATION
    (tmp_path / "tensors").mkdir()
    for path in folder.iterdir():
        ((number, tensors),) = script["iterations"]([path])
        whole: dict[str, Any] = {name: torch.cat(parts, 1) for name, parts in tensors.items()}
        rank = path.name[6]
        joined = tmp_path / "tensors" / names.format(rank, number)
        write_archive(joined, f"{number}.pt.zst", whole | {"format_version": 2}, mbs_save=BATCH)
    assert list(script["samples"](script["archives"](tmp_path / "tensors"))) == expected
    write_archive(joined, f"{number}-9.pt.zst", whole | {"format_version": 3}, mbs_save=BATCH)
    with pytest.raises(SystemExit, match=r"format_version 3 .* expected version 1, or 2"):
        list(script["samples"](script["archives"](tmp_path / "tensors")))
