"""Compare the noise of samplers at equal bytes.

    python experiments/samplers_at_equal_bytes.py --teacher MODEL --text FILE --out RESULT.json

For each sampler and budget, it measures the mean entries per position, the error of the stored
target in hidden space (squared norm of (t - p) @ U, with unembedding rows scaled to mean norm one,
which is the error that the student's trunk receives), and the bits per position in the library's
codec. Weights that are not counts are measured twice: rounded, as caches store them by default, and
exact, in rows whose sampler ends in ", float32 weights".
Besides the library's samplers, it measures candidates for the default: systematic rounds in other
orders of the vocabulary, and a separate threshold per position with the same expected number of
entries at each position.

Equal bytes: between the two budgets that enclose a given number of bits, log error is interpolated
against log bits. The result is the table `error_at_bits` of the output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from planned import coded_bytes
from sparselogits import SparseTargets
from sparselogits.samplers import (
    Adaptive,
    Multinomial,
    NamedSignal,
    Sampler,
    StudentSignal,
    Systematic,
    Threshold,
    TopK,
    fit_budget,
    window_uniforms,
)
from sparselogits.store.codec import TargetCodec, codec_for
from sparselogits.targets import offsets_from_lengths
from sparselogits.teacher.loading import load_teacher, load_tokenizer
from spatial_draws import LocalPivotal, by_local_direction, by_local_tree

Draw = Callable[[Tensor, Tensor], SparseTargets]
Order = Callable[[Tensor, Tensor], Tensor]
BUDGETS = (2, 3, 5, 8, 11, 16, 24, 35, 50)
EXACT = ", float32 weights"
"""End of the name of a sampler whose weights are stored without rounding."""


def in_order(sampler: Sampler, order: Order, unembedding: Tensor) -> Draw:
    """Return a draw with the vocabulary in another order, fixed or per position."""

    def draw(logits: Tensor, uniforms: Tensor) -> SparseTargets:
        ids = order(logits, unembedding).expand(logits.shape)
        drawn = sampler(logits.gather(1, ids), uniforms)
        key = drawn.positions * logits.shape[1] + ids[drawn.positions, drawn.ids]
        key, arrangement = key.sort()
        counts = None if drawn.counts is None else drawn.counts[arrangement]
        return SparseTargets(
            key % logits.shape[1],
            drawn.weights[arrangement],
            drawn.offsets,
            drawn.vocab_size,
            counts=counts,
            rounds=drawn.rounds,
        )

    return draw


def random_order(logits: Tensor, unembedding: Tensor) -> Tensor:
    """Return all ids in one random order, int64 [1, V]."""
    return torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))[None]


def by_probability(logits: Tensor, unembedding: Tensor) -> Tensor:
    """Return the ids of each position by falling probability, int64 [P, V]."""
    return logits.argsort(dim=-1, descending=True, stable=True)


def by_principal_direction(logits: Tensor, unembedding: Tensor) -> Tensor:
    """Return ids ordered along the first principal direction of the unembedding rows, [1, V]."""
    centred = unembedding - unembedding.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return (unembedding @ directions[:, -1]).argsort()[None]


def equal_entries_threshold(entries: float) -> Draw:
    """Return a threshold draw whose tau_j solves sum_i min(1, p_i / tau_j) = entries."""

    def draw(logits: Tensor, uniforms: Tensor) -> SparseTargets:
        p = logits.double().softmax(-1)
        heaviest = p.topk(min(p.shape[1], 4 * int(entries) + 8), -1).values
        # With h heavy tokens tau = (mass of the others) / (entries - h), consistent for one h.
        heavy = torch.arange(heaviest.shape[1])
        rest = 1 - torch.nn.functional.pad(heaviest.cumsum(-1), (1, 0))[:, :-1]
        tau = rest / (entries - heavy).clamp_min(0.5)
        fits = (heaviest <= tau) | (heavy + 1 >= entries)
        tau = tau.gather(1, fits.long().argmax(-1, keepdim=True))
        light = torch.where(p < tau, p / tau, 0)
        tail = (light.cumsum(-1) + uniforms).floor().diff(dim=-1, prepend=uniforms.floor()) > 0
        weights = torch.where(p >= tau, p, torch.where(tail, tau, 0.0))
        rows, ids = weights.nonzero(as_tuple=True)
        lengths = (weights > 0).sum(-1)
        return SparseTargets(
            ids, weights[rows, ids].float(), offsets_from_lengths(lengths), logits.shape[1]
        )

    return draw


def candidates(
    pilot: list[Tensor], unembedding: Tensor, budget: float, spatial: bool
) -> Iterator[tuple[str, str, Draw, Sampler]]:
    """Yield name, parameter, draw, and the sampler whose codec stores the targets."""
    systematic = fit_budget(Systematic(), pilot, budget)
    multinomial = fit_budget(Multinomial(), pilot, budget)
    threshold = fit_budget(Threshold(), pilot, budget)
    yield "multinomial", f"N={multinomial.rounds}", multinomial, multinomial
    yield "systematic", f"N={systematic.rounds}", systematic, systematic
    for exponent in (0.8, 1.2):
        other = fit_budget(Systematic(1, exponent), pilot, budget)
        yield f"systematic q=p^{exponent}", f"N={other.rounds}", other, other
    orders = [random_order, by_probability, by_principal_direction]
    if spatial:
        orders += [by_local_direction, by_local_tree]
        pivotal = LocalPivotal(systematic.rounds, unembedding)
        yield "local pivotal", f"N={systematic.rounds}", pivotal, systematic
    for order in orders:
        name = f"systematic, {order.__name__.replace('_', ' ')}"
        yield name, f"N={systematic.rounds}", in_order(systematic, order, unembedding), systematic
    tau = float(threshold.parameters()["tau"])
    yield "threshold", f"tau={tau:.4f}", threshold, threshold
    # the codec of Top-K stores such weights, although it rounds them to the nearest level
    yield "threshold, equal entries", f"m={budget}", equal_entries_threshold(budget), TopK(1)
    yield "top-k (biased)", f"k={budget}", TopK(int(budget)), TopK(int(budget))


def adaptive_candidates(
    student: str, tokens: Tensor, logits: list[Tensor], rounds: int
) -> Iterator[tuple[str, str, Draw, Sampler]]:
    """Yield adaptive rounds and adaptive proposals for a student, separately and combined."""
    for signal in ("variance", "distance"):
        read = StudentSignal.load(NamedSignal(student, signal))
        reference = float(read.at(tokens[0], slice(0, len(tokens[0]))).strength(logits[0]).mean())
        for position_power, token_power in ((0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
            if position_power == 0 and signal == "distance":
                continue  # the signal has no effect
            sampler = Adaptive(read, rounds, reference, position_power, token_power)
            name = f"adaptive, {signal}^{position_power}, norm^{token_power}"
            yield name, f"N={rounds}", sampler, sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--student", help="add adaptive samplers that follow this checkpoint")
    parser.add_argument("--spatial", action="store_true", help="add the draws of spatial_draws.py")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run samplers whose names start with one of these"
    )
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokens, hidden, unembedding = read_teacher(arguments)
    scaled = unembedding / unembedding.norm(dim=-1).mean()
    logits = [states @ unembedding.T for states in hidden]
    exact = [window.softmax(-1) @ scaled for window in logits]
    pilot = [window[::8] for window in logits]
    rows = []
    for budget in arguments.budgets:
        tried = list(candidates(pilot, unembedding, budget, arguments.spatial))
        if arguments.student:
            rounds = tried[1][3].rounds or 1
            tried += adaptive_candidates(arguments.student, tokens, logits, rounds)
        for name, parameter, draw, stored_as in tried:
            if not name.startswith(tuple(arguments.only)):
                continue
            for stored, row in measure(
                draw, stored_as, tokens, logits, exact, scaled, arguments.seed
            ).items():
                own = {"sampler": name + stored, "budget": budget, "parameter": parameter}
                rows.append(own | row)
                print(json.dumps(rows[-1]), flush=True)
    entropy = torch.cat([torch.special.entr(w.softmax(-1)).sum(-1) for w in logits]).mean()
    result = {
        "conditions": {
            "teacher": Path(arguments.teacher).name,
            "student": arguments.student and Path(arguments.student).name,
            "text": arguments.text.name,
            "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
            "positions": arguments.windows * arguments.window,
            "window": arguments.window,
            "teacher_entropy_nats": float(entropy),
            "seed": arguments.seed,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
        "error_at_bits": error_at_bits(rows, [25, 50, 100, 150, 200, 300]),
    }
    print(json.dumps(result["error_at_bits"], indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def read_teacher(arguments: argparse.Namespace) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return tokens int64 [B, L], float32 hidden states [L, D] per window, unembedding [V, D]."""
    tokenizer = load_tokenizer(arguments.teacher)
    text = arguments.text.read_text(encoding="utf-8", errors="replace")
    needed = arguments.windows * arguments.window
    middle = text[len(text) // 2 : len(text) // 2 + 12 * needed]
    ids = tokenizer(middle, add_special_tokens=False)["input_ids"][:needed]
    tokens = torch.tensor(ids).view(arguments.windows, arguments.window)
    teacher = load_teacher(arguments.teacher, tokenizer=tokenizer)
    hidden = [teacher.hidden(window[None])[0].float() for window in tokens]
    return tokens, hidden, teacher.model.get_output_embeddings().weight.detach().float()  # type: ignore[operator]


def measure(
    draw: Draw,
    stored_as: Sampler,
    tokens: Tensor,
    logits: list[Tensor],
    exact: list[Tensor],
    unembedding: Tensor,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Draw the targets of all windows, and return their entries, error and bits per position.

    The measurements of the targets as caches store them by default have the key "", those of real
    weights stored as float32 `EXACT`.
    """
    drawn = []
    for index, window in enumerate(logits):
        uniforms = window_uniforms(seed, index, len(window), stored_as.uniforms_per_position or 1)
        if isinstance(draw, TopK):
            uniforms = uniforms[:, :0]
        if isinstance(draw, Adaptive):
            draw = draw.at(tokens[index], slice(0, len(window)))
        drawn.append(draw(window, uniforms))
    found, positions = {}, tokens.numel()
    entries = sum(targets.entries for targets in drawn) / positions
    for key in ("", EXACT):
        codec = codec_for(stored_as, exact_weights=bool(key))
        if key and codec == codec_for(stored_as):
            continue  # counts are always exact
        coder = TargetCodec.from_identity(codec, drawn[0].vocab_size)
        stored = [coder.rounded(targets, seed, index) for index, targets in enumerate(drawn)]
        error = 0.0
        for targets, state in zip(stored, exact, strict=True):
            received = torch.zeros_like(state)
            received.index_add_(
                0, targets.positions, targets.weights[:, None] * unembedding[targets.ids]
            )
            error += float((received - state).square().sum())
        bits = 8 * coded_bytes(stored, coder, tokens) / positions
        found[key] = {
            "entries": entries,
            "error": error / positions,
            "error_x_entries": error / positions * entries,
            "bits": bits,
            "bits_an_entry": bits / entries,
            "error_x_bits": error / positions * bits,
        }
    return found


def error_at_bits(rows: list[dict], levels: list[float]) -> dict[str, dict[str, float]]:
    """Interpolate the error of each sampler at given bits per position."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((row["bits"], row["error"]) for row in rows if row["sampler"] == name)
        bits, error = np.log([b for b, _ in own]), np.log([e for _, e in own])
        table[name] = {
            str(level): float(np.exp(np.interp(np.log(level), bits, error)))
            for level in levels
            if bits[0] <= np.log(level) <= bits[-1]
        }
    return table


if __name__ == "__main__":
    main()
