"""Average checkpoints of a training run, or models of runs with the same initial weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparselogits.data.draft import vocabulary_of
from sparselogits.errors import InvalidArgumentError, TeacherError
from sparselogits.files import require_new_folder, whole_folder
from sparselogits.identity import differing_fields, label_of
from sparselogits.teacher.checkpoint import files_fingerprint, find_checkpoint
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import (
    DTYPES,
    load_language_model,
    load_tokenizer,
    require_dtype,
)
from sparselogits.train.saving import without_adapter
from sparselogits.train.student import require_finite_weights
from sparselogits.untrusted import shown

_OF_THE_FILE = {"dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"}
"""Names in config.json that say how a model is stored or used, not what it computes."""


def average_checkpoints(
    folders: Sequence[str | Path],
    out: Path,
    *,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Average the weights of several checkpoints, and write the result as a model folder.

    The mean is computed in float32 by torch's `AveragedModel`; two models are in memory at a time.

    Adapters are merged into their base models before, since the mean of the matrices of an adapter
    is not the mean of the weights. The average of drafters has the draft vocabulary of the
    drafters. The folder also contains a model card, and the first tokenizer that a checkpoint has,
    if any.

    Args:
        folders: at least two model folders of the same architecture: checkpoints of the Trainer, or
            models of runs with the same initial weights.
        out: folder of the averaged model, which must be missing or empty.
        dtype: number format of the saved weights; "auto" for the format of the first checkpoint.
        progress: function that is called with the number of checkpoints read and the total number.

    Returns:
        The averaged model, on the CPU.

    Raises:
        InvalidArgumentError: If there are fewer than two checkpoints, two have identical files, the
            weights differ in names or shapes, the configurations differ in what the model computes,
            the draft vocabularies differ, or `out` is not empty.
        TeacherError: If a checkpoint cannot be loaded or has weights that are not finite, or
            `dtype` is unknown.
        StorageError: If the folder cannot be written; an incomplete folder is removed.
    """
    require_dtype(dtype)
    require_new_folder(out)
    names = [str(folder) for folder in folders]
    if len(names) < 2:
        raise InvalidArgumentError(
            f"an average needs at least two checkpoints, found {len(names)}; give more checkpoints"
        )
    checkpoints = [find_checkpoint(model_named(name)) for name in names]
    hashes = [files_fingerprint(found) for found in checkpoints]
    for index, digest in enumerate(hashes):
        if digest in hashes[:index]:
            raise InvalidArgumentError(
                f"{names[hashes.index(digest)]} and {names[index]} have the same weights; give "
                "each checkpoint once"
            )
    drafts = [vocabulary_of(found.folder) for found in checkpoints]
    for name, draft in zip(names, drafts, strict=True):
        if draft != drafts[0]:
            raise InvalidArgumentError(
                f"the draft vocabularies differ: {drafts[0]!r} in {names[0]}, {draft!r} in {name}; "
                "average drafters with the same draft vocabulary, or models without one"
            )
    model = load_language_model(names[0])  # in the number format of its files
    saved = next(model.parameters()).dtype if dtype == "auto" else DTYPES[dtype]
    model = without_adapter(model.float())
    averaged: Any = AveragedModel(model)  # copies the model
    for done, name in enumerate(names, 1):
        if done > 1:
            del model  # before the next one is loaded, so that only two models are in memory
            model = without_adapter(load_language_model(name, dtype="float32"))
        require_finite_weights(model, f"the checkpoint at {name}")
        _require_same_shapes(averaged.module, model, names[0], name)
        _require_same_settings(averaged.module, model, names[0], name)
        averaged.update_parameters(model)
        if progress is not None:
            progress(done, len(names))
    mean: Any = averaged.module.to(saved)
    mean.config.dtype = saved
    with whole_folder(out) as folder:
        mean.save_pretrained(folder)
        if drafts[0] is not None:
            drafts[0].save(folder)
        for name in names:
            try:
                load_tokenizer(name).save_pretrained(folder)
                break
            except TeacherError:
                continue  # checkpoints of the Trainer have no tokenizer
        (folder / "README.md").write_text(_card(names), encoding="utf-8")
    return mean  # type: ignore[no-any-return]


def _require_same_shapes(one: nn.Module, other: nn.Module, here: str, there: str) -> None:
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (one, other)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        found = [model_shapes.get(name) for model_shapes in shapes]
        if found[0] != found[1]:
            described = [
                f"missing in {folder}" if shape is None else f"shape {shape} in {folder}"
                for shape, folder in zip(found, (here, there), strict=True)
            ]
            raise InvalidArgumentError(
                f"weight {name}: {described[0]}, {described[1]}; average checkpoints of the same "
                "architecture"
            )


def _require_same_settings(one: Any, other: Any, here: str, there: str) -> None:
    """Validate that equal weights mean the same in both models: heads, norms, positions."""
    found_here, found_there = (
        {name: value for name, value in model.config.to_dict().items() if not _ignored(name)}
        for model in (one, other)
    )
    for name, found, expected in differing_fields(found_here, found_there):
        raise InvalidArgumentError(
            f"config.json has {name} {shown(found)} in {here} and {shown(expected)} in {there}, so "
            "equal weights compute different functions; average checkpoints of one configuration"
        )


def _ignored(name: str) -> bool:
    return name.startswith("_") or name.endswith("token_id") or name in _OF_THE_FILE


def _card(names: Sequence[str]) -> str:
    listed = "\n".join(f"- `{label_of(name).replace('`', '')}`" for name in names)
    return f"""---
library_name: transformers
tags: [averaged, sparselogits]
---
# Average of {len(names)} checkpoints

Mean of the weights of these checkpoints (`sparselogits average`):

{listed}
"""
