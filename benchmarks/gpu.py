"""Measure on one GPU, in at most eight minutes: the loss, sampling, builds, a step and the demo.

    python benchmarks/gpu.py --out benchmarks/gpu.json    on a machine with one NVIDIA GPU
    python benchmarks/gpu.py --rehearse --out FILE        every part on the CPU, at tiny sizes

The parts run in this order, the most important first. Each part has a time limit and a separate
process, so that a crash or a hanging kernel does not affect the others. The file is written after
every part and after every result of a part, so that an interrupted run keeps its results. The file
states the reason for each part that is not measured.

    loss      forward and backward in bfloat16, over three cuBLAS products in the same process, and
              the peak of memory. The other losses run with their package if it is installed
              (`pip install liger-kernel quack-kernels cut-cross-entropy`). Every loss runs first
              with each chunk setting of `LOSSES`, and is compared with its fastest.
    sampling  the samplers, over a softmax into an existing buffer, with the blocks summed by the
              Triton kernel and by PyTorch's operations (in a rehearsal by the C function and by
              PyTorch's operations)
    build 1B  sampling and a whole build, over the teacher's forward pass. The teacher has the shape
              of Llama 3.2 1B and random bfloat16 weights, made on the device. Its distribution is
              nearly uniform, so draws are spread over more blocks of the vocabulary and sampling
              takes longer than with a trained teacher.
    step      an optimiser step of a student of that shape from the cache of "build 1B", over a step
              without a teacher; includes loading
    build 8B  as "build 1B", with the shape of Llama 3.1 8B
    demo      the whole of `sparselogits demo`, in seconds; it trains on the CPU

Runs that are compared are interleaved in random order after a warm-up; ratios compare runs of the
same repetition, as median with the 20th and 80th percentile. The loss and the samplers are timed by
CUDA events, after the device's second-level cache was overwritten; builds and steps, part of which
is work of the host, by elapsed time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

# the parts are forks of this process, which must not open the device before the fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cache_build import over_forward
from loss import products, sparse_targets
from measuring import interleaved, machine, publish, ratios, seconds_of, spread
from memory import peak_bytes
from sampling import by_pytorch, over_softmax, teacher_like
from sparselogits.corpus import (
    PackedCorpus,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.data import CacheDataset, TextDataset
from sparselogits.files import write_whole
from sparselogits.losses import linear_sparse_cross_entropy
from sparselogits.samplers import Systematic, compiled
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective
from step import batches, stepper

GIB = 2**30
PACKAGES = (
    *("sparselogits", "torch", "triton", "transformers"),
    *("liger-kernel", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl"),
)
LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "initializer_range": 0.01,  # with 0.02 the loss of 8B is close to "worse than guessing"
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes and time limits of a run.

    Args:
        limits: time limit of each part, in seconds.
        models: configuration of each model by its name.
        device: "cuda" or "cpu".
        clock: clock of the loss and the samplers, see `measuring.seconds_of`.
        total_seconds: time limit of all parts together.
        tuning_seconds: time limit for trying the chunk settings of one loss at one size.
        losses: width, vocabulary and rows of each size of the loss.
        entries: entries per row of the sparse targets.
        positions: number of sampled positions, with the vocabulary of the model "8B".
        windows: windows of a build.
        length: tokens per window.
        batch: windows per forward pass of the teacher, and per step of the student.
        rounds: rounds of systematic sampling in a build.
        repeats: repetitions of the loss and the samplers.
        build_repeats: repetitions of a build and a step.
        demo: arguments of `Scale`; None for the defaults of the demo.
    """

    limits: dict[str, float]
    models: dict[str, dict[str, Any]]
    device: str = "cuda"
    clock: str = "cuda"
    total_seconds: float = 470
    tuning_seconds: float = 40
    losses: tuple[tuple[int, int, int], ...] = (
        *((4096, 128_256, 8192), (4096, 128_256, 2048)),
        *((2048, 128_256, 8192), (2048, 128_256, 2048)),
    )
    entries: int = 12
    positions: int = 1024
    windows: int = 16
    length: int = 1024
    batch: int = 4
    rounds: int = 50
    repeats: int = 11
    build_repeats: int = 5
    demo: dict[str, int] | None = None


FULL = Sizes(
    limits={
        "loss": 170,
        "sampling": 25,
        "build 1B": 45,
        "step": 45,
        "build 8B": 75,
        "demo": 240,
    },
    models={"1B": LLAMA_1B, "8B": LLAMA_8B},
)
REHEARSAL = Sizes(
    device="cpu",
    clock="wall",
    limits={
        "loss": 60,
        "sampling": 30,
        "build 1B": 60,
        "step": 60,
        "build 8B": 60,
        "demo": 300,
    },
    tuning_seconds=3,
    losses=((32, 512, 64), (16, 512, 64)),
    positions=64,
    models={"1B": TINY, "8B": TINY | {"num_hidden_layers": 3}},
    windows=6,
    length=64,
    batch=2,
    rounds=12,
    repeats=3,
    build_repeats=2,
    demo={"characters": 6_000, "heldout_windows": 4, "window": 48, "layers": 1},
)

Write = Callable[[dict[str, Any]], None]
"""Function that replaces the stored results of a part by its results so far."""


class NotMeasuredError(Exception):
    """Raised if a part cannot be measured on this machine; the message is the reason."""


class Problem(NamedTuple):
    """Inputs of a loss: hidden states, head, labels and sparse targets."""

    x: Tensor
    head: Tensor
    labels: Tensor
    ids: Tensor
    weights: Tensor


def ours(p: Problem, **chunks: Any) -> Tensor:
    """Compute this library's loss on sparse targets."""
    return linear_sparse_cross_entropy(p.x, p.head, p.ids, p.weights, **chunks)


def ours_of_labels(p: Problem, **chunks: Any) -> Tensor:
    """Compute this library's loss on labels, as sparse targets of one entry."""
    ones = torch.ones_like(p.labels, dtype=torch.float32)[:, None]
    return linear_sparse_cross_entropy(p.x, p.head, p.labels[:, None], ones, **chunks)


def cross_entropy(p: Problem) -> Tensor:
    """Compute torch's cross-entropy from all logits."""
    return F.cross_entropy(F.linear(p.x, p.head), p.labels)


def torch_chunked(p: Problem, **chunks: Any) -> Tensor:
    """Compute torch's chunked cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(p.x, p.head, p.labels, options=options)


def liger(p: Problem, **chunks: Any) -> Tensor:
    """Compute Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(p.x, p.head, p.labels, **chunks)


def quack(p: Problem, **chunks: Any) -> Tensor:
    """Compute quack's chunked linear cross-entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(p.x, p.head, p.labels, **chunks)


def cut(p: Problem, **chunks: Any) -> Tensor:
    """Compute Cut Cross-Entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.x, p.head, p.labels, **chunks)


OUR_CHUNKS = [{}, *({"chunk_rows": rows} for rows in (512, 1024, 2048, 4096, 8192))]
LOSSES: dict[str, tuple[Callable[..., Tensor], list[dict[str, Any]]]] = {
    "ours": (ours, [c | {"impl": "chunked"} for c in OUR_CHUNKS]),
    "triton": (ours, [c | {"impl": "triton"} for c in OUR_CHUNKS]),
    "ours_labels": (ours_of_labels, [c | {"impl": "chunked"} for c in OUR_CHUNKS]),
    "triton_labels": (ours_of_labels, [c | {"impl": "triton"} for c in OUR_CHUNKS]),
    "cross_entropy": (cross_entropy, [{}]),
    "torch_chunked": (
        torch_chunked,
        [{}, *({"batch_chunk_size": rows} for rows in (512, 1024, 2048, 4096, 8192))],
    ),
    # the budget of logits; older versions lack the argument, and run only without it
    "liger": (liger, [{}, *({"chunk_mem_const": budget} for budget in (2, 4, 8, 16, 32))]),
    # the search for a kernel ("tuned") may exceed the limit, so the first setting omits it
    "quack": (
        quack,
        [
            {"chunk_size": 4096, "tuned": False},
            *({"chunk_size": rows} for rows in (4096, 2048, 8192, 1024)),
        ],
    ),
    # "cce" omits gradients below a threshold; "cce_exact" does not exist in release 25.1
    "cut": (cut, [{"impl": "cce"}]),
    "cut_exact": (cut, [{"impl": "cce_exact"}, {"impl": "cce", "filter_eps": None}]),
    "cut_compiled": (cut, [{"impl": "torch_compile"}]),
}
"""Functions of the losses and the settings to try. `ours` and `triton` have sparse targets; all
others compute the cross-entropy of labels, `*_labels` as sparse targets of one entry."""


class OutOfTime(BaseException):
    """Raised to interrupt the tuning of a loss; a BaseException, which libraries do not catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after some seconds, when Python code runs again."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason_of(error: BaseException) -> str:
    """Return the type and the first line of an error, at most 300 characters."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]


def tuned(name: str, problem: Problem, sizes: Sizes) -> tuple[Callable[[], Tensor] | None, Any]:
    """Return a loss with its fastest setting, and the seconds or the error of every setting."""
    loss, settings = LOSSES[name]
    record: dict[str, Any] = {}
    found: dict[str, tuple[float, Callable[[], Tensor]]] = {}
    try:
        with at_most(sizes.tuning_seconds):
            for setting in settings:
                label = ", ".join(f"{k}={v}" for k, v in setting.items()) or "default"
                record[label] = f"not finished in {sizes.tuning_seconds:g} s for all settings"
                run = partial(loss, problem, **setting)
                try:
                    step(problem, run)  # compiles
                    taken = [seconds_of(partial(step, problem, run), sizes.clock) for _ in range(3)]
                except Exception as error:
                    record[label] = reason_of(error)
                else:
                    record[label] = sorted(taken)[1]
                    found[label] = (record[label], run)
    except OutOfTime:
        pass
    problem.x.grad = problem.head.grad = None
    gc.collect()  # frees the memory of an interrupted or failed setting
    if not found:
        return None, {"not_measured": next(iter(record.values())), "settings": record}
    best = min(found, key=lambda label: found[label][0])
    return found[best][1], {"chosen": best, "settings": record}


def step(problem: Problem, run: Callable[[], Tensor]) -> Tensor:
    """Run forward and backward of a loss; return its value."""
    problem.x.grad = problem.head.grad = None
    loss = run()
    loss.backward()
    return loss.detach()


def measure_loss(sizes: Sizes, scratch: Path, write: Write) -> None:
    """Measure every loss at every size."""
    results: list[dict[str, Any]] = []
    for width, vocabulary, rows in sizes.losses:
        results.append({"D": width, "V": vocabulary, "rows": rows})
        one_loss(sizes, results[-1], lambda: write({"problems": results}))


def one_loss(sizes: Sizes, row: dict[str, Any], written: Callable[[], None]) -> None:
    """Measure every loss at one size."""
    width, vocabulary, rows = row["D"], row["V"], row["rows"]
    torch.manual_seed(0)
    device = sizes.device
    head = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16()
    problem = Problem(
        torch.randn(rows, width, device=device).bfloat16().requires_grad_(),
        head.requires_grad_(),
        torch.randint(vocabulary, (rows,), device=device),
        *sparse_targets(rows, vocabulary, sizes.entries, device),
    )
    losses: dict[str, Callable[[], Tensor]] = {}
    row["tuning"] = {}
    for name in LOSSES:
        run, row["tuning"][name] = tuned(name, problem, sizes)
        if run is not None:
            losses[name] = run
        written()
    row["value"] = {name: float(step(problem, run)) for name, run in losses.items()}
    row["peak_gib"] = {}
    for name, run in losses.items():
        problem.x.grad = problem.head.grad = None
        row["peak_gib"][name] = round(peak_bytes(partial(step, problem, run), device) / GIB, 3)
    gradients = problem.x.numel() + problem.head.numel()
    row["gradients_gib"] = round(2 * gradients / GIB, 3)
    written()
    runs: dict[str, Callable[[], object]] = {
        "products": partial(products, problem.x.detach(), problem.head.detach()),
        **{name: partial(step, problem, run) for name, run in losses.items()},
    }
    seconds = interleaved(runs, sizes.repeats, warm_up=2, clock=sizes.clock)
    row["products_seconds"] = spread(seconds["products"], 7)
    row["over_products"] = {name: ratios(seconds, name, "products") for name in losses}
    if "quack" in losses:
        row["over_quack"] = {name: ratios(seconds, name, "quack") for name in losses}
    written()


def measure_sampling(sizes: Sizes, scratch: Path, write: Write) -> None:
    """Measure the samplers relative to a softmax, in both dtypes."""
    results: dict[str, dict[str, Any]] = {}
    vocabulary = sizes.models["8B"]["vocab_size"]
    for dtype in (torch.float32, torch.bfloat16):
        logits = teacher_like(sizes.positions, vocabulary, sizes.device).to(dtype)
        measured = partial(
            over_softmax, logits, torch.empty_like(logits), sizes.repeats, sizes.clock
        )
        found = results[str(dtype).removeprefix("torch.")] = measured()
        found["kernel"] = logits.is_cuda and compiled.fastest_for(logits) is not None
        write(results)
        found["by_pytorch"] = measured(by_pytorch)["ratio_to_softmax"]
        write(results)


def random_llama(sizes: Sizes, name: str, bytes_per_parameter: int, activations_gib: float) -> Any:
    """Return a model with random bfloat16 weights on the device.

    Raises:
        NotMeasuredError: If the device has too little free memory.
    """
    config = LlamaConfig(
        **sizes.models[name], max_position_embeddings=sizes.length, use_cache=False
    )

    def create() -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    if sizes.device == "cuda":
        with torch.device("meta"):
            parameters = sum(p.numel() for p in create().parameters())
        needed = bytes_per_parameter * parameters / GIB + activations_gib
        free = torch.cuda.mem_get_info()[0] / GIB
        if needed > free:
            raise NotMeasuredError(
                f"{name} needs about {needed:.0f} GiB of device memory, {free:.0f} GiB are free"
            )
    torch.manual_seed(0)
    with torch.device(sizes.device):
        return create()


def text_of(sizes: Sizes, scratch: Path) -> tuple[PackedCorpus, Any]:
    """Return a packed corpus of random words and its tokenizer, which has one token per word."""
    size = sizes.models["1B"]["vocab_size"]
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    source, draw = scratch / "words.jsonl", random.Random(0)
    if not source.exists():
        chosen = [f"w{draw.randrange(1, size)}" for _ in range((sizes.windows + 1) * sizes.length)]
        pages = (chosen[i : i + sizes.length] for i in range(0, len(chosen), sizes.length))
        lines = (json.dumps({"text": " ".join(page)}) + "\n" for page in pages)
        write_whole(source, "".join(lines))
    packing = packing_for(tokenizer, window_length=sizes.length)
    folder = scratch / "corpus"
    corpus = pack(open_source(str(source)), tokenizer, packing, folder, vocab_size=size)
    return corpus, tokenizer


def measure_build(sizes: Sizes, scratch: Path, write: Write, *, name: str) -> None:
    """Measure a build relative to the teacher's forward pass."""
    model = random_llama(sizes, name, 2, activations_gib=6)
    corpus, tokenizer = text_of(sizes, scratch)
    identity = {
        "name": f"random {name}",
        "weights": "random, seed 0",
        "dtype": "bfloat16",
        "engine": "transformers",
        "quantization": None,
    }
    folder = scratch / name
    folder.mkdir()
    found = over_forward(
        TransformersTeacher(model.requires_grad_(False), identity=identity),
        corpus,
        tokenizer_fingerprint(tokenizer),
        folder,
        Systematic(sizes.rounds),
        windows=sizes.windows,
        batch=sizes.batch,
        repeats=sizes.build_repeats,
        clock="wall",
    )
    write({"parameters": sum(p.numel() for p in model.parameters())} | found)


def measure_step(sizes: Sizes, scratch: Path, write: Write) -> None:
    """Measure a training step from the cache of "build 1B" relative to a cross-entropy step."""
    ready = scratch / "1B" / "ready"
    if not ready.exists():
        raise NotMeasuredError("the step needs the cache of `build 1B`, which was not measured")
    cache = CacheDataset(ready)
    text = TextDataset(text_of(sizes, scratch)[0], holdout=False)
    model = random_llama(sizes, "1B", 8, activations_gib=24).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    made = partial(stepper, model, optimizer)
    runs = {
        "ce": made(Objective("ce"), batches(text, sizes.batch, 0, None)),
        "cache": made(Objective("sparse"), batches(cache, sizes.batch, 0, None)),
        "cache worker": made(Objective("sparse"), batches(cache, sizes.batch, 1, None)),
    }
    seconds = interleaved(runs, sizes.build_repeats, warm_up=2, clock="wall")
    write(
        {
            "tokens_per_step": sizes.batch * sizes.length,
            "entries_per_token": round(cache.cache.statistics().entries_per_position, 2),
            "ce_step_seconds": spread(seconds["ce"], 7),
            "over_ce": {name: ratios(seconds, name, "ce") for name in runs if name != "ce"},
        }
    )


DEMO = """import json, sys
from pathlib import Path
from sparselogits.lab.demo import Scale, run_demo
scale = json.loads(sys.argv[2])
run_demo(Path(sys.argv[1]), scale and Scale(**scale))
"""


def measure_demo(sizes: Sizes, scratch: Path, write: Write) -> None:
    """Measure the demo in a new process, as `make demo` runs it."""
    out, started = scratch / "demo", time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", DEMO, str(out), json.dumps(sizes.demo)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise NotMeasuredError(f"the demo failed: {said[-1][:300]}")
    found = json.loads((out / "demo.json").read_text())
    write(
        {
            "seconds": round(time.perf_counter() - started, 1),
            "device": "cpu",
            "runs": {run["method"]: run["status"] for run in found["results"]["runs"]},
        }
    )


def describe(sizes: Sizes, scratch: Path, write: Write) -> None:
    """Write the properties of the machine and the versions of driver and packages."""
    found = machine()
    if sizes.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "device_memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    write({"machine": found, "versions": versions})


def driver() -> str:
    """Return the version of the driver reported by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({reason_of(error)})"
    return said.strip().splitlines()[0]


Measure = Callable[[Sizes, Path, Write], None]
PARTS: dict[str, Measure] = {
    "loss": measure_loss,
    "sampling": measure_sampling,
    "build 1B": partial(measure_build, name="1B"),
    "step": measure_step,
    "build 8B": partial(measure_build, name="8B"),
    "demo": measure_demo,
}
"""Functions of the parts in order of importance; `step` needs the cache of "build 1B"."""

STARTS = ("fork", "spawn")
"""Start methods to try. A fork does not repeat imports, but fails if an imported package has opened
the device; after a spawn each part imports its packages again, which takes some seconds."""


def run_part(
    measure: Measure, sizes: Sizes, scratch: Path, seconds: float, note: Write, start: str = "fork"
) -> dict[str, Any]:
    """Run a part in a separate process, and return its record.

    Args:
        measure: function of the part.
        sizes: sizes and limits of the run.
        scratch: folder for files that the parts share.
        seconds: time limit, after which the process and its child processes are killed.
        note: function called with the unfinished record whenever the part has written results.
        start: one of `STARTS`.
    """
    file = scratch / "part.json"
    file.unlink(missing_ok=True)
    started = time.perf_counter()
    record: dict[str, Any] = {"status": "running", "reason": None}
    context: Any = multiprocessing.get_context(start)
    process = context.Process(target=_in_child, args=(measure, sizes, scratch, file))
    process.start()
    stamp = 0
    try:
        while process.is_alive() and time.perf_counter() - started < seconds:
            process.join(0.2)
            if file.exists() and (now := file.stat().st_mtime_ns) != stamp:
                stamp = now
                note(record | json.loads(file.read_text()))
        overran = process.is_alive()
    finally:  # after an interruption too
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    record |= {"seconds": round(time.perf_counter() - started, 1), "limit_seconds": round(seconds)}
    record |= json.loads(file.read_text()) if file.exists() else {}
    if overran:
        record["reason"] = f"stopped after its limit of {seconds:.0f} s"
    elif process.exitcode and not record["reason"]:
        record["reason"] = f"its process ended with exit code {process.exitcode}"
    unfinished = "not finished" if "results" in record else "not measured"
    record["status"] = unfinished if record["reason"] else "done"
    return record


def _in_child(measure: Measure, sizes: Sizes, scratch: Path, file: Path) -> None:
    """Run a part in this process, and write its results or the reason for their absence."""
    os.setsid()  # a process group that can be killed as a whole
    record: dict[str, Any] = {}

    def put(**found: Any) -> None:
        record.update(found)
        write_whole(file, json.dumps(record))

    try:
        measure(sizes, scratch, lambda results: put(results=results))
    except NotMeasuredError as error:
        put(reason=str(error))
    except Exception as error:
        put(reason=reason_of(error))
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file, replaced")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part too
    started = time.perf_counter()
    sizes = REHEARSAL if args.rehearse else FULL
    report: dict[str, Any] = {"rehearsal": args.rehearse, "complete": False}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for start in STARTS:
            found = run_part(describe, sizes, scratch, 60, lambda _: None, start)
            if "results" in found:
                break
        else:
            raise SystemExit(
                f"the device cannot be used ({found['reason']}); expected a CUDA device. Run this "
                "on a machine with an NVIDIA GPU, or rehearse it with --rehearse"
            )
        report |= found["results"] | {"sizes": asdict(sizes), "start": start}
        parts = report["parts"] = {
            name: {
                "status": "not measured",
                "reason": "the run was interrupted" if name in args.parts else "not chosen",
            }
            for name in PARTS
        }

        def save(name: str, record: dict[str, Any]) -> None:
            parts[name] = record
            report["seconds"] = round(time.perf_counter() - started, 1)
            write_whole(args.out, json.dumps(report, indent=1) + "\n")

        for name, record in parts.items():
            save(name, record)
        for name in (name for name in PARTS if name in args.parts):
            left = sizes.total_seconds - (time.perf_counter() - started)
            seconds = min(sizes.limits[name], left)
            if seconds < 5:
                reason = f"the limit of {sizes.total_seconds:g} s for all parts was reached"
                save(name, {"status": "not measured", "reason": reason})
                continue
            print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            note = partial(save, name)
            save(name, run_part(PARTS[name], sizes, scratch, seconds, note, start))
    report["complete"] = True
    publish(report, args.out)


if __name__ == "__main__":
    main()
