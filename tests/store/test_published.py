"""Test that the bits per entry in docs/format.md are those of the committed run."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rounded_weights_of_the_page_are_those_that_were_measured():
    found = json.loads((ROOT / "benchmarks" / "rounded_weights.json").read_text())["methods"]
    page = (ROOT / "docs" / "format.md").read_text()
    _, _, table = page.partition("| bits per entry, exact | bits per entry, rounded | KL |\n")
    lines = table.split("\n\n")[0].splitlines()[1:]
    printed = [tuple(map(float, line.strip("| ").split(" | ")[1:])) for line in lines]
    measured = [
        (own["entries_per_token"], own["exact"], own["rounded"], own["kl"])
        for own in found.values()
    ]
    assert printed == measured
    first = found["top-12"]
    octave = first["per_octave"]
    assert f"A level of Top-K takes {octave['32']['bits_per_weight']:.1f} bits" in page
    assert f"{first['mean_rest']:.3f} on average, by {first['mean_rest_error']:.4f}" in page
