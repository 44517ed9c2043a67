"""Store the per-window sums of all runs in one file, from which intervals can be recomputed.

    python -m sparselogits.lab.compare.windows RESULTS.json WINDOWS.npz

The command recomputes `figures`, `minus_ce`, `gap_closed` and `recovered` of each method, with
intervals, prints those that differ from RESULTS.json, and exits with 1 if there are any.
WINDOWS.npz is a compressed archive of NumPy arrays, with R finished runs:

    runs             int64 [R, 3]: indices of method and student in `names`, and the seed
    names            titles of the methods and names of the students of these runs
    loss, kl, ...    float32 [R, W, C], see `HeldOut.sums`
"""

from __future__ import annotations

import argparse
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from sparselogits.errors import CacheError
from sparselogits.evaluate import METRICS
from sparselogits.lab.compare.results import MethodRow, MetricEstimate, Results, read_results
from sparselogits.lab.compare.summary import References, RunKey, WindowSums, metrics_of

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of an estimate, that is taken as rounding.

Sums are rounded to float32, and results to six digits.
"""


_UNREADABLE = (OSError, ValueError, LookupError, EOFError, BadZipFile, zlib.error, RuntimeError)
"""Errors for files that are no archives, or have damaged, missing or encrypted members."""


def pack_windows(sums: Mapping[RunKey, WindowSums]) -> bytes:
    """Encode the per-window sums of runs as the content of windows.npz."""
    names = list(dict.fromkeys(name for key in sums for name in key[:2]))
    runs = [[names.index(method), names.index(student), seed] for method, student, seed in sums]
    arrays: dict[str, Any] = {
        name: np.array([of_run[name] for of_run in sums.values()], np.float32) for name in METRICS
    }
    out = io.BytesIO()
    np.savez_compressed(
        out, runs=np.array(runs, np.int64).reshape(-1, 3), names=np.array(names), **arrays
    )
    return out.getvalue()


def windows_of(out: Path) -> bytes:
    """Return the content of windows.npz for the finished runs of a comparison.

    Args:
        out: directory of the comparison, with `results.json`; the comparison may be unfinished.

    Raises:
        CacheError: If the results, or the per-window sums of a finished run, cannot be read.
    """
    sums = {}
    for run in read_results(out).runs:
        if run.folder is None or run.status != "done":
            continue
        key = run.folder.rpartition("--")[2]  # the first digits of the fingerprint
        # outcome.json was written by earlier versions
        files = [*out.glob(f"finished/runs/{key}*.json"), out / run.folder / "outcome.json"]
        file = files[0]
        try:
            content = json.loads(file.read_bytes())
            sums[run.method, run.student, run.seed] = content.get("value", content)["sums"]
        except (OSError, ValueError, KeyError) as error:
            raise CacheError(
                f"{file} contains no per-window sums ({error}), although "
                f"{out / 'results.json'} lists the run as done. Run `sparselogits compare` again"
            ) from error
    return pack_windows(sums)


def read_windows(path: Path) -> dict[RunKey, WindowSums]:
    """Read the per-window sums of runs from windows.npz, as float64 [W, C].

    Raises:
        CacheError: If the file is missing or is not an archive of per-window sums.
    """
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:  # numpy fails on damaged bytes with errors of many kinds
            raise ValueError(f"{damaged} is damaged")
        with np.load(path, allow_pickle=False) as stored:
            names = stored["names"].tolist()
            columns = {name: stored[name].astype(np.float64) for name in METRICS}
            return {
                (names[method], names[student], seed): {
                    name: column[row] for name, column in columns.items()
                }
                for row, (method, student, seed) in enumerate(stored["runs"].tolist())
            }
    except _UNREADABLE as error:
        raise CacheError(
            f"{path} is not a file of per-window sums ({error}). Give the windows.npz that "
            "`sparselogits compare` writes into the folder of results.json"
        ) from error


def differences(results: Results, sums: Mapping[RunKey, WindowSums]) -> list[str]:
    """Compare stored metrics and intervals with those recomputed from per-window sums.

    Args:
        results: stored results.
        sums: per-window sums of all finished runs.

    Returns:
        A line for each metric that differs by more than `TOLERANCE`.

    Raises:
        CacheError: If the sums of a finished run are missing.
    """
    recipe = results.settings["recipe"]
    found = []
    for row in results.methods:
        for seed in row.seeds_done:
            if (row.method, row.student, seed) not in sums:
                raise CacheError(
                    f"there are no per-window sums of {row.method}, {row.student}, seed {seed}, "
                    "although results.json lists that run as done. Run `sparselogits compare` "
                    "again, which writes both files"
                )
        of_student = [each for each in results.methods if each.student == row.student]
        references = References.of_rows(of_student)
        recomputed = metrics_of(
            (row.method, row.student),
            sums,
            references,
            seeds=row.seeds_done,
            first_seed=recipe["seeds"][0],
            resamples=recipe["resamples"],
        )
        for name, stored, again in _pairs(row, recomputed):
            if not _close(stored, again):
                found.append(
                    f"{row.method}, {row.student}, {name}: stored {stored}, recomputed {again}"
                )
    return found


def _pairs(
    row: MethodRow, recomputed: Mapping[str, Any]
) -> Iterator[tuple[str, MetricEstimate | None, MetricEstimate | None]]:
    """Yield the name of each metric, the stored estimate, and the recomputed one."""
    for name, stored in row.figures.items():
        yield name, stored, recomputed["figures"].get(name)
    for name, stored in row.minus_ce.items():
        yield f"{name} minus CE", stored, recomputed["minus_ce"].get(name)
    for name in ("gap_closed", "recovered"):
        yield name, getattr(row, name), recomputed[name]


def _close(stored: MetricEstimate | None, again: MetricEstimate | None) -> bool:
    if stored is None or again is None:
        return stored is again
    one, other = _numbers(stored), _numbers(again)
    scale = max(abs(x) for x in one if x is not None)
    return all(
        x is y
        if x is None or y is None
        else math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)
        for x, y in zip(one, other, strict=True)
    )


def _numbers(estimate: MetricEstimate) -> list[float | None]:
    intervals = (estimate.windows, estimate.seeds, estimate.both)
    return [estimate.mean, *(end for ends in intervals for end in (ends.low, ends.high))]


def main() -> None:
    """Print the stored metrics that differ from recomputed ones; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of a comparison, or its directory")
    parser.add_argument("windows", type=Path, help="windows.npz of the same comparison")
    given = parser.parse_args()
    found = differences(read_results(given.results), read_windows(given.windows))
    print(json.dumps({"differences": found}, indent=1))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
