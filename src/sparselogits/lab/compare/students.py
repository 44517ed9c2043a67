"""Create the students of a comparison that depend on its teacher.

OUT/students/NAME-FINGERPRINT/    a pruned student before training; every method starts from it

Students that are only quantised start from the teacher, and have no folder. New students of a
masked teacher are models of the teacher's class, unless the recipe gives a `config`; the folder of
a new student contains only the teacher's configuration with other sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sparselogits.corpus import PackedCorpus
from sparselogits.corruption import Corruption
from sparselogits.data import TextDataset
from sparselogits.errors import RecipeError
from sparselogits.evaluate.passes import joined_texts
from sparselogits.files import write_whole
from sparselogits.lab.compare.finished import fingerprint
from sparselogits.lab.compare.recipe import CompareRecipe, FromTeacher, slug
from sparselogits.language_model import text_config
from sparselogits.shrink import save, shrink
from sparselogits.store.ranges import spread
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import load_language_model
from sparselogits.train.recipe import SIZES, Student
from sparselogits.train.student import model_of, student_configuration


def make_students(
    recipe: CompareRecipe,
    corpus: PackedCorpus,
    teacher: TransformersTeacher,
    tokenizer: object,
    corruption: Corruption | None,
) -> dict[str, Student]:
    """Create the folders of students that depend on the teacher, and return all students by name.

    A folder that exists is not written again.

    Args:
        recipe: the comparison.
        corpus: corpus from which evenly spaced training windows are selected for calibration.
        teacher: the teacher. Its weights are loaded again for pruning, on the CPU.
        tokenizer: tokenizer of the teacher.
        corruption: corruption of the windows for a masked teacher; None for a causal teacher.

    Returns:
        Each student as the setting `student` of a training recipe.

    Raises:
        ShrinkError: If the teacher cannot be pruned to the given sizes.
        RecipeError: If the teacher's configuration does not have a size that is given.
    """
    found = {}
    for name, student in recipe.students.items():
        if isinstance(student, Student):
            found[name] = student
            if corruption is not None and student.is_new and student.config is None:
                folder = _with_sizes(name, student, recipe, teacher)
                found[name] = Student(config=str(folder), quantize=student.quantize)
            continue
        path = recipe.teacher
        if student.pruned:
            path = str(_pruned(name, student, recipe, corpus, teacher, tokenizer, corruption))
        found[name] = Student(path=path, quantize=student.quantize)
    return found


def require_students_fit(
    recipe: CompareRecipe, students: Mapping[str, Student], corpus: PackedCorpus, teacher: Any
) -> None:
    """Check, without weights, that new students can be created and that a cosine loss fits.

    A cosine loss needs students with the teacher's hidden size. Students that cannot be checked
    without weights, such as adapters and GGUF files, are skipped.

    Args:
        recipe: the comparison.
        students: result of `make_students`.
        corpus: corpus that determines the vocabulary size and the separator of new models.
        teacher: the teacher's model.

    Raises:
        RecipeError: If a new student cannot be created, or a student has another hidden size than
            a cosine loss needs.
    """
    cosine = next((method.title for method in recipe.methods if method.cosine), None)
    for name, student in students.items():
        config: Any
        if student.path is None:
            config = student_configuration(
                student,
                vocab_size=corpus.vocab_size,
                window_length=recipe.window,
                separator_id=corpus.packing.separator_id,
            )
            try:
                with torch.device("meta"):
                    model_of(config, student)
            except RecipeError as error:
                if "meta" in str(error.__cause__):
                    continue  # the class computes with numbers that a model without weights lacks
                raise RecipeError(f"students.{name}: {error}") from error
        elif cosine is not None:
            try:
                config = AutoConfig.from_pretrained(model_named(student.path))
            except (OSError, ValueError):
                continue  # an adapter or a GGUF file
        if cosine is None:
            continue
        width, expected = (text_config(c).hidden_size for c in (config, teacher.config))
        if width != expected:
            raise RecipeError(
                f"students.{name}: the hidden size is {width} and the teacher's is {expected}, but "
                f"the cosine loss of the method {cosine} compares their hidden states. Leave "
                "cosine out, or give a student of the teacher's width"
            )


def _pruned(
    name: str,
    student: FromTeacher,
    recipe: CompareRecipe,
    corpus: PackedCorpus,
    teacher: TransformersTeacher,
    tokenizer: object,
    corruption: Corruption | None,
) -> Path:
    """Create a student by pruning the teacher, unless the student exists; return the folder."""
    inputs = {
        "student": student.model_dump(mode="json", exclude={"quantize"}),
        "teacher": teacher.identity["weights"],
        "text": corpus.source_fingerprint,
        "window": recipe.window,
    }
    if corruption is not None:
        inputs["objective"] = corruption.objective.to_json()
    folder = _folder(name, recipe, inputs)
    if (folder / "config.json").exists():
        return folder
    model = load_language_model(recipe.teacher, dtype=recipe.teacher_dtype)
    chosen = spread(corpus.windows, student.calibration_windows)
    text = TextDataset(corpus, holdout=False, corruption=corruption)
    shrunk = shrink(
        model,
        layers=student.layers,
        drop_layers=student.drop_layers,
        channels=student.intermediate_size,
        heads=student.heads,
        hidden=student.hidden_size,
        windows=joined_texts([text[i] for i in chosen]),
        layer_score=student.layer_score,
    )
    save(shrunk, folder, tokenizer, teacher=Path(recipe.teacher).name)
    return folder


def _with_sizes(
    name: str, student: Student, recipe: CompareRecipe, teacher: TransformersTeacher
) -> Path:
    """Write the teacher's configuration with a new student's sizes; return the folder.

    An existing configuration is not written again. Unless the student's settings have an
    `intermediate_size`, the ratio of intermediate size to hidden size is that of the teacher, up to
    rounding.
    """
    inputs = {
        "student": student.model_dump(mode="json", exclude={"quantize"}),
        "teacher": teacher.identity["weights"],
    }
    folder = _folder(name, recipe, inputs)
    if (folder / "config.json").exists():
        return folder
    layers, width, heads = student.layers, student.hidden_size, student.heads
    if student.size is not None:
        layers, width, heads = SIZES[student.size]
    model: Any = teacher.model
    config = copy.deepcopy(model.config)
    mlp = "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"  # DistilBERT's
    sizes = {
        mlp: student.intermediate_size or round(getattr(config, mlp) / config.hidden_size * width),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": student.kv_heads,
        "tie_word_embeddings": student.tied,
    }
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, key, type(value)(value[i % len(value)] for i in range(layers)))
    config.num_hidden_layers = layers
    for key, value in sizes.items():
        if hasattr(config, key):
            setattr(config, key, value if value is not None else heads)
        elif value is not None:
            raise RecipeError(
                f"students.{name}: {key} is {value}, but the configuration of the teacher's class "
                f"{type(model).__name__} has no {key}; leave it out, or give config: a config.json"
            )
    write_whole(folder / "config.json", config.to_json_string())
    return folder


def _folder(name: str, recipe: CompareRecipe, inputs: dict[str, Any]) -> Path:
    """Return the folder of a student, named after the student and a fingerprint of `inputs`."""
    return recipe.out / "students" / f"{slug(name)}-{fingerprint(inputs)[:8]}"
