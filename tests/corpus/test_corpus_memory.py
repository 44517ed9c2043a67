"""Test that the memory of packing and reading does not grow with the corpus."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import run_python

MEGABYTES = (20, 200)
ALLOWED = 25
"""Allowed growth of memory from the small to the large corpus, in megabytes."""

PROGRAM = """
import re, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from sparselogits.corpus import Packing, open_source, pack

words = Tokenizer(models.WordLevel({"word": 1, "other": 2, "<unk>": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
data, out = sys.argv[1:]
corpus = pack(open_source(data), tokenizer, Packing(1024, 0, None), out, vocab_size=4)
total = 0
for start in range(0, corpus.windows, 8):
    windows = corpus.read(start, min(start + 8, corpus.windows))
    total += sum(int(window.tokens.sum()) for window in windows)
assert total == sum(i * int(n) for i, n in enumerate(corpus.token_frequencies))
# not ru_maxrss: that starts from the size of the process which forked this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(corpus.windows, peak // 1024)
"""

LINE = ("w" * 100 + " " + "o" * 100 + " ") * 4950  # a megabyte of long words, to be quick


def write(kind: str, folder: Path, megabytes: int) -> Path:
    path = folder / f"{megabytes}.{kind}"
    if kind == "parquet":
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:  # one row group, whatever its size
            texts = [LINE[:100_000]] * (10 * megabytes)
            writer.write_table(pa.table({"text": texts}), row_group_size=1 << 30)
        return path
    line = LINE + "\n" if kind == "txt" else json.dumps({"text": LINE}) + "\n"
    with path.open("w") as handle:
        for _ in range(megabytes):
            handle.write(line)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read on Linux")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_memory_is_flat(tmp_path, kind, library_environment):
    peaks, windows = [], []
    for megabytes in MEGABYTES:
        data = write(kind, tmp_path, megabytes)
        done = run_python(
            "-c", PROGRAM, data, tmp_path / f"{megabytes}", env=library_environment, check=True
        )
        count, peak = map(int, done.stdout.split())
        windows.append(count)
        peaks.append(peak)
        data.unlink()
    print(f"{kind}: {windows} windows, {peaks} MB at most")
    assert windows[1] > 9 * windows[0]
    assert peaks[1] < peaks[0] + ALLOWED
