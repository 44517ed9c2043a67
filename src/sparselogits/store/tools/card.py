"""Write the dataset card of a cache: README.md with the front matter that dataset hubs read."""

from __future__ import annotations

import json

from sparselogits.identity import Identity
from sparselogits.store.records import CacheStatistics
from sparselogits.untrusted import printable, shown
from sparselogits.wording import counted

_LONGEST = 1 << 17  # characters of the identity that a card quotes


def dataset_card(identity: Identity, statistics: CacheStatistics | None = None) -> str:
    """Return Markdown that says what the folder is, how to read it, and what it was made from.

    Args:
        identity: identity of the cache.
        statistics: statistics of the cache; None before it is built.
    """
    held = "" if statistics is None else _table(identity, statistics)
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

Windows of {identity.window_length} tokens, each with sparse targets of the teacher
{_code(identity.teacher.get("name", "unnamed"))} for every position. Train a student from it with

```python
from sparselogits import CacheDataset

dataset = CacheDataset("path/to/this/folder")
```

{held}A row is a window; `tokens` can be read with any Parquet reader, `targets` is the coded form
that the format specification of sparselogits describes.

Made from (fingerprint `{identity.fingerprint}`):

```json
{settings}
```
"""


def _code(value: object) -> str:
    """Return a value of an identity as inline code, without characters that would end it."""
    text = value if isinstance(value, str) else shown(value)
    text = " ".join(printable(text, 200).split())
    # a vertical line would end the cell of a table, even in code
    return f"`{text.replace('`', chr(0x2019)).replace('|', '/') or 'unnamed'}`"


def _table(identity: Identity, found: CacheStatistics) -> str:
    rows = {
        "windows": f"{found.windows:,} of {identity.window_length} tokens",
        "tokens": f"{found.tokens:,}, of which {found.positions:,} carry a target",
        "sampler": _code(identity.sampler_in_words()),
        "entries per token": f"{found.entries_per_position:.2f}",
        "bytes per token": f"{found.bytes_per_token:.2f}, the text's own tokens included",
        "bits per entry": f"{found.bits_per_entry:.2f}",
        "size": f"{found.bytes_on_disk:,} bytes in {counted(found.shards, 'shard')}",
        "vocabulary": f"{identity.vocab_size:,} ids; tokenizer sha256 "
        f"{_code(identity.tokenizer[:16])}",
        "temperature": f"{identity.temperature:g}",
        "teacher's loss on the text": f"{found.mean_teacher_loss:.3f} nats a token",
        "teacher's mean entropy": f"{found.mean_teacher_entropy:.3f} nats a token",
    }
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{lines}\n"
