"""Install tiny models under the model names of the documentation: `demo` and a hub name.

With them, the printed commands run unchanged, in seconds.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparselogits.teacher import demo_model
from tests.conftest import tiny_llama

HUB_NAME = "HuggingFaceTB/SmolLM2-135M"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def save_model(folder: Path, tokenizer: Any) -> None:
    """Save a tiny model that reads 1 024 tokens, with a tokenizer that has a chat template."""
    tiny_llama(max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def stand_in_for_named_models(
    home: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Install the tiny model as `demo` and under the hub name; return the environment to use."""
    with demo_model._gguf_file().open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    demo = home / "sparselogits" / f"smollm2-135m-instruct-{digest}"
    save_model(demo, tokenizer)
    hub = home / "huggingface" / "hub"
    entry = hub / f"models--{HUB_NAME.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    shutil.copytree(demo, entry / "snapshots" / ("0" * 40))
    environment = {"XDG_CACHE_HOME": str(home), "HF_HUB_CACHE": str(hub)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub reads its environment at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    return environment
