"""The dataset card of a cache: README.md with the front matter that dataset hubs read."""

from __future__ import annotations

import json

from sparselogits.identity import Identity


def dataset_card(identity: Identity) -> str:
    """Markdown that says what the folder is, how to read it, and what it was made from."""
    settings = json.dumps(identity.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
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
`{identity.teacher.get("name", "unnamed")}` for every position. Train a student from it with

```python
from sparselogits import CacheDataset

dataset = CacheDataset("path/to/this/folder")
```

A row is a window; `tokens` can be read with any Parquet reader, `targets` is the coded form that
the format specification of sparselogits describes.

Made from (fingerprint `{identity.fingerprint}`):

```json
{settings}
```
"""
