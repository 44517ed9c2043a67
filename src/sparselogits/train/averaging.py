"""Average checkpoints of one training run, or of runs from one start, into one model.

The average of a student's own earlier checkpoints is often better than the last of them, and can be
its teacher for another pass over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparselogits.errors import InvalidArgumentError, TeacherError
from sparselogits.files import require_new_folder, whole_folder
from sparselogits.identity import label_of
from sparselogits.teacher.checkpoint import files_fingerprint, find_checkpoint
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import DTYPES, load_language_model, load_tokenizer
from sparselogits.train.student import require_finite_weights


def average_checkpoints(
    folders: Sequence[str | Path],
    out: Path,
    *,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Write the mean of the weights of several checkpoints as a model folder.

    The mean is computed in float32 by torch's `AveragedModel`, one checkpoint at a time, so two
    models are in memory.

    Args:
        folders: at least two model folders of one architecture: checkpoints of the Trainer, or
            models of runs that started from the same weights.
        out: folder of the averaged model; missing or empty.
        dtype: number format of the saved weights; "auto" for that of the first checkpoint.
        progress: called with the checkpoints read and their number.

    Returns:
        The averaged model, on the CPU.

    Raises:
        InvalidArgumentError: there are fewer than two checkpoints, two are equal, or their weights
            differ in names or shapes.
        TeacherError: a checkpoint cannot be loaded, or its weights are not finite.
        StorageError: the folder cannot be written; nothing is left behind.
    """
    require_new_folder(out)
    names = [str(folder) for folder in folders]
    if len(names) < 2:
        raise InvalidArgumentError(f"an average needs at least two checkpoints, found {len(names)}")
    hashes = [files_fingerprint(find_checkpoint(model_named(name))) for name in names]
    for place, own in enumerate(hashes):
        if own in hashes[:place]:
            raise InvalidArgumentError(
                f"{names[hashes.index(own)]} and {names[place]} have the same weights; name each "
                "checkpoint once"
            )
    stored = load_language_model(names[0])  # in its own number format
    saved = next(stored.parameters()).dtype if dtype == "auto" else DTYPES[dtype]
    averaged: Any = None
    for done, name in enumerate(names):
        model = stored.float() if done == 0 else load_language_model(name, dtype="float32")
        require_finite_weights(model, f"the checkpoint at {name}")
        if averaged is None:
            averaged = AveragedModel(model)
        _require_same_shapes(averaged.module, model, names[0], name)
        averaged.update_parameters(model)
        if progress is not None:
            progress(done + 1, len(names))
    mean: Any = averaged.module.to(saved)
    mean.config.dtype = saved
    with whole_folder(out) as folder:
        mean.save_pretrained(folder)
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
        found = [own.get(name) for own in shapes]
        if found[0] != found[1]:
            raise InvalidArgumentError(
                f"the weights of {here} and {there} differ: {name} is {found[0] or 'missing'} in "
                f"the one and {found[1] or 'missing'} in the other; average checkpoints of one "
                "architecture"
            )


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
