"""Create the dataset card of a cache: a README.md with front matter for dataset hubs."""

from __future__ import annotations

import json

from sparselogits.identity import Identity
from sparselogits.store.records import CacheStatistics
from sparselogits.untrusted import printable, shown
from sparselogits.wording import counted

_LONGEST = 1 << 17  # largest number of characters of the identity in a card


def dataset_card(identity: Identity, statistics: CacheStatistics | None = None) -> str:
    """Return the dataset card in Markdown: contents of the cache, usage example and identity.

    The statistics are None before shards are built.
    """
    table = "" if statistics is None else _table(identity, statistics)
    settings = json.dumps(identity.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
    settings = printable(settings, _LONGEST).replace("```", "\\u0060``")
    return f"""---
configs:
- config_name: default
  data_files: shards/*.parquet
tags:
- knowledge-distillation
- sparselogits
---
# A cache of sparse teacher targets

Windows of {identity.window_length} tokens with sparse targets of the teacher
{_code(identity.teacher.get("name", "unnamed"))} at every position. Train a student from this cache
with

```python
from sparselogits import CacheDataset

dataset = CacheDataset("path/to/this/folder")
```

{table}A row is a window. Every Parquet reader can read `tokens`; `targets` is encoded as described
in the format specification of sparselogits.

Identity of the cache (fingerprint `{identity.fingerprint}`):

```json
{settings}
```
"""


def _code(value: object) -> str:
    """Return a value of an identity as inline code that can stand in a table cell."""
    text = value if isinstance(value, str) else shown(value)
    text = " ".join(printable(text, 200).split())
    # a vertical line ends a table cell even within inline code
    return f"`{text.replace('`', chr(0x2019)).replace('|', '/') or 'unnamed'}`"


def _table(identity: Identity, found: CacheStatistics) -> str:
    """Return a Markdown table of a cache's statistics and settings."""
    padded = identity.packing.get("kind") == "documents"
    padding = ", counting padding" if padded else ""
    rows = {
        "windows": f"{found.windows:,} of {identity.window_length} tokens",
        "tokens": f"{found.tokens:,}{padding}, of which {found.positions:,} have a target",
        "sampler": _code(identity.sampler_in_words()),
        "entries per token": f"{found.entries_per_position:.2f}",
        "bytes per token": f"{found.bytes_per_token:.2f}, including the text's tokens{padding}",
        "bits per entry": f"{found.bits_per_entry:.2f}",
        "size": f"{found.bytes_on_disk:,} bytes in {counted(found.shards, 'shard')}",
        "vocabulary": f"{identity.vocab_size:,} ids; tokenizer sha256 "
        f"{_code(identity.tokenizer[:16])}",
        "temperature": f"{identity.temperature:g}",
        "mean loss of the teacher": f"{found.mean_teacher_loss:.3f} nats per token",
        "mean entropy of the teacher": f"{found.mean_teacher_entropy:.3f} nats per token",
    }
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{lines}\n"
