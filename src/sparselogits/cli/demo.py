"""Define `sparselogits demo`, which uses only a model and text from installed Python packages."""

from __future__ import annotations

from pathlib import Path

from sparselogits.cli.options import OUTPUT, Json, print_json, print_next
from sparselogits.console import results


def demo(
    out: Path = OUTPUT(
        "Output folder; it takes up to 4 GB during the demo and 2 GB afterwards.", Path("demo-run")
    ),
    as_json: Json = False,
) -> None:
    """Prune a small model, train it with sparse targets and baselines, and compare the students.

    The baselines are cross-entropy to the labels (CE), Top-K targets, and full distillation.
    The demo takes about four minutes on two CPU cores and needs no network access.
    """
    from sparselogits.extras import require_demo

    require_demo()  # before the import of torch, which takes seconds
    from sparselogits.lab.demo import run_demo

    result = run_demo(out)
    if as_json:
        paths = {"report": str(result.report), "student": str(result.student)}
        print_json(result.to_json() | paths | {"talk": result.talk})
        return
    console = results()
    console.print(result.table())
    console.print(result.remark(), soft_wrap=True)
    for sample in result.samples:
        console.print(f"\n{sample.prompt}", soft_wrap=True)
        for name, text in sample.texts.items():
            console.print(f"  {name}: {text}", soft_wrap=True)
    console.print(f"\nreport: {result.report}", soft_wrap=True)
    console.print(f"student: {result.student}; to chat with it, run", soft_wrap=True)
    console.print(result.talk, soft_wrap=True)
    print_next(otherwise=f"open {result.report} in a browser")
