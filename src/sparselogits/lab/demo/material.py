"""Write the demo's text: the language reference that every CPython installation carries.

The demo's teacher is the model named `demo`, see `sparselogits.teacher.demo_model`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sparselogits.files import write_whole

SEPARATOR_ID = 0
"""<|endoftext|>; the instruct model's eos, <|im_end|>, ends turns of a chat, not documents."""


@dataclass(frozen=True)
class DemoText:
    """The text of the demo.

    Args:
        path: JSON lines, one page of the reference each.
        description: what the text is, with its hash; both differ from Python to Python.
    """

    path: Path
    description: str


def demo_text(out: Path, characters: int) -> DemoText:
    """Write whole pages of CPython's language reference, about `characters` long in total."""
    from pydoc_data.topics import topics

    lines, written = [], 0
    for name, text in sorted(topics.items(), key=lambda item: _shuffled(item[0])):
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


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def demo_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32.

    Emulated bfloat16 products are several times slower than float32 ones.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"
