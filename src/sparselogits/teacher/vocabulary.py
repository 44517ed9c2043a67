"""Read the size of a teacher's vocabulary without reading the weights.

Text is packed before the teacher is loaded, so that errors in the text are reported first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselogits.teacher.checkpoint import ADAPTER_CONFIG
from sparselogits.teacher.loading import locate_model


def vocabulary_size(name: str, *, trust_remote_code: bool = False) -> int | None:
    """Return the number of rows in a teacher's head, from the configuration or the GGUF header.

    The result is None if the file cannot be read or does not state the number, and for an adapter,
    because adapters may add tokens. The arguments are those of `load_tokenizer`.
    """
    try:
        source, arguments = locate_model(name)
        if (Path(source) / ADAPTER_CONFIG).exists():
            return None
        if "gguf_file" in arguments:
            return _of_gguf(Path(source) / arguments["gguf_file"])
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        size = config.get_text_config(decoder=True).vocab_size
    except Exception:  # loading the teacher raises a typed error
        return None
    return size if isinstance(size, int) and size > 0 else None


def _of_gguf(path: Path) -> int | None:
    """Return the number of rows in a GGUF file's head, else in its embedding; None without both."""
    from gguf import GGUFReader

    shapes = {tensor.name: tensor.shape for tensor in GGUFReader(str(path)).tensors}
    found = shapes.get("output.weight", shapes.get("token_embd.weight"))
    return None if found is None else int(found[-1])
