"""The size of a teacher's vocabulary, without its weights.

Text is packed before the teacher is loaded, so that what is wrong with the text is said first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselogits.teacher.loading import locate_model


def vocabulary_size(name: str, *, trust_remote_code: bool = False) -> int | None:
    """Return the number of rows of a teacher's head, as its configuration gives it.

    Args:
        name: local folder, GGUF file or hub name.
        trust_remote_code: run configuration code that comes with the model.

    Returns:
        None where the configuration does not say it: a folder of an adapter, whose tokens may have
        been added to the base model's, or files that cannot be read, which loading explains.
    """
    try:
        source, arguments = locate_model(name)
        if (Path(source) / "adapter_config.json").exists():
            return None
        if "gguf_file" in arguments:
            return _of_gguf(Path(source) / arguments["gguf_file"])
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        size = config.get_text_config(decoder=True).vocab_size
    except Exception:  # loading the teacher says what is wrong, with its own advice
        return None
    return size if isinstance(size, int) and size > 0 else None


def _of_gguf(path: Path) -> int | None:
    from gguf import GGUFReader

    shapes = {tensor.name: tensor.shape for tensor in GGUFReader(str(path)).tensors}
    found = shapes.get("output.weight", shapes.get("token_embd.weight"))
    return None if found is None else int(found[-1])
