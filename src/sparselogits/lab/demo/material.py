"""Write the text of the demo: the language reference that is part of CPython."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sparselogits.files import write_whole
from sparselogits.teacher.number_formats import has_products

SEPARATOR_ID = 0
"""Id of <|endoftext|>, which separates documents; the model's eos, <|im_end|>, ends chat turns."""


@dataclass(frozen=True)
class DemoText:
    """Text of the demo, which depends on the version of Python.

    Args:
        path: path of a file of JSON lines, one per page of the reference.
        description: origin of the text, number of pages, and hash.
    """

    path: Path
    description: str


def demo_text(out: Path, characters: int) -> DemoText:
    """Write pages of CPython's language reference, in a fixed order, as JSON lines.

    Pages are written until they have at least `characters` characters, or none is left.
    """
    from pydoc_data.topics import topics

    lines, written = [], 0
    pages = sorted(topics.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    for name, text in pages:  # shuffled by their hashes
        if written >= characters:
            break
        lines.append(json.dumps({"text": text, "topic": name}, ensure_ascii=False))
        written += len(text)
    content = ("\n".join(lines) + "\n").encode()
    path = out / "language-reference.jsonl"
    write_whole(path, content)
    digest = hashlib.sha256(content).hexdigest()[:16]
    said = (
        f"{len(lines)} of {len(topics)} pages of CPython {platform.python_version()}'s language "
        f"reference (pydoc_data.topics), sha256 {digest}"
    )
    return DemoText(path, said)


def demo_dtype() -> str:
    """Return bfloat16 if the processor is known to have instructions for it, otherwise float32."""
    return "bfloat16" if has_products(torch.bfloat16) else "float32"
