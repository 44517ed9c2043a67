"""Compare the memory estimates of `sparselogits plan` with the memory of small Llamas.

    python benchmarks/plan_memory.py --out benchmarks/plan_memory.json      (a minute)

Every allocation of torch is counted by the profiler's memory events, except the weights of the
teacher. A teacher's pass consists of the trunk, the head by slices and the sampler; a training step
consists of forward, loss and backward. Gradients are counted; the optimiser's moments are not,
because their size is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from measuring import machine
from memory import peak_bytes
from sparselogits.lab.planning.memory import (
    GRADIENT_BYTES,
    TRAINED_BYTES,
    Shape,
    pass_memory,
    training_memory,
)
from sparselogits.losses import linear_sparse_cross_entropy
from sparselogits.samplers import Systematic, window_uniforms
from sparselogits.teacher import TransformersTeacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ((256, 768, 2, 4096), (256, 1024, 4, 8192), (128, 512, 2, 32768), (512, 1024, 2, 2048))
BATCH, WINDOW, ENTRIES = 4, 256, 12
CAPACITY = 4 * 2**30
"""Memory of a device whose chunk of logits has the size of a CPU's chunk, 64 MiB."""


def model_of(hidden: int, intermediate: int, layers: int, vocab: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def measured_pass(model: LlamaForCausalLM, vocab: int) -> int:
    """Return the peak bytes of a teacher's pass with sampling, beyond the weights."""
    teacher, sampler = TransformersTeacher(model, identity={}), Systematic(50)
    tokens = torch.randint(vocab, (BATCH, WINDOW))

    def run() -> None:
        for piece in teacher.logits(tokens):
            count = sampler.uniforms_per_position
            sampler(piece.logits, window_uniforms(0, 0, len(piece.logits), count))

    run()  # allocates buffers that are reused
    return peak_bytes(run, "cpu")


def measured_step(model: LlamaForCausalLM, vocab: int, dtype: str, checkpointing: bool) -> int:
    """Return the peak bytes of a training step beyond the weights, gradients included."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(vocab, (BATCH, WINDOW))
    ids = torch.randint(vocab, (BATCH * WINDOW, ENTRIES)).sort(1).values
    weights = torch.full(ids.shape, 1 / ENTRIES)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        hidden, head = (x.to(DTYPES[dtype]) for x in (hidden.flatten(0, 1), model.lm_head.weight))
        linear_sparse_cross_entropy(hidden, head, ids, weights).backward()

    run()
    model.zero_grad()
    return peak_bytes(run, "cpu")


def rows() -> list[dict[str, object]]:
    """Measure a pass and a step, with and without checkpointing, for every shape and dtype."""
    found = []
    for hidden, intermediate, layers, vocab in SHAPES:
        for dtype in DTYPES:
            model = model_of(hidden, intermediate, layers, vocab)
            parameters = sum(p.numel() for p in model.parameters())
            shape = Shape("measured", parameters, hidden, layers, intermediate)
            sizes = {"vocab": vocab, "window": WINDOW, "batch": BATCH, "dtype": dtype}
            estimate = pass_memory(parameters, shape, **sizes)
            expected = estimate.total - dict(estimate.parts)["weights"]
            teacher = model.to(DTYPES[dtype])
            found.append(row("pass", sizes, shape, measured_pass(teacher, vocab), expected))
            for checkpointing in (False, True):
                model = model_of(hidden, intermediate, layers, vocab)
                peak = measured_step(model, vocab, dtype, checkpointing)
                estimate = training_memory(
                    parameters, shape, **sizes, checkpointing=checkpointing, capacity=CAPACITY
                )
                held = TRAINED_BYTES - GRADIENT_BYTES  # before the step
                kind = "checkpointed step" if checkpointing else "step"
                found.append(row(kind, sizes, shape, peak, estimate.total - held * parameters))
    return found


def row(
    kind: str, sizes: dict[str, object], shape: Shape, measured: int, expected: float
) -> dict[str, object]:
    """Return one result as JSON values."""
    widths = {"hidden": shape.hidden, "layers": shape.layers, "intermediate": shape.intermediate}
    ratio = round(expected / measured, 3)
    return {"what": kind} | sizes | widths | {"measured_bytes": measured, "estimate_over_it": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    found = rows()
    for each in found:
        print(each, flush=True)
    if out:
        text = json.dumps({"machine": machine(), "rows": found}, indent=1)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
