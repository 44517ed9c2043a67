"""Load the teacher and the text for benchmarks that need a real teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselogits.corpus import PackedCorpus, open_source, pack, packing_for
from sparselogits.lab.demo.material import SEPARATOR_ID, demo_text
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.demo_model import demo_model
from sparselogits.teacher.loading import load_tokenizer

WORK = Path(__file__).parent / ".work"
"""Folder in which packed text and caches are kept between runs; safe to delete."""


def teacher(folder: Path | None, dtype: str) -> tuple[TransformersTeacher, Any]:
    """Load a teacher and its tokenizer from a folder; default: the demo's SmolLM2-135M."""
    name = str(folder or demo_model())
    tokenizer = load_tokenizer(name)
    return load_teacher(name, tokenizer=tokenizer, dtype=dtype), tokenizer


def corpus(
    tokenizer: Any, vocab_size: int, text: Path | None, windows: int, length: int
) -> PackedCorpus:
    """Pack a text (by default the demo's) into at least the given number of windows."""
    folder = WORK / f"corpus-{length}-{windows}"
    source = (
        text or demo_text(folder.with_name(f"text-{length}-{windows}"), 6 * windows * length).path
    )
    packing = packing_for(tokenizer, window_length=length, separator_id=SEPARATOR_ID)
    return pack(open_source(str(source)), tokenizer, packing, folder, vocab_size=vocab_size)
