"""A recipe: everything a training run depends on, in one YAML file.

Unknown keys are refused with the nearest valid name, values out of range with what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparselogits.data import Schedule, Stage
from sparselogits.errors import InvalidArgumentError, RecipeError
from sparselogits.losses import MissingMass
from sparselogits.train.objective import DIVERGENCES, Method

_Model = TypeVar("_Model", bound=BaseModel)
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Student(_Strict):
    """A student: an existing model to go on from, or a new one of a Llama-like shape."""

    path: str | None = Field(None, description="local folder or hub name of a model to train on")
    hidden_size: Count = Field(128, description="width D")
    layers: Count = Field(4, description="transformer blocks")
    heads: Count = Field(4, description="attention heads; divides hidden_size")
    kv_heads: Count | None = Field(None, description="key-value heads; heads when absent")
    intermediate_size: Count | None = Field(None, description="MLP width; 8/3 D when absent")
    tied: bool = Field(True, description="share embedding and head")

    @model_validator(mode="after")
    def _heads_divide(self) -> Student:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        return self


class ThinningStage(_Strict):
    """A stretch of training with one number of rounds."""

    rounds: Count = Field(description="rounds to keep a position, at most the cache's")
    until: float | None = Field(None, description="share of the steps at which it ends, (0, 1]")
    until_step: int | None = Field(None, description="the step at which it ends, instead")


class Thinning(_Strict):
    """Use fewer of the cached rounds: `rounds`, `budget` or `schedule`, one of them."""

    rounds: Count | None = Field(None, description="rounds to keep, at most the cache's")
    budget: Annotated[float, Field(ge=1)] | None = Field(
        None, description="mean entries a position, turned into rounds on some cached windows"
    )
    schedule: tuple[ThinningStage, ...] | None = Field(
        None, description="rounds as a function of the step: a list of rounds with until"
    )
    fresh_noise: bool = Field(True, description="keep other rounds in each epoch")

    @model_validator(mode="after")
    def _one_of_three(self) -> Thinning:
        given = [n for n in ("rounds", "budget", "schedule") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give one of rounds, budget and schedule (found {found})")
        try:
            self.resolved(rounds=self.rounds or 1)
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from error
        return self

    def resolved(self, rounds: int) -> Schedule:
        """As the Trainer takes it.

        Args:
            rounds: what `rounds` or `budget` come to.
        """
        if self.schedule is None:
            return Schedule.constant(rounds, fresh_noise=self.fresh_noise)
        stages = tuple(Stage(s.rounds, s.until, s.until_step) for s in self.schedule)
        return Schedule(stages, self.fresh_noise)


class Recipe(_Strict):
    """One training run."""

    cache: Path | str = Field(description="directory or URL of the cache")
    out: Path = Field(description="directory of the run: model, metrics, checkpoints")
    method: Method = Field(
        "sparse", description="sparse, ce (no teacher), full or reverse_kl (teacher online)"
    )
    student: Student = Student()
    teacher: str | None = Field(
        None, description="for full and reverse_kl: folder, GGUF or hub name"
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    alpha: Share = Field(0.0, description="share of the labels' cross-entropy in the loss")
    missing_mass: MissingMass = Field("drop", description="for biased targets (Top-K, Top-P)")
    thinning: Thinning | None = None
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_windows: Count = Field(8, description="windows a step and device")
    accumulate: Count = Field(1, description="batches an optimiser step")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Share = Field(0.05, description="share of the steps with a rising learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0, description="of the student's initial weights and of the order")
    save_steps: Count | None = Field(None, description="steps between checkpoints")
    log_steps: Count = Field(10, description="steps between log lines")
    report_to: list[str] = Field(default_factory=list, description="e.g. [tensorboard]")

    @model_validator(mode="after")
    def _teacher_fits_method(self) -> Recipe:
        if (self.method in DIVERGENCES) != (self.teacher is not None):
            raise ValueError("give a teacher with method: full or reverse_kl, and only with them")
        return self


def load_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: values that win over the file's; None stands for "as in the file".

    Raises:
        RecipeError: naming the file, the key, what is wrong and, for an unknown key, the nearest
            valid one.
    """
    return parse_recipe(read_yaml(path, overrides), source=str(path))


def read_yaml(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values.

    Args:
        path: YAML file.
        overrides: values that win over the file's; None stands for "as in the file".

    Raises:
        RecipeError: when the file cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}; check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"the recipe {path} must be a mapping of keys to values, as in `cache: my-cache`"
        )
    return values | {k: v for k, v in overrides.items() if v is not None}


def parse_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """A validated recipe from plain values; `source` names them in messages.

    Raises:
        RecipeError: see `load_recipe`.
    """
    return validated(Recipe, values, _FIELDS, f"{source} is not a valid recipe")


def validated(
    model: type[_Model], values: dict[str, Any], fields: Mapping[str, Sequence[str]], wrong: str
) -> _Model:
    """Plain values as a model.

    Args:
        model: what they should be.
        values: as read.
        fields: known keys, by the key they stand under; "recipe" for the outermost.
        wrong: how the message begins where they are not.

    Raises:
        RecipeError: a line for each key that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {_in_words(detail, fields)}" for detail in error.errors())
        raise RecipeError(f"{wrong}:\n{lines}") from error


_FIELDS = {
    "recipe": list(Recipe.model_fields),
    "student": list(Student.model_fields),
    "thinning": list(Thinning.model_fields),
    "schedule": list(ThinningStage.model_fields),
}


def _in_words(detail: Any, fields: Mapping[str, Sequence[str]]) -> str:
    """What pydantic found wrong with one value of a recipe, as a person would say it.

    Args:
        detail: one of `ValidationError.errors()`.
        fields: known keys, by the key they stand under; "recipe" for the outermost.
    """
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        owner = [part for part in path[:-1] if part in fields]
        known = fields[owner[-1] if owner else "recipe"]
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        return f"{name}: unknown key{hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{name}: missing"
    return f"{name or 'recipe'}: {message}" + (
        f" (found {detail['input']!r})" if name and not isinstance(detail["input"], dict) else ""
    )
