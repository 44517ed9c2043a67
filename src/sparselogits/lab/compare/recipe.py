"""The recipe of a comparison: one setting, and the methods to compare.

A method is a name (a training method, or `none`) or a mapping with the options of
`sparselogits cache` and `train`. A list in it stands for one method per value, two lists for all
pairs. Keys that are not fields of a method are fields of its sampler:

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
from sparselogits.methods import METHODS, METHODS_IN_WORDS, listed, require_fits
from sparselogits.samplers import SamplerChoice, TopK, choose
from sparselogits.train.recipe import (
    Count,
    DtypeName,
    Fraction,
    Quantize,
    Student,
    Thinning,
    TrainingSettings,
    read_yaml,
    validated,
)

AnySampler = Annotated[InstanceOf[SamplerChoice], PlainSerializer(SamplerChoice.parameters)]
Budget = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

UNTRAINED = "none"
"""Method of a comparison that measures the student before training."""


def _method_name(name: str) -> str:
    if name != UNTRAINED and name not in METHODS:
        raise ValueError(f"unknown method; available: {', '.join([*METHODS, UNTRAINED])}")
    return name


LABELS_ONLY = TopK(1)
"""Sampler of the cache from which methods without cached targets read their text."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSpec(_Strict):
    """One method: its targets, and how they are used in training."""

    name: str | None = Field(
        None, description="name in tables; composed of the other fields by default"
    )
    method: Annotated[str, AfterValidator(_method_name)] = Field(
        "sparse", description=f"{METHODS_IN_WORDS}; {UNTRAINED}: the student before training"
    )
    sampler: AnySampler | None = Field(
        None, description="name of the sampler of sparse targets; its fields are keys of the method"
    )
    budget: Budget | None = Field(None, description="mean entries per position")
    missing_mass: MissingMass = Field(
        "drop", description="rule for the mass that biased targets lack"
    )
    alpha: Fraction = Field(0.0, description="share of the labels' cross-entropy in the loss")
    beta: float | None = Field(None, description="share of the teacher, for jensen_shannon")
    learning_rate: Positive | None = Field(
        None, description="learning rate of this method, instead of that of training"
    )
    thinning: Thinning | None = Field(None, description="use fewer of the drawn rounds")

    @model_validator(mode="before")
    @classmethod
    def _take_the_fields_of_the_sampler(cls, values: Any) -> Any:
        """Make the sampler of the keys that are not fields of a method."""
        if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
            return values
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        given = {name: value for name, value in values.items() if name not in own}
        try:
            return own | {"sampler": choose(own["sampler"], given, known=cls.model_fields)}
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from error

    @model_serializer(mode="wrap")
    def _in_the_words_of_a_recipe(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.sampler is None:
            return values
        return values | {"sampler": self.sampler.kind.name} | dict(self.sampler.given)

    @model_validator(mode="after")
    def _is_one_method(self) -> MethodSpec:
        if self.method != "sparse":
            odd = [name for name in ("sampler", "budget", "thinning") if getattr(self, name)]
            odd += ["missing_mass"] if self.missing_mass != "drop" else []
            if self.method == UNTRAINED:
                odd += [n for n in ("alpha", "beta", "learning_rate") if getattr(self, n)]
            else:
                require_fits(METHODS[self.method], teacher=self.online, beta=self.beta)
            if odd:
                raise ValueError(f"method: {self.method} takes no {', '.join(odd)}")
            return self
        if self.sampler is None:
            others = [name for name in [*METHODS, UNTRAINED] if name != "sparse"]
            raise ValueError(f"give a sampler, or method: {listed(others, 'or')}")
        try:
            _require_sampler(self, self.sampler)
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def online(self) -> bool:
        """Whether the teacher runs during training."""
        return self.method != UNTRAINED and METHODS[self.method].online

    @property
    def title(self) -> str:
        """Name in tables."""
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
        return title + (f", learning rate {self.learning_rate:g}" if self.learning_rate else "")


class FromTeacher(_Strict):
    """A student made from the teacher's weights: pruned (see `sparselogits shrink`), quantised."""

    origin: Literal["teacher"] = Field(alias="from", description="teacher")
    layers: Count | None = Field(None, description="transformer blocks to keep")
    drop_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="numbers of the blocks to remove, instead of layers"
    )
    intermediate_size: Count | None = Field(None, description="MLP channels to keep per block")
    heads: Count | None = Field(None, description="attention heads to keep per block")
    hidden_size: Count | None = Field(None, description="width of the hidden states to keep")
    layer_score: Literal["influence", "loss"] = Field(
        "influence", description="how blocks are ranked: influence or loss"
    )
    calibration_windows: Count = Field(32, description="training windows that parts are ranked on")
    quantize: Quantize | None = Field(None, description="format of the weights, as in training")

    @model_validator(mode="after")
    def _differs_from_the_teacher(self) -> FromTeacher:
        if not self.pruned and self.quantize is None:
            raise ValueError(
                "from: teacher needs layers, drop_layers, intermediate_size, heads, hidden_size "
                "or quantize"
            )
        return self

    @property
    def pruned(self) -> bool:
        """Whether parts of the teacher are removed."""
        sizes = (self.layers, self.drop_layers, self.intermediate_size, self.heads)
        return any(size is not None for size in (*sizes, self.hidden_size))


_GIVEN, _MADE = "(student)", "(student from the teacher)"
"""Names of the two kinds of students, which pydantic puts into the path of an error."""


def _kind_of_student(value: Any) -> str:
    made = isinstance(value, FromTeacher) or (isinstance(value, dict) and "from" in value)
    return _MADE if made else _GIVEN


AnyStudent = Annotated[
    Annotated[Student, Tag(_GIVEN)] | Annotated[FromTeacher, Tag(_MADE)],
    Discriminator(_kind_of_student),
]


def _one_new_student() -> dict[str, Student | FromTeacher]:
    return {"student": Student()}


class TaskNames(_Strict):
    """Zero-shot tasks that every student and the teacher are scored on."""

    names: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="continuation, last_word, agreement, or tasks of lm-eval"
    )
    limit: Count = Field(LIMIT, description="largest number of samples per task")

    @model_validator(mode="after")
    def _names_differ(self) -> TaskNames:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a task is named twice: {', '.join(self.names)}; name each once")
        return self


class Training(TrainingSettings):
    """Training settings of every student."""

    set_elsewhere: ClassVar[Mapping[str, str]] = {"output_dir": "out", "seed": "seeds"}

    learning_rate: Positive = 1e-3


class Gradients(_Strict):
    """Settings for comparing the gradients of targets with those of full distillation."""

    windows: Count = Field(
        8, description="largest number of held-out windows; a multiple of the largest batch is used"
    )
    batch_windows: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (1, 4), description="windows per batch; several sizes are measured at once"
    )
    draws: Annotated[int, Field(ge=2)] = Field(4, description="draws of random targets per batch")

    @model_validator(mode="after")
    def _fill_a_batch(self) -> Gradients:
        largest = max(self.batch_windows)
        if largest > self.windows:
            raise ValueError(
                f"{self.windows} windows do not fill a batch of {largest}; give more windows"
            )
        return self


class CompareRecipe(_Strict):
    """Everything a comparison depends on."""

    title: str = Field("comparison", description="title of the report")
    teacher: str = Field(description="model folder, GGUF file or hub name")
    teacher_dtype: DtypeName = "auto"
    data: str = Field(description="text, JSONL or Parquet file, folder, or dataset")
    text_field: str = "text"
    completion_only: bool = Field(
        False,
        description="records are conversations, of which only the assistant's turns are learnt",
    )
    out: Path = Field(description="output directory")
    window: Annotated[int, Field(ge=2)] = Field(256, description="tokens per window")
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of the text held out for evaluation"
    )
    heldout_windows: Count | None = Field(
        None, description="largest number of held-out windows to evaluate on"
    )
    separator_id: int | None = Field(None, description="token between documents")
    cache_batch: Count = Field(8, description="windows per forward pass of the teacher")
    draw_seed: Annotated[int, Field(ge=0)] = Field(0, description="random seed for sampling")
    vary_draws: bool = Field(
        False, description="build a cache per seed, sampled with draw_seed + seed"
    )
    students: dict[str, AnyStudent] = Field(
        default_factory=_one_new_student,
        description="students by name: as in a training recipe, or made from the teacher",
    )
    training: Training = Training()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), description="seeds of initial weights and of the order of windows"
    )
    tasks: TaskNames | None = Field(None, description="zero-shot tasks; none by default")
    draft: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens to draft for the teacher at a time; 0 to measure no drafting"
    )
    draft_windows: Count = Field(16, description="held-out windows to draft from")
    gradients: Gradients | None = Field(
        None, description="compare the gradients of targets with full KD's; not by default"
    )
    resamples: Count = Field(1000, description="resamples of the windows for the intervals")
    methods: tuple[MethodSpec, ...] = Field(
        min_length=1, description="methods in the order in which they are run"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CompareRecipe:
        titles = [method.title for method in self.methods]
        for what, names in (("methods", titles), ("seeds", list(self.seeds))):
            twice = sorted({str(n) for n in names if list(names).count(n) > 1})
            if twice:
                raise ValueError(f"{what} occur twice: {', '.join(twice)}; name each once")
        if not self.seeds or not self.students:
            raise ValueError("give at least one seed and one student")
        return self


def load_compare_recipe(path: Path, **overrides: Any) -> CompareRecipe:
    """Read a recipe; paths in it are relative to where the command runs.

    Args:
        path: YAML file.
        overrides: values that replace those of the file; None for that of the file.

    Raises:
        RecipeError: names the file, the key and what is wrong.
    """
    return parse_compare_recipe(read_yaml(path, overrides), source=str(path))


def parse_compare_recipe(values: dict[str, Any], *, source: str) -> CompareRecipe:
    """Validate plain values as a recipe; `source` names them in messages.

    Raises:
        RecipeError: see `load_compare_recipe`.
    """
    methods = values.get("methods")
    if isinstance(methods, list):
        values = {**values, "methods": [one for own in methods for one in expanded(own)]}
    return validated(CompareRecipe, values, _FIELDS, f"{source} is not a valid comparison")


def expanded(method: Any) -> list[Any]:
    """Return one method per combination of the values in lists."""
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
    _MADE: list(FromTeacher.model_fields),
    "quantize": list(Quantize.model_fields),
    "training": list(Training.model_fields),
    "gradients": list(Gradients.model_fields),
    "thinning": list(Thinning.model_fields),
}


def slug(text: str) -> str:
    """Return a name as part of a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _require_sampler(spec: MethodSpec, choice: SamplerChoice) -> None:
    """Check what the rest of a method asks of its sampler.

    Raises:
        InvalidArgumentError: a budget and the parameter it sets, neither of them where one is
            needed, a budget that sets nothing, or a rule or thinning that the targets do not have.
    """
    kind, sampler = choice.kind, choice.sampler()
    sampler.left_open(spec.budget)
    size = kind.budget_parameter
    if spec.budget is not None and size in choice.given:
        raise InvalidArgumentError(f"give budget or {size}, not both")
    if kind.needs_size and spec.budget is None and size not in choice.given:
        raise InvalidArgumentError(f"sampler: {kind.name} needs a budget or {size}")
    require_rule_for(spec.missing_mass, unbiased=kind.unbiased)
    if spec.thinning is not None and sampler.rounds is None:
        raise InvalidArgumentError(
            f"sampler: {kind.name} draws no rounds, and thinning keeps some of the rounds; leave "
            "thinning out"
        )


def _thinning_title(thinning: Thinning) -> str:
    noise = "fresh" if thinning.fresh_noise else "frozen"
    if thinning.schedule is not None:
        return f"thinned by a schedule, {noise}"
    to = f"N = {thinning.rounds}" if thinning.rounds is not None else f"{thinning.budget:g}"
    return f"thinned to {to}, {noise}"
