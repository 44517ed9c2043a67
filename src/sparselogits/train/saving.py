"""Save a trained student as a folder that other programs load without conversion."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from sparselogits.data import DraftVocabulary
from sparselogits.files import whole_folder, write_whole
from sparselogits.identity import Identity
from sparselogits.language_model import text_config
from sparselogits.quantization import Quantization, load_quantized
from sparselogits.train.recipe import Recipe
from sparselogits.train.recipe_text import recipe_text

DRAFTER_HEAD = "drafter-head.safetensors"


def save_student(
    model: nn.Module,
    out: Path,
    *,
    tokenizer: Any | None,
    dtype: torch.dtype,
    card: str,
    draft: DraftVocabulary | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Write OUT/model, and OUT/adapter if an adapter was trained.

    An existing folder is removed first; the new one appears with its whole content.

    Args:
        model: the student, which is changed: the adapter of a PEFT model is saved and then merged
            into the weights, the weights are converted to `dtype`, and a head for a draft
            vocabulary is widened (`DraftVocabulary.widen_head`).
        out: folder of the run.
        tokenizer: tokenizer to save with the student; None to save none.
        dtype: number format of the saved weights.
        card: text of the model card.
        draft: draft vocabulary of the student's head; the head is also saved alone, as
            OUT/drafter-head.safetensors. None for a head for all ids.
        quantization: quantisation of the saved weights; None for weights in `dtype`.

    Raises:
        StorageError: If a folder cannot be written.
    """
    if hasattr(model, "merge_and_unload"):
        _replace(out / "adapter", lambda folder: model.save_pretrained(folder))  # type: ignore[operator]
    model = without_adapter(model)
    model.to(dtype)
    if draft is not None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        write_whole(out / DRAFTER_HEAD, save_tensors(draft.checkpoint_tensors(head)))
        draft.widen_head(model)

    def save(folder: Path) -> None:
        if quantization is None:
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            with tempfile.TemporaryDirectory(dir=folder) as plain:
                model.save_pretrained(plain)  # type: ignore[operator]
                quantised = load_quantized(Path(plain), quantization)
            quantised.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if draft is not None:
            draft.save(folder)
        write_whole(folder / "README.md", card)

    _replace(out / "model", save)


def without_adapter(model: nn.Module) -> nn.Module:
    """Merge the adapter of a PEFT model into the weights; return other models as they are."""
    if not hasattr(model, "merge_and_unload"):
        return model
    _untie_adapted(model)
    return model.merge_and_unload()  # type: ignore[operator, no-any-return]


def _untie_adapted(model: Any) -> None:
    """Untie embedding and head if one of them has an adapter, which must not change the other."""
    base = model.get_base_model()
    config = text_config(base.config)
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    adapted = any(type(layer) not in (nn.Linear, nn.Embedding) for layer in layers)
    if not adapted or not getattr(config, "tie_word_embeddings", False):
        return
    head = getattr(layers[1], "base_layer", layers[1])
    if isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config.tie_word_embeddings = base.config.tie_word_embeddings = False


def _replace(folder: Path, save: Any) -> None:
    if folder.exists():  # left by an interrupted run
        shutil.rmtree(folder)
    with whole_folder(folder) as temporary:
        save(temporary)


def model_card(recipe: Recipe, identity: Identity, metrics: Mapping[str, Any]) -> str:
    """Return the model card of a trained student, as Markdown.

    Args:
        recipe: recipe of the run.
        identity: identity of the cache.
        metrics: metrics of the run, by name.
    """
    teacher = identity.teacher
    base = recipe.student.path
    front = {"library_name": "transformers", "tags": ["distillation", "sparselogits"]}
    if base is not None:
        front["base_model"] = base
    given = recipe.model_dump(mode="json", exclude_defaults=True)
    rows = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
    quantize = recipe.student.quantize
    quantised = f"| weights | {quantize.settings().described} (torchao) |\n" if quantize else ""
    masked = identity.objective is not None
    call, task = ("fill", "fill-mask") if masked else ("generate", "text-generation")
    return f"""---
{json.dumps(front, indent=2)}
---

# Student of {_inline(teacher["name"])}

Distilled with [sparselogits](https://pypi.org/project/sparselogits/) from a cache of the teacher's
targets.

| | |
|---|---|
| teacher | `{_inline(teacher["name"])}` |
| teacher's weights | `{_inline(teacher["weights"])}` |
| cache fingerprint | `{identity.fingerprint}` |
| sampler | `{_inline(json.dumps(identity.sampler))}` |
{quantised}{rows}

```python
from transformers import pipeline

{call} = pipeline("{task}", "PATH/TO/THIS/FOLDER")
```

## Recipe

```yaml
{recipe_text(given).strip().replace("```", "")}
```
"""


def _inline(text: Any) -> str:
    return " ".join(str(text).split()).replace("`", "").replace("|", "/")[:200]
