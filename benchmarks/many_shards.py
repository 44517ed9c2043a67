"""Measure the memory of `Cache.statistics` by number of shards.

    python benchmarks/many_shards.py --out benchmarks/many_shards.json

The commands info, card, push and cache call this function. The shards have eight windows of 64
tokens, which differ only in their numbers, in a local folder. The result is the growth of the peak
resident memory per shard, from 10 % of the shards to all.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults.forge import Shard, write_identity
from tests.store.draws import identity, records

from measuring import machine, publish
from sparselogits.store import Cache


def peak_mib() -> float:
    """Return the peak of this process's resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shards = given.shards
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard = Shard.of(identity(), records("counts", 0, 8))
        write_identity(root, identity())
        peaks = []
        for count in (shards // 10, shards):
            for number in range(len(list(root.glob("shards/*"))), count):
                shard.start, shard.stop = 8 * number, 8 * number + 8
                shard.columns["window_index"] = list(range(shard.start, shard.stop))
                shard.description |= {"start": shard.start, "stop": shard.stop}
                shard.write(root)
            assert Cache.open(root).statistics().shards == count
            peaks.append(peak_mib())
    grown = peaks[1] - peaks[0]
    report = {
        "machine": machine(),
        "settings": {"shards": shards},
        "peak_mib": round(peaks[1], 1),
        "mib_per_shard": round(grown / (shards - shards // 10), 4),
    }
    publish(report, given.out)


if __name__ == "__main__":
    main()
