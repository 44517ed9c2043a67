"""Define, read and validate the recipes of comparisons.

A recipe contains the common settings and the methods to compare. A method is a name (a training
method, or `none`) or a mapping with options of `sparselogits cache` and `sparselogits train`. A
mapping with a list defines one method per value; two lists define one per pair of values. Keys that
are not fields of a method are fields of its sampler. For example:

    methods:
      - ce
      - full
      - {sampler: topk, k: [5, 12], missing_mass: [drop, ghost]}
      - {sampler: multinomial, budget: [2.4, 5, 12]}
      - {sampler: systematic, budget: 12, alpha: 0.1}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.tasks import LIMIT
from sparselogits.losses import MissingMass, require_rule_for
from sparselogits.methods import METHODS, METHODS_IN_WORDS, ONLINE, listed, require_fits
from sparselogits.objectives import MASK_RATE, MASK_SPAN
from sparselogits.samplers import SamplerChoice, TopK, choose
from sparselogits.train.recipe import (
    Count,
    DtypeName,
    Fraction,
    LocalPath,
    Quantize,
    Student,
    Thinning,
    TrainingSettings,
    read_yaml,
    validated,
)

AnySampler = Annotated[InstanceOf[SamplerChoice], PlainSerializer(SamplerChoice.parameters)]
Positive = Annotated[float, Field(gt=0)]

UNTRAINED = "none"
"""Name of the method that measures the student before training."""


def _method_name(name: str) -> str:
    if name != UNTRAINED and name not in METHODS:
        raise ValueError(f"unknown method; available: {', '.join([*METHODS, UNTRAINED])}")
    return name


LABELS_ONLY = TopK(1)
"""Sampler of the cache from which methods without cached targets read the text."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSpec(_Strict):
    """Method of a comparison: the targets, and how they are used in training."""

    name: str | None = Field(
        None, description="name in tables; derived from the other fields when absent"
    )
    method: Annotated[str, AfterValidator(_method_name)] = Field(
        "sparse", description=f"{METHODS_IN_WORDS}; {UNTRAINED}: the student before training"
    )
    sampler: AnySampler | None = Field(
        None, description="name of the sampler of sparse targets; its fields are keys of the method"
    )
    budget: float | None = Field(
        None, description="mean entries per position, to which the sampler is fitted"
    )
    missing_mass: MissingMass = Field(
        "drop", description="rule for the probability mass that biased targets lack"
    )
    alpha: Fraction = Field(0.0, description="share of the labels' cross-entropy in the loss")
    beta: float | None = Field(
        None,
        description="share of the teacher in the mixture of jensen_shannon, in (0, 1); "
        f"{METHODS['jensen_shannon'].beta:g} when absent",
    )
    cosine: float = Field(
        0.0,
        ge=0,
        description="weight of the cosine loss between the last hidden states of student and "
        f"teacher, for {listed(ONLINE)}",
    )
    learning_rate: Positive | None = Field(
        None, description="learning rate of this method; training.learning_rate when absent"
    )
    thinning: Thinning | None = Field(
        None, description="train on fewer rounds than the cache stores"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_sampler(cls, values: Any) -> Any:
        """Create the sampler from the keys that are not fields of a method."""
        if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
            return values
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        of_sampler = {name: value for name, value in values.items() if name not in fields}
        try:
            sampler = choose(fields["sampler"], of_sampler, known=cls.model_fields)
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from error
        return fields | {"sampler": sampler}

    @model_serializer(mode="wrap")
    def _as_in_a_recipe(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the method with the sampler's fields as keys of the method."""
        values: dict[str, Any] = handler(self)
        if self.sampler is None:
            return values
        return values | {"sampler": self.sampler.kind.name} | dict(self.sampler.given)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> MethodSpec:
        if self.method != "sparse":
            unused = [name for name in ("sampler", "budget", "thinning") if getattr(self, name)]
            unused += ["missing_mass"] if self.missing_mass != "drop" else []
            if self.method == UNTRAINED:
                names = ("alpha", "beta", "cosine", "learning_rate")
                unused += [name for name in names if getattr(self, name)]
            else:
                require_fits(
                    METHODS[self.method], teacher=self.online, beta=self.beta, cosine=self.cosine
                )
            if unused:
                raise ValueError(
                    f"method: {self.method} does not use {', '.join(unused)}; leave it out"
                )
            return self
        if self.sampler is None:
            others = [name for name in [*METHODS, UNTRAINED] if name != "sparse"]
            raise ValueError(f"found no sampler; give one, or method: {listed(others, 'or')}")
        try:
            _require_sampler(self, self.sampler)
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def online(self) -> bool:
        """Whether the teacher runs in every training step."""
        return self.method != UNTRAINED and METHODS[self.method].online

    @property
    def title(self) -> str:
        """Name of the method in tables."""
        if self.name is not None:
            return self.name
        if self.sampler is not None:
            title = self.sampler.title(self.budget)
        else:
            title = METHODS[self.method].title if self.method in METHODS else "before training"
        if self.missing_mass != "drop":
            title += f", {self.missing_mass.replace('_', ' ')}"
        if self.thinning is not None:
            title += f", {_thinning_title(self.thinning)}"
        title += f", alpha {self.alpha:g}" if self.alpha else ""
        title += f", beta {self.beta:g}" if self.beta is not None else ""
        title += f", cosine {self.cosine:g}" if self.cosine else ""
        return title + (f", learning rate {self.learning_rate:g}" if self.learning_rate else "")


class FromTeacher(_Strict):
    """Student that is created from the teacher's weights by pruning or quantisation.

    The sizes are those after pruning, as in `sparselogits shrink`; an absent size is the teacher's,
    except that `drop_layers` determines the number of blocks.
    """

    origin: Literal["teacher"] = Field(alias="from", description="always `teacher`")
    layers: Count | None = Field(None, description="number of transformer blocks")
    drop_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="indices of the blocks to remove, instead of layers"
    )
    intermediate_size: Count | None = Field(None, description="number of MLP channels per block")
    heads: Count | None = Field(None, description="number of attention heads per block")
    hidden_size: Count | None = Field(None, description="hidden size")
    layer_score: Literal["influence", "loss", "spaced"] = Field(
        "influence",
        description="rule that selects blocks: influence, loss, or spaced (evenly from the first "
        "to the last)",
    )
    calibration_windows: Count = Field(
        32,
        description="largest number of training windows on which blocks, channels and heads are "
        "ranked",
    )
    quantize: Quantize | None = Field(
        None, description="quantisation of the weights (see student.quantize of a training recipe)"
    )

    @model_validator(mode="after")
    def _differs_from_the_teacher(self) -> FromTeacher:
        if not self.pruned and self.quantize is None:
            raise ValueError(
                "a student from the teacher needs a size or a quantisation; give layers, "
                "drop_layers, intermediate_size, heads, hidden_size or quantize"
            )
        return self

    @property
    def pruned(self) -> bool:
        """Whether the student is pruned, that is, whether a size or `drop_layers` is given."""
        sizes = (self.layers, self.drop_layers, self.intermediate_size, self.heads)
        return any((*sizes, self.hidden_size))


_STUDENT, _FROM_TEACHER = "(student)", "(student from the teacher)"
"""Tags for the two kinds of students; pydantic includes the tag in the path of an error."""


def _kind_of_student(value: Any) -> str:
    from_teacher = isinstance(value, FromTeacher) or (isinstance(value, dict) and "from" in value)
    return _FROM_TEACHER if from_teacher else _STUDENT


AnyStudent = Annotated[
    Annotated[Student, Tag(_STUDENT)] | Annotated[FromTeacher, Tag(_FROM_TEACHER)],
    Discriminator(_kind_of_student),
]


class TaskNames(_Strict):
    """Zero-shot tasks on which the students and the teacher are scored."""

    names: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="continuation, last_word, agreement, or tasks of lm-eval"
    )
    limit: Count = Field(LIMIT, description="largest number of samples per task")

    @model_validator(mode="after")
    def _names_differ(self) -> TaskNames:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a task is named twice: {', '.join(self.names)}; give each once")
        return self


class Training(TrainingSettings):
    """Training settings of all students; a method may have another learning rate."""

    set_elsewhere: ClassVar[Mapping[str, str]] = {"output_dir": "out", "seed": "seeds"}

    learning_rate: Positive = 1e-3


class Gradients(_Strict):
    """Settings for comparing the gradients of targets with those of full distillation."""

    windows: Count = Field(
        8, description="largest number of held-out windows; a multiple of the largest batch is used"
    )
    batch_windows: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (1, 4), description="batch sizes in windows; gradients are measured for each"
    )
    draws: Annotated[int, Field(ge=2)] = Field(
        4, description="number of draws of a random target per batch"
    )

    @model_validator(mode="after")
    def _windows_fill_a_batch(self) -> Gradients:
        largest = max(self.batch_windows)
        if largest > self.windows:
            raise ValueError(
                f"{self.windows} windows do not fill a batch of {largest}; give more windows"
            )
        return self


class CompareRecipe(_Strict):
    """All settings of a comparison."""

    title: str = Field("comparison", description="title of the report")
    teacher: str = Field(description="model folder, GGUF file or hub name")
    teacher_dtype: DtypeName = Field(
        "auto", description="number format of the teacher; auto: the format in which it is stored"
    )
    data: str = Field(description="text, JSONL or Parquet file, folder, or dataset")
    text_field: str = Field("text", description="field of a record that contains the text")
    completion_only: bool = Field(
        False, description="train only on the assistant's turns of conversations"
    )
    tokenized_by: str | None = Field(
        None,
        description="tokenizer of data that consists of token ids, a row of which is a window "
        "unless join_rows is set; the data is text when absent",
    )
    join_rows: bool = Field(
        False, description="concatenate rows of token ids and cut them into windows"
    )
    out: LocalPath = Field(description="output directory")
    window: Annotated[int, Field(ge=2)] = Field(256, description="number of tokens per window")
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of the text held out for evaluation"
    )
    heldout_windows: Count | None = Field(
        None, description="largest number of held-out windows for evaluation; all when absent"
    )
    separator_id: int | None = Field(
        None, description="id of the token between documents; the tokenizer's when absent"
    )
    packing: Literal["joined", "documents"] = Field(
        "joined",
        description="how documents become windows: joined (concatenated and cut), or documents "
        "(one padded document per window, as for BERT)",
    )
    cache_batch: Count = Field(8, description="number of windows per forward pass of the teacher")
    draw_seed: Annotated[int, Field(ge=0)] = Field(
        0, description="random seed for sampling, and for masking the text of a masked teacher"
    )
    vary_draws: bool = Field(
        False,
        description="build a separate cache of a random sampler for each seed, sampled with "
        "draw_seed + seed; if false, all seeds share a cache",
    )
    mask_rate: Annotated[float, Field(gt=0, le=1)] | Literal["random"] | None = Field(
        None,
        description="for a masked teacher: share of tokens to predict; or random, for a share per "
        f"window by whose inverse the loss is weighted (masked diffusion). {MASK_RATE} when absent",
    )
    mask_units: Literal["tokens", "words", "spans"] | None = Field(
        None,
        description="for a masked teacher: choose single tokens, whole words or spans of "
        "mask_span tokens; tokens when absent",
    )
    mask_span: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="for mask_units spans: mean length of a span in tokens; "
        f"{MASK_SPAN:g} when absent",
    )
    students: dict[str, AnyStudent] = Field(
        {"student": Student()},
        description="students by name: as in a training recipe, or made from the teacher",
    )
    training: Training = Field(
        Training(), description="training settings, as keys of a training recipe"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), description="random seeds for initial weights and the order of windows"
    )
    tasks: TaskNames | None = Field(None, description="zero-shot tasks; none when absent")
    draft: Annotated[int, Field(ge=0)] = Field(
        0, description="number of tokens per draft of the student; 0 to measure no drafting"
    )
    draft_windows: Count = Field(
        16, description="number of held-out windows in which tokens are drafted"
    )
    gradients: Gradients | None = Field(
        None, description="comparison of gradients with those of full KD; none when absent"
    )
    resamples: Count = Field(
        1000, description="number of bootstrap resamples of the windows, for the intervals"
    )
    methods: tuple[MethodSpec, ...] = Field(
        min_length=1, description="methods, in the order in which they are trained"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CompareRecipe:
        titles = [method.title for method in self.methods]
        for what, names in (("methods", titles), ("seeds", list(self.seeds))):
            twice = sorted({str(n) for n in names if list(names).count(n) > 1})
            if twice:
                raise ValueError(f"{what} occur twice: {', '.join(twice)}; give each once")
        if not self.seeds or not self.students:
            raise ValueError(
                f"found {len(self.seeds)} seeds and {len(self.students)} students; give at least "
                "one of each"
            )
        if self.mask_span is not None and self.mask_units != "spans":
            raise ValueError(
                f"mask_span={self.mask_span:g} needs mask_units: spans, found "
                f"{self.mask_units or 'tokens'}; give mask_units: spans, or leave mask_span out"
            )
        return self

    @property
    def masking(self) -> dict[str, Any]:
        """Settings of the masked objective that are given in the recipe, by key."""
        names = ("mask_rate", "mask_units", "mask_span")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def load_compare_recipe(path: Path, **overrides: Any) -> CompareRecipe:
    """Read and validate the recipe of a comparison.

    Paths in the recipe are relative to the current directory.

    Args:
        path: YAML file.
        overrides: values that replace those of the file, by key; None leaves the file's value.

    Raises:
        RecipeError: If the recipe cannot be read or is invalid.
    """
    return parse_compare_recipe(read_yaml(path, overrides), source=str(path))


def parse_compare_recipe(values: dict[str, Any], *, source: str) -> CompareRecipe:
    """Create a recipe from values, and validate them.

    Args:
        values: settings by key, as read from YAML.
        source: origin of the values, for error messages.

    Raises:
        RecipeError: If the recipe is invalid; the message lists what is wrong.
    """
    methods = values.get("methods")
    if isinstance(methods, list):
        values = {**values, "methods": [each for method in methods for each in expanded(method)]}
    return validated(CompareRecipe, values, _FIELDS, f"{source} is not a valid comparison")


def expanded(method: Any) -> list[Any]:
    """Return the methods that an item of `methods` defines, one per combination of list items."""
    if isinstance(method, str):
        return [{"method": method}]
    if not isinstance(method, dict):
        return [method]
    lists = {key: value for key, value in method.items() if isinstance(value, list)}
    return [
        {**method, **dict(zip(lists, values, strict=True))}
        for values in itertools.product(*lists.values())
    ]


_FIELDS = {
    "recipe": list(CompareRecipe.model_fields),
    "tasks": list(TaskNames.model_fields),
    "methods": list(MethodSpec.model_fields),
    "students": list(Student.model_fields),
    _FROM_TEACHER: list(FromTeacher.model_fields),
    "quantize": list(Quantize.model_fields),
    "training": list(Training.model_fields),
    "gradients": list(Gradients.model_fields),
    "thinning": list(Thinning.model_fields),
}


def slug(text: str) -> str:
    """Convert a name to lower-case ASCII letters, digits, dots and hyphens, for file names."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _require_sampler(spec: MethodSpec, choice: SamplerChoice) -> None:
    """Check that a method's sampler fits the method's budget, missing-mass rule and thinning."""
    kind, sampler = choice.kind, choice.sampler()
    sampler.left_open(spec.budget)
    size = kind.budget_parameter
    if spec.budget is not None and size in choice.given:
        raise InvalidArgumentError(f"give budget or {size}, not both")
    if kind.needs_size and spec.budget is None and size not in choice.given:
        raise InvalidArgumentError(f"sampler: {kind.name} needs a budget or {size}; give one")
    require_rule_for(spec.missing_mass, unbiased=kind.unbiased)
    if spec.thinning is not None and sampler.rounds is None:
        raise InvalidArgumentError(
            f"sampler: {kind.name} draws no rounds, so its targets cannot be thinned; leave "
            "thinning out"
        )


def _thinning_title(thinning: Thinning) -> str:
    noise = "fresh" if thinning.fresh_noise else "frozen"
    if thinning.schedule is not None:
        return f"thinned by a schedule, {noise}"
    to = f"N = {thinning.rounds}" if thinning.rounds is not None else f"{thinning.budget:g}"
    return f"thinned to {to}, {noise}"
