"""Measure what depends on the language of the text: entropy, entries, noise, sizes.

    python experiments/languages.py run --teacher MODEL --text en=FILE fr=FILE ... --out RESULT.json
    python experiments/languages.py page --result RESULT.json --out docs

`run` reads a teacher over the middle of each text and reports per text:

    text      bytes per token, the teacher's loss and entropy per token
    head      probability mass of the 12, 50 and 100 largest ids
    rounds    mean entries of systematic rounds, N = 7, 14, 25, 50
    budget    for each sampler, with the parameter that meets 12 entries on the first text and the
              one that meets 12 entries on this text: entries, squared error in hidden space, error
              times entries, bits per entry, bytes per token and per byte of text

Question, fixed before the first run: does a budget of 12 entries that is fitted on English text
hold in other languages? Endpoint: entries of the rounds fitted on the first text, divided by 12. A
ratio from 0.9 to 1.1 counts as holding. Secondary: the order of the samplers by error times
entries, which should be the same in every language.

Files that are not UTF-8 are read as Latin-1. The texts of the stored result in the languages of
Debian's installation guide (GPL, not committed) are fetched by:

    apt-get download installation-guide-amd64 && dpkg-deb -x installation-guide-*.deb guide
    for l in en fr de sv ja zh_CN ru; do
        zcat guide/usr/share/doc/installation-guide-amd64/$l/install.$l.txt.gz > $l.txt
    done
    iconv -f koi8-r -t utf-8 ru.txt > ru-utf8.txt

They are translations of one manual, but their middles are not the same passage. The others are
Genesis in public-domain translations (the Swedish one decoded as code page 437).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from samplers_at_equal_bytes import measure
from sparselogits.lab.report.charts import Drawing, budget_chart, draw_png, looks_of
from sparselogits.samplers import Multinomial, Sampler, Systematic, Threshold, TopK, fit_budget
from sparselogits.teacher.loading import load_teacher, load_tokenizer

FIRST, OWN = "rounds of the first text", "rounds of this text"
BUDGET = 12.0
ROUNDS = (7, 14, 25, 50)
HEADS = (12, 50, 100)


def read_text(path: Path) -> str:
    """Return a text in UTF-8 or, if it is not, in Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def middle_of(text: str, tokenizer: Any, windows: int, length: int) -> tuple[Tensor, float]:
    """Return tokens int64 [B, L] from the middle of a text, and the bytes of text per token."""
    needed = windows * length
    part = text[len(text) // 2 : len(text) // 2 + 8 * needed]
    ids = tokenizer(part, add_special_tokens=False)["input_ids"][:needed]
    if len(ids) < needed:
        raise SystemExit(f"the text has {len(ids)} tokens after its middle, expected {needed}")
    # byte-level tokenizers may cut a character, so bytes are counted token by token
    size = sum(len(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
    return torch.tensor(ids).view(windows, length), size / needed


def measured(
    samplers: dict[str, Sampler],
    tokens: Tensor,
    logits: list[Tensor],
    exact: list[Tensor],
    scaled: Tensor,
    bytes_per_token: float,
) -> dict[str, Any]:
    """Measure samplers on one text."""
    found: dict[str, Any] = {}
    for name, sampler in samplers.items():
        # the last row has exact weights, as the page says
        *_, row = measure(sampler, sampler, tokens, logits, exact, scaled, 0).values()
        row["bytes_per_token"] = row["bits"] / 8
        row["bytes_per_byte_of_text"] = row["bits"] / 8 / bytes_per_token
        row["rounds"] = sampler.rounds
        found[name] = row
    return found


def fitted(pilot: list[Tensor]) -> dict[str, Sampler]:
    """Return the samplers of which each meets the budget on pilot logits."""
    return {
        "systematic": fit_budget(Systematic(), pilot, BUDGET),
        "independent rounds": fit_budget(Multinomial(), pilot, BUDGET),
        "threshold": fit_budget(Threshold(), pilot, BUDGET),
        "top-12": TopK(int(BUDGET)),
    }


def run(arguments: argparse.Namespace) -> None:
    """Read all texts, and write the result."""
    tokenizer = load_tokenizer(arguments.teacher)
    teacher = load_teacher(arguments.teacher, tokenizer=tokenizer)
    weight: Tensor = teacher.model.get_output_embeddings().weight.detach().float()  # type: ignore[operator]
    scaled = weight / weight.norm(dim=-1).mean()
    first: dict[str, Sampler] | None = None
    texts: dict[str, Any] = {}
    for given in arguments.text:
        name, _, file = given.partition("=")
        path = Path(file)
        tokens, size = middle_of(read_text(path), tokenizer, arguments.windows, arguments.window)
        hidden = [teacher.hidden(window[None])[0].float() for window in tokens]
        logits = [states @ weight.T for states in hidden]
        exact = [window.softmax(-1) @ scaled for window in logits]
        pilot = [window[::8] for window in logits]
        own = fitted(pilot)
        first = first or own
        log_p = [window.log_softmax(-1) for window in logits]
        largest = torch.cat([each.topk(max(HEADS)).values.exp() for each in log_p])
        pairs = zip(log_p, tokens, strict=True)
        loss = [-each[:-1].gather(1, row[1:, None]) for each, row in pairs]
        rows = {FIRST: first, OWN: own}
        texts[name] = {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes_per_token": size,
            "loss": float(torch.cat(loss).mean()),
            "entropy": float(torch.cat([-(e.exp() * e).sum(-1) for e in log_p]).mean()),
            "head_mass": {str(k): float(largest[:, :k].sum(1).mean()) for k in HEADS},
            "entries_of_rounds": {
                str(n): measure(Systematic(n), Systematic(n), tokens, logits, exact, scaled, 0)[""][
                    "entries"
                ]
                for n in ROUNDS
            },
            **{
                title: measured(samplers, tokens, logits, exact, scaled, size)
                for title, samplers in rows.items()
            },
        }
        print(json.dumps({name: texts[name]}), flush=True)
    result = {
        "conditions": {
            "teacher": Path(arguments.teacher).name,
            "windows": arguments.windows,
            "window": arguments.window,
            "budget": BUDGET,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "texts": texts,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def values(result: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the page's template."""
    texts = result["texts"]
    first, *others = texts.values()
    entries = [row[FIRST]["systematic"]["entries"] for row in others]
    errors = [
        [row[OWN][name]["error_x_entries"] for name in ("independent rounds", "systematic")]
        for row in texts.values()
    ]
    ratios = [independent / systematic for independent, systematic in errors]
    orders = [sorted(errors, key=errors.__getitem__) for errors in map(_errors_of, texts.values())]
    if any(order[:2] != ["threshold", "systematic"] for order in orders):
        raise SystemExit("threshold and systematic are not first everywhere; change the template")
    conditions = result["conditions"]
    return {
        "texts": texts,
        "first": FIRST,
        "own": OWN,
        "teacher": "SmolLM2-135M-Instruct",
        "positions": f"{conditions['windows'] * conditions['window']:,}".replace(",", " "),
        "guides": sum("," not in name for name in texts),  # the others are "English, Genesis"
        "budget": f"{conditions['budget']:g}",
        "low": f"{min(entries):.1f}",
        "high": f"{max(entries):.1f}",
        "holding": sum(abs(each / conditions["budget"] - 1) <= 0.1 for each in entries),
        "others": len(others),
        "rounds": first[FIRST]["systematic"]["rounds"],
        "samplers": list(first[OWN]),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "top_better": sum(order[2].startswith("top") for order in orders),
    }


def _errors_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the error times entries of each sampler on a text, with its own parameters."""
    return {name: found["error_x_entries"] for name, found in row[OWN].items()}


def page(arguments: argparse.Namespace) -> None:
    """Write docs/languages.md and its figure from a result."""
    result = json.loads(arguments.result.read_text())
    texts = result["texts"]
    points = [
        {"series": name, "method": name, "x": int(n), "y": y, "low": None, "high": None}
        for name, row in texts.items()
        for n, y in row["entries_of_rounds"].items()
    ]
    looks = looks_of({name: name for name in texts})
    chart = budget_chart(points, looks, x="rounds N", y="entries per token", log_y=True)
    drawing = Drawing("languages", "Entries of N systematic rounds", chart)
    for dark in (False, True):
        name = f"languages{'_dark' if dark else ''}.png"
        draw_png(drawing, arguments.out / "figures" / name, width=560, scale=1.25, dark=dark)
    (arguments.out / "languages.md").write_text(page_of(result))


def page_of(result: dict[str, Any]) -> str:
    """Return the text of docs/languages.md for a result."""
    template = Path(__file__).with_suffix(".md.j2").read_text()
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(**values(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run")
    measuring.add_argument("--teacher", required=True)
    measuring.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE")
    measuring.add_argument("--windows", type=int, default=4)
    measuring.add_argument("--window", type=int, default=256)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.set_defaults(work=run)
    writing = commands.add_parser("page")
    writing.add_argument("--result", type=Path, required=True)
    writing.add_argument("--out", type=Path, required=True)
    writing.set_defaults(work=page)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work(arguments)


if __name__ == "__main__":
    main()
