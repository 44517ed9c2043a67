"""Create the students of a comparison from its teacher: pruned, quantised, or both.

OUT/students/NAME-FINGERPRINT/    a pruned student before training; every method starts from it
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
    """Create the students that are pruned from the teacher, and return all students by name.

    A student that exists in the directory of the comparison is not pruned again.

    Args:
        recipe: the comparison.
        corpus: corpus from which evenly spaced training windows are selected for calibration.
        teacher: the teacher. Only its identity is used; its weights are loaded again on the CPU.
        tokenizer: tokenizer of the teacher.

    Returns:
        Each student as the setting `student` of a training recipe.

    Raises:
        ShrinkError: If the teacher cannot be pruned to the given sizes.
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
    """Create a student by pruning the teacher, unless its folder exists; return the folder."""
    inputs = {
        "student": student.model_dump(mode="json", exclude={"quantize"}),
        "teacher": teacher.identity["weights"],
        "text": corpus.source_fingerprint,
        "window": recipe.window,
    }
    folder = recipe.out / "students" / f"{slug(name)}-{fingerprint(inputs)[:8]}"
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
