"""Students that a comparison makes from its teacher: pruned, quantised, or both.

OUT/students/NAME-FINGERPRINT/    the student before training, which every method starts from
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparselogits.corpus import PackedCorpus
from sparselogits.lab.compare.finished import fingerprint
from sparselogits.lab.compare.recipe import CompareRecipe, FromTeacher, slug
from sparselogits.shrink import save, shrink
from sparselogits.store.ranges import spread
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.loading import load_language_model
from sparselogits.train.recipe import Student


def make_students(
    recipe: CompareRecipe, corpus: PackedCorpus, teacher: TransformersTeacher, tokenizer: object
) -> dict[str, Student]:
    """Return every student as training takes it; those made from the teacher are made first.

    Calibration windows are spread over the training windows. A student that is there already is
    not made again.

    Args:
        recipe: the comparison.
        corpus: training and held-out windows.
        teacher: the teacher, for its identity; its weights are read anew, on the CPU.
        tokenizer: the teacher's.

    Raises:
        ShrinkError: sizes that the teacher cannot be pruned to.
    """
    found = {}
    for name, student in recipe.students.items():
        if isinstance(student, Student):
            found[name] = student
            continue
        path = recipe.teacher
        if student.pruned:
            path = str(_pruned(name, student, recipe, corpus, teacher, tokenizer))
        found[name] = Student(path=path, quantize=student.quantize)
    return found


def _pruned(
    name: str,
    student: FromTeacher,
    recipe: CompareRecipe,
    corpus: PackedCorpus,
    teacher: TransformersTeacher,
    tokenizer: object,
) -> Path:
    determined = {
        "student": student.model_dump(mode="json", exclude={"quantize"}),
        "teacher": teacher.identity["weights"],
        "text": corpus.source_fingerprint,
        "window": recipe.window,
    }
    folder = recipe.out / "students" / f"{slug(name)}-{fingerprint(determined)[:8]}"
    if (folder / "config.json").exists():
        return folder
    model = load_language_model(recipe.teacher, dtype=recipe.teacher_dtype)
    chosen = spread(corpus.windows, student.calibration_windows)
    tokens = [torch.from_numpy(corpus.read(i, i + 1)[0].tokens).long() for i in chosen]
    shrunk = shrink(
        model,
        layers=student.layers,
        drop_layers=student.drop_layers,
        channels=student.intermediate_size,
        heads=student.heads,
        hidden=student.hidden_size,
        windows=torch.stack(tokens),
        layer_score=student.layer_score,
    )
    save(shrunk, folder, tokenizer, teacher=Path(recipe.teacher).name)
    return folder
