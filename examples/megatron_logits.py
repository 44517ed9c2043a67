"""Turn Megatron-LM's offline logits into rows that `sparselogits import` reads.

    python examples/megatron_logits.py LOGITS --tokens tokens.jsonl --out rows
    sparselogits import rows --tokenizer MODEL --vocab-size V --out my-imported

LOGITS is the folder into which Megatron-LM saved its logits. Its archives have the logprobs of each
iteration, but not the tokens, which Megatron-LM takes from its data set again. So write the tokens
down first, in the order in which training consumes the samples:

    for i in range(samples):
        print(json.dumps({"input_ids": dataset[i]["tokens"].tolist()}), file=out)

Archives hold pickled tensors. They are loaded with `weights_only=True`, which runs no code from
them; still, convert only archives of your own. That is why this is a script, and not a part of the
library, which opens no pickle.

Layouts, of `megatron/training/distillation` in Megatron-LM: an archive per data-parallel rank D and
interval has `_meta.json` and a member per iteration, in which `values`, `indices_low` (uint16) and
`bit_17` are

1. lists of tensors [sequence, batch, K], one per microbatch (`cp{C}_dp{D}__{I}.tar`);
2. tensors [sequence, samples of the rank, K], with `format_version` 2; the microbatches follow one
   another, and `_meta.json` has their size, `mbs_save` (`dp{D}__{I}.tar` or `dp{D}__{I}-{J}.tar`).

An entry that top-p left out has the index -1 and a value below -1000.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from sparselogits.corpus.formats import JsonLines, SourceFile

NAME = re.compile(r"(?:cp(\d+)_)?dp(\d+)__(\d+)(?:-\d+)?\.tar")
MEMBER = re.compile(r"(\d+)(?:-\d+)?\.pt\.zst")
META = "_meta.json"
LEFT_OUT = -1000.0
ROWS_PER_GROUP = 64


def archives(folder: Path) -> dict[int, list[Path]]:
    """Return the archives of each data-parallel rank, in the order of their iterations."""
    found: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.iterdir():
        if match := NAME.fullmatch(path.name):
            context, rank, last = (int(number or 0) for number in match.groups())
            if context:
                raise SystemExit(
                    f"{path.name} is of context-parallel rank {context}, which has a part of each "
                    "sequence; save logits without context parallelism"
                )
            found[rank].append((last, path))
    if not found or sorted(found) != list(range(len(found))):
        raise SystemExit(
            f"{folder} has archives of the ranks {sorted(found)}; expected dp0__*.tar or "
            "cp0_dp0__*.tar, and one series for each further rank: fetch all of them"
        )
    return {rank: [path for _, path in sorted(paths)] for rank, paths in found.items()}


def iterations(paths: list[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each iteration of one rank, and its tensors, a list per name."""
    for path in paths:
        saver: dict[str, Any] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name)
                if match is None and member.name != META:
                    continue
                packed = archive.extractfile(member)
                assert packed is not None
                if match is None:
                    saver = json.loads(packed.read()).get("saver", {})
                    continue
                data = zstandard.ZstdDecompressor().decompress(packed.read())
                tensors = torch.load(io.BytesIO(data), weights_only=True)
                yield int(match[1]), microbatches(tensors, saver, f"{path.name}, {member.name}")


def microbatches(tensors: dict[str, Any], saver: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the tensors of an iteration in layout 1: lists with one tensor per microbatch."""
    version, size = tensors.get("format_version", 1), saver.get("mbs_save")
    if version == 1:
        return tensors
    parallel = tensors.get("cu_seqlens_padded") is not None and saver.get("cp_size_save", 1) > 1
    if version != 2 or not isinstance(size, int) or size < 1 or parallel:
        raise SystemExit(
            f"{where} has format_version {version} and was saved with {saver}; expected version 1, "
            "or 2 with mbs_save in _meta.json and without packed sequences under context "
            "parallelism. Save the logits in one of these layouts"
        )
    names = ("values", "indices_low", "bit_17")
    return {name: tensors[name].split(size, dim=1) for name in names}


def samples(ranks: dict[int, list[Path]]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield ids and logprobs of each sample, in the order in which training consumes them.

    A microbatch of all ranks together is a run of consecutive samples; each rank has a slice of it.
    """
    streams = [iterations(ranks[rank]) for rank in sorted(ranks)]
    for parts in zip(*streams, strict=True):
        numbers = {number for number, _ in parts}
        if len(numbers) > 1:
            raise SystemExit(
                f"the ranks have the iterations {sorted(numbers)} at the same place; fetch the "
                "archives of all ranks"
            )
        for microbatch in range(len(parts[0][1]["values"])):
            for _, tensors in parts:
                values = tensors["values"][microbatch].float()
                low = tensors["indices_low"][microbatch].long()
                ids = low | (tensors["bit_17"][microbatch].long() << 16)
                for sample in range(values.shape[1]):
                    yield lists(ids[:, sample], values[:, sample])


def lists(ids: torch.Tensor, values: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Return ids and logprobs of each position, without the entries that were left out."""
    kept = values > LEFT_OUT
    pairs = list(zip(ids, values, kept, strict=True))
    return [i[k].tolist() for i, _, k in pairs], [x[k].tolist() for _, x, k in pairs]


def tokens_of(path: Path) -> Iterator[list[int]]:
    """Yield the tokens of each row of a JSON lines file."""
    file = SourceFile(path, path.name, JsonLines())
    for span in file.format.spans(file, 1 << 62, None):
        for record in file.format.records(span, None):
            yield record.values["input_ids"]


def main() -> None:
    """Write one Parquet file of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logits", type=Path, help="folder of the archives")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON lines with input_ids")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("topk_ids", pa.list_(pa.list_(pa.int32()))),
            ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
        ]
    )
    rows: list[dict[str, Any]] = []
    count = 0
    rows_of_tokens = tokens_of(options.tokens)
    with pq.ParquetWriter(options.out / "rows.parquet", schema) as writer:
        for ids, logprobs in samples(archives(options.logits)):
            tokens = next(rows_of_tokens, None)
            if tokens is None or len(tokens) != len(ids):
                raise SystemExit(
                    f"sample {count} has logprobs of {len(ids)} positions and "
                    f"{'no' if tokens is None else len(tokens)} tokens; write the tokens of the "
                    "run that saved the logits, in its order"
                )
            rows.append({"input_ids": tokens, "topk_ids": ids, "topk_logprobs": logprobs})
            count += 1
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    print(json.dumps({"rows": count, "out": str(options.out)}))


if __name__ == "__main__":
    main()
