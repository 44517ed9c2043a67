"""Define, read and validate recipes: YAML files with all settings of a training run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparselogits.allowances import ALLOWANCES
from sparselogits.data import CacheDataset, DraftVocabulary, Schedule, Stage
from sparselogits.errors import InvalidArgumentError, RecipeError
from sparselogits.files import require_local, with_home
from sparselogits.losses import MissingMass
from sparselogits.methods import (
    BATCH_WINDOWS,
    METHODS,
    METHODS_IN_WORDS,
    ONLINE,
    find_method,
    listed,
    require_fits,
)
from sparselogits.quantization import FORMATS, Quantization, QuantizationFormat
from sparselogits.safe_yaml import read_mapping
from sparselogits.untrusted import printable, shown

_Model = TypeVar("_Model", bound=BaseModel)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LocalPath = Annotated[Path, AfterValidator(require_local)]
MethodName = Annotated[str, AfterValidator(lambda name: find_method(name).name)]

# the rate for random weights would destroy what a pretrained student has learned
RATES = {"new": 1e-3, "pretrained": 5e-5, "lora": 2e-4}
"""Default peak learning rate of AdamW for each kind of student."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (4, 128, 4),
    "3m": (4, 256, 4),
    "10m": (8, 320, 5),
    "30m": (10, 512, 8),
    "100m": (12, 832, 13),
    "300m": (19, 1152, 18),
    "1b": (24, 1856, 29),
}
"""Number of layers, hidden size and number of attention heads of new students, by size name.

All names except "tiny" state the approximate number of parameters without embeddings.
"""

HOW_TO_NAME_A_STUDENT = f"""\
specify the student to train in one of these ways:
  --student MODEL               an existing model: a folder, a hub name, `demo`
  --student MODEL --lora 16     an adapter of rank 16 for a model whose weights stay frozen
  --student-config 30m          a new model of a named size: {", ".join(SIZES)}
  --student-config layers=12,width=768
                                a new model of the given dimensions
  --student-config config.json  a new model of any architecture, from a configuration file
In a recipe: `student: {{path: MODEL}}` or `student: {{size: 30m}}`. `sparselogits shrink` makes a \
student from the teacher, and `sparselogits train --print-recipe` shows every setting."""


class Lora(_Strict):
    """Settings of a low-rank adapter (LoRA) that is trained instead of the student's weights."""

    rank: Count = Field(16, description="rank of the adapter matrices")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="numerator of the adapter's scale alpha / rank; twice the rank when absent",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout probability before the adapter"
    )
    targets: str | list[str] = Field(
        "all-linear", description="modules that get an adapter: all-linear, or a list of names"
    )


class Quantize(_Strict):
    """Settings of quantisation-aware training and of the format of the saved weights."""

    library: Literal["torchao"] = Field("torchao", description="quantisation library")
    config: QuantizationFormat = Field(description=f"format of the weights: {', '.join(FORMATS)}")
    group_size: Count | None = Field(
        32,
        description="number of weights that share a scale; null for one scale per output channel",
    )

    def settings(self) -> Quantization:
        """Convert these settings to a `Quantization`."""
        return Quantization(self.config, self.group_size)


class Student(_Strict):
    """Settings of a student: an existing model, or a new model with random weights."""

    path: str | None = Field(None, description="existing model: a folder, a hub name, or `demo`")
    lora: Lora | None = Field(
        None, description="train an adapter of the existing model (see student.lora)"
    )
    quantize: Quantize | None = Field(
        None,
        description="train with simulated quantisation and save quantised weights (see "
        "student.quantize)",
    )
    config: str | None = Field(
        None,
        description="configuration of a new model of any architecture: config.json, or a folder "
        "with one",
    )
    size: str | None = Field(
        None, description=f"size of a new Llama-like model: {', '.join(SIZES)}"
    )
    hidden_size: Count = Field(
        128, description="hidden size D of a new model, if its dimensions are given instead of size"
    )
    layers: Count = Field(4, description="number of transformer blocks of a new model")
    heads: Count = Field(
        4, description="number of attention heads of a new model; must divide hidden_size"
    )
    kv_heads: Count | None = Field(
        None, description="number of key-value heads of a new model; as many as heads when absent"
    )
    intermediate_size: Count | None = Field(
        None, description="hidden size of the MLP of a new model; 8/3 D when absent"
    )
    tied: bool = Field(
        True, description="whether embedding and head of a new model share their weights"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Student:
        shape = {"hidden_size", "layers", "heads", "kv_heads", "intermediate_size"}
        ways = [name for name in ("path", "config", "size") if getattr(self, name) is not None]
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = shape & self.model_fields_set
        numbers = sorted(name for name in given if getattr(self, name) != defaults[name])
        if len(ways) > 1 or (ways and numbers):
            found = " and ".join([*ways, *numbers])
            raise ValueError(f"give one of path, config, size, or dimensions (found {found})")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {shown(self.size)}; available: {', '.join(SIZES)}")
        if self.lora is not None and self.path is None:
            raise ValueError("lora needs an existing model: give path, or leave lora out")
        if self.lora is not None and self.quantize is not None:
            raise ValueError("lora and quantize cannot be combined: give one of them")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide hidden_size={self.hidden_size}; give a divisor"
            )
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads} does not divide heads={self.heads}; give a divisor"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unset fields that the first version lacked, so that fingerprints do not change."""
        values: dict[str, Any] = handler(self)
        for name in ("lora", "quantize", "config", "size"):
            if values.get(name) is None:
                values.pop(name, None)
        return values

    @property
    def is_new(self) -> bool:
        """Whether the student is a new model with random weights."""
        return self.path is None


def student_of(config: str) -> dict[str, Any]:
    """Parse the value of `--student-config` into the fields of a student.

    Args:
        config: name of a size, numbers such as `layers=12,width=768`, or path of a config.json or
            of a folder with one.

    Raises:
        RecipeError: If a name is unknown or a number is not an integer.
    """
    if config in SIZES:
        return {"size": config}
    if "=" not in config:
        return {"config": config}
    values: dict[str, Any] = {}
    for part in config.split(","):
        key, _, value = part.partition("=")
        name = _SHORT.get(key.strip(), key.strip())
        if name not in _SHORT.values():
            near = difflib.get_close_matches(name, [*_SHORT, *_SHORT.values()], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_SHORT)}"
            raise RecipeError(f"--student-config {shown(config)}: unknown {shown(name)}; {hint}")
        if name == "tied":
            values[name] = value.strip().lower()
            continue
        try:
            values[name] = int(value)
        except ValueError as error:
            raise RecipeError(
                f"--student-config {shown(config)}: {name} must be an integer, found {shown(value)}"
            ) from error
    width = values.get("hidden_size")
    if width is not None and "heads" not in values:
        values["heads"] = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    return values


_SHORT = {
    "layers": "layers",
    "width": "hidden_size",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "mlp": "intermediate_size",
    "tied": "tied",
}


class ThinningStage(_Strict):
    """Stage of a thinning schedule, with a constant number of rounds."""

    rounds: Count = Field(
        description="number of rounds used per position, at most the number in the cache"
    )
    until: float | None = Field(
        None,
        description="end of the stage as a share of all steps, in (0, 1]; not needed for the last "
        "stage, which lasts until the end of training",
    )
    until_step: int | None = Field(
        None, description="end of the stage as a number of steps, instead of until"
    )


class Thinning(_Strict):
    """Settings for training on fewer rounds than the cache stores.

    Exactly one of `rounds`, `budget` and `schedule` is given.
    """

    rounds: Count | None = Field(
        None, description="number of rounds used per position, at most the number in the cache"
    )
    budget: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="mean entries per position; converted to rounds on a sample of the cached "
        "windows",
    )
    schedule: tuple[ThinningStage, ...] | None = Field(
        None, description="rounds as a function of the step: a list of stages with rounds and until"
    )
    fresh_noise: bool = Field(True, description="whether to use different rounds in each epoch")

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
        """Return the thinning schedule for the Trainer.

        Args:
            rounds: rounds per position, derived from the field `rounds` or `budget`; ignored with
                `schedule`.
        """
        if self.schedule is None:
            return Schedule.constant(rounds, fresh_noise=self.fresh_noise)
        stages = tuple(Stage(s.rounds, s.until, s.until_step) for s in self.schedule)
        return Schedule(stages, self.fresh_noise)


RENAMED = {
    "epochs": "num_train_epochs",
    "batch_windows": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "precision": "bf16",
    "log_steps": "logging_steps",
}
"""Fields of TrainingArguments, by the key of the setting in recipes of earlier versions."""


class TrainingSettings(_Strict):
    """Training settings of a recipe, named like fields of TrainingArguments.

    The other fields of transformers' TrainingArguments are accepted too, except the fields in
    `set_elsewhere`. Values that `SparseKDTrainer` does not support are rejected by `run`.
    """

    model_config = ConfigDict(extra="allow")

    set_elsewhere: ClassVar[Mapping[str, str]] = {"output_dir": "out"}
    """Recipe keys, by the field of TrainingArguments that they set."""

    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="number of passes over the cache"
    )
    per_device_train_batch_size: Count = Field(
        BATCH_WINDOWS, description="number of windows per batch and device"
    )
    gradient_accumulation_steps: Count = Field(
        1, description="number of batches per optimiser step"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description=f"peak learning rate of AdamW; {RATES['new']:g} for a new student, "
        f"{RATES['pretrained']:g} for an existing one, {RATES['lora']:g} for an adapter",
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="number of steps over which the learning rate rises; below 1, a share of all "
        "steps. `warmup_ratio`, its name for a share before transformers 5, is accepted too",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="weight decay of AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="largest norm of the gradients, to which larger norms are clipped"
    )
    bf16: bool = Field(
        False, description="compute in bfloat16 instead of float32; weights stay in float32"
    )
    logging_steps: Count = Field(10, description="number of steps between log lines")
    save_steps: Count | None = Field(
        None,
        description="number of steps between checkpoints, from which an interrupted run resumes; "
        "no checkpoints when absent",
    )

    @model_validator(mode="before")
    @classmethod
    def _validate_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values, wrong = dict(values), {}
        if "warmup_ratio" in values:
            ratio = values.pop("warmup_ratio")
            if "warmup_steps" in values:
                wrong["warmup_ratio"] = "give warmup_steps or warmup_ratio, not both"
            elif not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                wrong["warmup_ratio"] = f"must be a share in [0, 1), found {shown(ratio)}"
            values["warmup_steps"] = ratio
        for name in values:
            if (why := cls._why_unknown(name)) is not None:
                wrong[str(name)] = why
        if wrong:
            said = "; ".join(f"{name}: {why}" for name, why in wrong.items())
            raise PydanticCustomError("wrong_keys", "{said}", {"said": said, "keys": wrong})
        return values

    @classmethod
    def _why_unknown(cls, name: Any) -> str | None:
        """Return why a key is invalid and what to do; None for a valid key."""
        if name in cls.model_fields:
            return None
        if name in cls.set_elsewhere:
            return f"set by the recipe's key {cls.set_elsewhere[name]!r}; use that key"
        if name in RENAMED:
            new = RENAMED[name]
            return f"renamed; use {new!r} ({cls.model_fields[new].description})"
        if name == "trainer":
            return (
                "fields of TrainingArguments are keys of the recipe itself; move them out of "
                "`trainer`"
            )
        arguments = training_argument_names()
        if name in arguments:
            return None
        known = list(cls.model_fields)
        near = difflib.get_close_matches(str(name), [*known, *RENAMED, *arguments], 1, cutoff=0.5)
        if near:
            return f"unknown key; did you mean {RENAMED.get(near[0], near[0])!r}?"
        return (
            f"unknown key; known: {', '.join(known)}, and the fields of transformers' "
            "TrainingArguments"
        )

    @property
    def training_arguments(self) -> dict[str, Any]:
        """Training settings, given or default, by field of TrainingArguments."""
        given = {name: getattr(self, name) for name in TrainingSettings.model_fields}
        return given | (self.model_extra or {})


@cache
def training_argument_names() -> tuple[str, ...]:
    """Return the names of the arguments that the installed TrainingArguments accepts."""
    from transformers import TrainingArguments

    return tuple(field.name for field in dataclasses.fields(TrainingArguments) if field.init)


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings from a recipe.json of this or an earlier version to the current keys."""
    new = {RENAMED.get(name, name): value for name, value in values.items() if name != "trainer"}
    if "precision" in values:
        new["bf16"] = values["precision"] == "bfloat16"
    return {**new, **values.get("trainer", {})}


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert training settings to the keys and values of the first version, for fingerprints."""
    old_names = {new: old for old, new in RENAMED.items()}
    old = {old_names.get(name, name): value for name, value in values.items()}
    if "precision" in old:
        old["precision"] = "bfloat16" if old["precision"] else "float32"
    return old


def _caches(value: Any) -> Any:
    """Return a value that is the folder or URL of a cache, or a list of these; reject others."""
    caches = value if isinstance(value, list) else [value]
    if not caches or not all(isinstance(cache, str | Path) for cache in caches):
        raise ValueError("give the folder or URL of a cache, or a list of folders and URLs")
    return value


def _weights(value: Any) -> Any:
    """Validate the type of the teachers' mixture weights (`CacheDataset` validates the numbers)."""
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for row in rows if value not in (None, "best") else ():
        if not isinstance(row, list) or any(type(x) not in (int, float) for x in row):
            raise ValueError("give a list of numbers, a list of lists of numbers, or best")
    return value


class Recipe(TrainingSettings):
    """Settings of a training run, as `load_recipe` reads them from a YAML file.

    Other fields of transformers' TrainingArguments are accepted too, except `output_dir`, which
    `out` replaces.

    Raises:
        pydantic.ValidationError: a setting is unknown, missing or invalid; `load_recipe` and
            `parse_recipe` raise RecipeError instead.

    Examples:
        >>> recipe = Recipe(cache="my-cache", out="my-run", student={"size": "tiny"})
        >>> recipe.method, recipe.num_train_epochs, recipe.peak_learning_rate
        ('sparse', 1.0, 0.001)
    """

    cache: Annotated[Path | str | list[Path | str], PlainValidator(_caches)] = Field(
        description="folder or URL of the cache; a list mixes the caches of several teachers"
    )
    weights: Annotated[
        Literal["best"] | list[float] | list[list[float]] | None, PlainValidator(_weights)
    ] = Field(
        None,
        description="weights of the teachers if several caches are mixed: a list with a number "
        "per cache, in the order of the caches and with the sum 1; several such lists, one per "
        "text that was packed into the caches (`sparselogits cache --append`), in that order; or "
        "best, which selects in each window the teacher with the lowest loss. Equal weights when "
        "absent",
    )
    out: LocalPath = Field(description="folder of the run: model, metrics, logs, checkpoints")
    student: Student = Field(
        description="model to train: an existing one, or a new one with random weights"
    )
    method: MethodName = Field("sparse", description=f"loss; {METHODS_IN_WORDS}")
    teacher: str | None = Field(
        None,
        description=f"the cache's teacher, for {listed(ONLINE)}: a model folder, GGUF file or hub "
        "name",
    )
    teacher_dtype: DtypeName = Field(
        "auto", description="number format of the teacher; auto: the format in which it is stored"
    )
    alpha: Fraction = Field(0.0, description="share of the labels' cross-entropy in the loss")
    beta: float | None = Field(
        None,
        description="share of the teacher in the mixture of jensen_shannon, in (0, 1); "
        f"{METHODS['jensen_shannon'].beta} when absent",
    )
    cosine: float = Field(
        0.0,
        ge=0,
        description="weight of the cosine loss between the last hidden states of student and "
        f"teacher, for {listed(ONLINE)}",
    )
    missing_mass: MissingMass = Field(
        "drop",
        description="rule for the probability mass that biased targets (Top-K, Top-P) lack: drop, "
        "renormalise, smooth, ghost or ground_truth",
    )
    thinning: Thinning | None = Field(
        None, description="train on fewer rounds than the cache stores (see thinning)"
    )
    save_dtype: DtypeName = Field(
        "auto",
        description="number format of the saved student; auto: the format of the existing model, "
        "float32 for a new one",
    )
    draft_vocabulary: Path | None = Field(
        None,
        description="ids that a draft model for speculative decoding predicts, as written by "
        "`sparselogits draft-vocabulary`: the student gets a head for these ids and one more "
        "output, for all other ids",
    )
    tokenizer: str | None = Field(
        None,
        description="tokenizer to save with the student; when absent, the first that exists of "
        "the student's, the cache's and the teacher's",
    )
    seed: int = Field(0, ge=0, description="random seed for initial weights and data order")
    report_to: list[str] = Field(
        default_factory=list,
        description="experiment trackers, for example [tensorboard]; logs are in OUT/logs",
    )
    allow: list[str] = Field(
        default_factory=list,
        description="checks whose failure is a warning instead of an error: "
        f"{', '.join(ALLOWANCES)}",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_a_student(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("student", "") in ({}, None):
            return {name: value for name, value in values.items() if name != "student"}
        return values

    @model_validator(mode="after")
    def _teacher_fits_method(self) -> Recipe:
        method = METHODS[self.method]
        given = self.teacher is not None
        require_fits(method, teacher=given, beta=self.beta, cosine=self.cosine)
        return self

    @model_validator(mode="after")
    def _mixture_fits(self) -> Recipe:
        if self.weights is not None and len(self.caches) == 1:
            raise ValueError(
                "weights need several caches, found one: give a list of caches, or leave weights "
                "out"
            )
        if METHODS[self.method].online and len(self.caches) > 1:
            raise ValueError(
                f"{self.method} runs one teacher online, and {len(self.caches)} caches are given; "
                "give one cache, or use the method sparse or ce"
            )
        return self

    @model_validator(mode="after")
    def _fits_a_draft_vocabulary(self) -> Recipe:
        reasons = {
            f"the method {self.method}": METHODS[self.method].online,
            "student.lora": self.student.lora is not None,
            "student.quantize": self.student.quantize is not None,
        }
        found = next((name for name, given in reasons.items() if given), None)
        if self.draft_vocabulary is not None and found is not None:
            raise ValueError(
                f"draft_vocabulary cannot be combined with {found}: the student gets a new head, "
                "which is trained on cached targets in full precision; leave one of them out"
            )
        return self

    @property
    def caches(self) -> list[Path | str]:
        """Folders or URLs of all caches."""
        return self.cache if isinstance(self.cache, list) else [self.cache]

    def dataset(self) -> CacheDataset:
        """Open the caches as one dataset, with the recipe's weights and draft vocabulary."""
        named = self.draft_vocabulary
        draft = None if named is None else DraftVocabulary.load(named)
        return CacheDataset(self.caches, weights=self.weights, draft=draft, seed=self.seed)

    @property
    def peak_learning_rate(self) -> float:
        """Peak learning rate of AdamW; if not set, the default for the kind of student."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.student.is_new:
            return RATES["new"]
        return RATES["pretrained" if self.student.lora is None else "lora"]


def load_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        overrides: values that replace those of the file, by key; None leaves the file's value.

    Raises:
        RecipeError: If the recipe cannot be read or is invalid; the message lists the wrong keys.
    """
    return parse_recipe(read_yaml(path, overrides), source=str(path))


def read_yaml(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of a recipe without validating them.

    Args:
        path: YAML file.
        overrides: values that replace those of the file, by key; None leaves the file's value.

    Raises:
        RecipeError: If the file cannot be read or is not a mapping.
    """
    values = read_mapping(path, "the recipe")
    return values | {k: v for k, v in overrides.items() if v is not None}


def parse_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """Validate the values of a recipe.

    Args:
        values: settings by key, as read from YAML.
        source: origin of the values, for error messages.

    Raises:
        RecipeError: If the recipe is invalid; the message lists the wrong keys.
    """
    return validated(Recipe, values, _FIELDS, f"{source} is not a valid recipe")


def validated(
    model: type[_Model], values: dict[str, Any], fields: Mapping[str, Sequence[str]], wrong: str
) -> _Model:
    """Create an instance of a pydantic model from values read from YAML.

    Args:
        model: class of the result.
        values: settings by key.
        fields: valid keys of each mapping, by the mapping's own key; "recipe" for the outermost.
        wrong: beginning of the error message.

    Raises:
        RecipeError: If values are invalid; the message lists the invalid keys.
        InvalidArgumentError: If a path begins with the home folder of an unknown user.
    """
    try:
        return model.model_validate(with_home(values))
    except ValidationError as error:
        lines = "\n".join(f"  {_in_words(detail, fields)}" for detail in error.errors())
        raise RecipeError(f"{wrong}:\n{lines}") from error


_FIELDS = {
    "recipe": list(Recipe.model_fields),
    "student": list(Student.model_fields),
    "lora": list(Lora.model_fields),
    "quantize": list(Quantize.model_fields),
    "thinning": list(Thinning.model_fields),
    "schedule": list(ThinningStage.model_fields),
}


def _in_words(detail: Any, fields: Mapping[str, Sequence[str]]) -> str:
    """Return the lines of an error message for an element of `ValidationError.errors()`."""
    path = [str(part) for part in detail["loc"]]
    # "(...)" is the alternative of a union that pydantic chose, not a key
    name = ".".join(part for part in path if not part.startswith("("))
    if detail["type"] == "extra_forbidden":
        owner = [part for part in path[:-1] if part in fields]
        known = fields[owner[-1] if owner else "recipe"]
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        return f"{printable(name, 80)}: unknown key{hint}"
    if detail["type"] == "wrong_keys":
        wrong = detail["ctx"]["keys"].items()
        within = f"{name}." if name else ""
        return "\n  ".join(f"{printable(within + key, 80)}: {why}" for key, why in wrong)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        if name == "student":
            return f"student: missing; {HOW_TO_NAME_A_STUDENT}"
        return f"{name}: missing; add this key"
    return f"{name or 'recipe'}: {message}" + (
        f" (found {shown(detail['input'])})"
        if name and not isinstance(detail["input"], dict)
        else ""
    )
