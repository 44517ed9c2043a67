"""Save a pruned student as an ordinary transformers folder with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselogits.files import whole_folder
from sparselogits.language_model import predicts_masked
from sparselogits.shrink.shrink import Shrunk

_NAMES = {
    "layers": "transformer blocks (`num_hidden_layers`)",
    "hidden": "hidden size (`hidden_size`)",
    "channels": "MLP channels (`intermediate_size`)",
    "heads": "attention heads (`num_attention_heads`)",
    "groups": "key-value heads (`num_key_value_heads`)",
}


def save(shrunk: Shrunk, out: Path, tokenizer: Any, *, teacher: str) -> None:
    """Save a student with configuration, tokenizer and model card; see `files.whole_folder`.

    Args:
        shrunk: pruned student.
        out: folder for the student; it must be missing or empty.
        tokenizer: tokenizer of teacher and student; None to save no tokenizer.
        teacher: name of the teacher, for the card.

    Raises:
        StorageError: If the disk is full or cannot be written.
        InvalidArgumentError: If `out` is a file, or a folder that is not empty.
    """
    with whole_folder(out) as folder:
        shrunk.model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card(shrunk, teacher), encoding="utf-8")


def card(shrunk: Shrunk, teacher: str) -> str:
    """Return the model card of a pruned student, in Markdown."""
    rows = "\n".join(
        f"| {title} | {shrunk.before[name]:,} | {shrunk.after[name]:,} |"
        for name, title in _NAMES.items()
    )
    dropped = ", ".join(map(str, shrunk.dropped_layers)) or "none"
    task = "fill-mask" if predicts_masked(shrunk.model) else "text-generation"
    name = teacher.replace("|", "").replace("\n", " ")
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [pruned, sparselogits]
---
# {name}, pruned

Created from the weights of {name} by removing parts of it (`sparselogits shrink`). It has not been
trained since, unless another card states so: train it by distillation from its teacher before use.

| | teacher | student |
|---|---|---|
{rows}
| parameters | {shrunk.parameters_before:,} | {shrunk.parameters_after:,} |

Removed blocks of the teacher, counted from 0: {dropped}.
"""
