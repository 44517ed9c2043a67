"""`SparseKDTrainer`: transformers' Trainer, training from a cache.

Everything the Trainer does (mixed precision, gradient accumulation, DDP, checkpoints, callbacks,
logging) it still does. Different are the order, which is computed from a seed and resumes exactly;
the collation; and the loss, which is bound into the student's own forward (see `objective`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparselogits.causal_lm import text_config
from sparselogits.data import (
    CacheDataset,
    Pace,
    Schedule,
    WindowOrder,
    WindowSampler,
    as_windows,
    collate,
)
from sparselogits.errors import InvalidArgumentError, InvalidTargetsError
from sparselogits.files import write_whole
from sparselogits.losses import MissingMass, require_rule_for
from sparselogits.samplers import from_parameters
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import DIVERGENCES, Method, Objective, bind


class SparseKDTrainer(Trainer):  # type: ignore[misc]
    """Distil a student from a cache of sparse targets.

    Args:
        model: the student, a transformers causal language model.
        args: transformers' TrainingArguments, or TRL's SFTConfig. What the latter says about
            preparing data (`max_length`, `packing`, ...) was settled when the cache was built.
        train_dataset: a cache.
        method: "sparse" (the cached targets), "ce" (labels alone: the baseline without a teacher),
            "full" (the teacher's whole distribution, online: the expensive reference) or
            "reverse_kl" (the same, minimising KL(student || teacher) as MiniLLM does).
        alpha: share of the labels' cross-entropy.
        missing_mass: what becomes of the mass that Top-K and Top-P targets lack.
        rounds: thin the cached targets to so many rounds, any number up to the cache's; or a
            `Schedule` that changes it over training.
        fresh_noise: with a number of `rounds`, keep other cached rounds in each epoch.
        teacher: for "full" and "reverse_kl".
        eval_dataset: held-out windows; their loss is the labels' cross-entropy, and where they have
            targets their KD part is reported beside it. Or a `datasets.Dataset` of tokenised rows
            (`input_ids`, perhaps `labels`), or several by name.
        others: any further argument of transformers' Trainer.

    Raises:
        InvalidArgumentError: options that contradict each other or the cache.
        InvalidTargetsError: a student with fewer ids than the targets use.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset: CacheDataset,
        method: Method = "sparse",
        alpha: float = 0.0,
        missing_mass: MissingMass = "drop",
        rounds: int | Schedule | None = None,
        fresh_noise: bool = True,
        teacher: TransformersTeacher | None = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        _require_cache(train_dataset)
        identity = train_dataset.identity
        sampler = from_parameters(_without_budget(identity.sampler))
        if method == "sparse":
            require_rule_for(missing_mass, unbiased=sampler.unbiased)
        if (method in DIVERGENCES) != (teacher is not None):
            raise InvalidArgumentError(
                f"{' and '.join(map(repr, DIVERGENCES))} need a teacher online, the other methods "
                f"take none; method is {method!r}"
            )
        self._thinning = rounds if isinstance(rounds, Schedule) else None
        if isinstance(rounds, int):
            self._thinning = Schedule.constant(rounds, fresh_noise=fresh_noise)
        if self._thinning is not None:
            self._thinning.require_within(sampler.rounds)
        _require_vocabulary(model, identity.vocab_size)
        self.objective = Objective(
            method,
            alpha=alpha,
            missing_mass=missing_mass,
            temperature=identity.temperature,
            unbiased=sampler.unbiased,
            teacher_head=None if teacher is None else teacher.head,
            teacher_tokens=_partial_mask(teacher),
        )
        self._teacher = teacher
        self._order: WindowSampler | None = None
        bind(model, self.objective)
        args = args if args is not None else TrainingArguments("sparselogits-run")
        _require_what_args_ask(args, train_dataset)
        args.remove_unused_columns = False
        args.prediction_loss_only = True
        args.label_names = ["shift_labels"]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=as_windows(eval_dataset),
            data_collator=others.pop("data_collator", collate),
            **others,
        )
        # the bound forward divides by the items of the whole accumulated batch
        self.model_accepts_loss_kwargs = True
        self.add_callback(_KeepOrder(self))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = WindowOrder(len(dataset), seed, dataset.identity.fingerprint)
        self._order = WindowSampler(order, thinning=self._thinning, pace=self._pace(len(dataset)))
        return self._order

    def _pace(self, windows: int) -> Pace:
        """How the Trainer will divide an epoch into steps; checked when training begins."""
        windows_per_step = self.get_total_train_batch_size(self.args)
        together = windows_per_step // self.args.gradient_accumulation_steps
        batches = windows // together
        if not self.args.dataloader_drop_last:
            batches = math.ceil(windows / together)
        steps_per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * steps_per_epoch)
        return Pace(windows_per_step, steps_per_epoch, steps)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, *arguments: Any, **options: Any
    ) -> None:
        if not self.args.ignore_data_skip:
            _require_same_step(
                Path(resume_from_checkpoint), self.get_total_train_batch_size(self.args)
            )
        super()._load_from_checkpoint(resume_from_checkpoint, *arguments, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *others: Any) -> Any:
        """The batches of one step, and how long it took to get them."""
        with self.objective.training.waiting():
            return super().get_batch_samples(epoch_iterator, *others)

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self._teacher is not None and self.model.training:
            starts = None
            if "position_ids" in prepared:
                restarts = prepared["position_ids"].cpu() == 0
                starts = [row.nonzero().flatten().numpy() for row in restarts]
            prepared["teacher_hidden"] = self._teacher.hidden(prepared["input_ids"], starts)
        if self.objective.method != "sparse":
            for name in ("target_ids", "target_weights"):
                prepared.pop(name, None)
        return prepared

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, with the figures of `LossMeter` since the last line."""
        if "loss" in logs:
            logs = {**logs, **self.objective.training.take(self._sum_over_ranks)}
        super().log(logs, *arguments, **options)

    def evaluate(
        self, eval_dataset: Any = None, *arguments: Any, **options: Any
    ) -> dict[str, float]:
        """Evaluate; `eval_loss` is the labels' cross-entropy, with `eval_kd` and `eval_kl` beside.

        The last two for windows with targets, and for unbiased ones.
        """
        self.objective.evaluation.take(self._sum_over_ranks)
        given = as_windows(eval_dataset)
        return super().evaluate(given, *arguments, **options)  # type: ignore[no-any-return]

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's, with the KD part among its metrics."""
        output = super().evaluation_loop(*arguments, **options)
        found = self.objective.evaluation.take(self._sum_over_ranks)
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": found[k] for k in ("kd", "kl") if k in found})
        return output

    def _sum_over_ranks(self, vector: Tensor) -> Tensor:
        # an unused meter is still on the CPU, where NCCL cannot add
        there = vector.to(self.args.device)
        return self.accelerator.reduce(there, reduction="sum")  # type: ignore[no-any-return]


class _KeepOrder(TrainerCallback):  # type: ignore[misc]
    """Keeps the order at the Trainer's epoch and at its number of steps, and in its checkpoints.

    Accelerate forwards an epoch to the sampler, but not through the wrappers with which it skips
    batches on several ranks: a resumed run would go on in the order of epoch 0.
    """

    def __init__(self, trainer: SparseKDTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        order = self._trainer._order
        assert order is not None
        assert order.pace is not None
        changing = order.thinning is not None and len(order.thinning.stages) > 1
        if changing and order.pace.steps != state.max_steps:
            raise InvalidArgumentError(
                f"a thinning schedule over {order.pace.steps} steps, but the Trainer makes "
                f"{state.max_steps}: batches are divided in a way that is not understood "
                "(split_batches?)"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self._trainer._order is not None
        self._trainer._order.set_epoch(int(state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            step = {"windows_per_step": self._trainer.get_total_train_batch_size(args)}
            write_whole(checkpoint / _STEP_FILE, json.dumps(step) + "\n")


_STEP_FILE = "sparselogits.json"


def _require_same_step(checkpoint: Path, windows_per_step: int) -> None:
    """The Trainer counts steps, so another number of windows in each would be another place."""
    try:
        before = json.loads((checkpoint / _STEP_FILE).read_text())["windows_per_step"]
    except FileNotFoundError:
        return  # a run killed before it was written
    if before != windows_per_step:
        raise InvalidArgumentError(
            f"{checkpoint} was trained with {before} windows a step, this run takes "
            f"{windows_per_step} (ranks x batch x accumulation) and would go on at another place "
            f"in the text: make it {before} again, or begin anew in another folder. "
            "ignore_data_skip=True starts the text from its beginning with the weights so far"
        )


def _require_cache(dataset: Any) -> None:
    if not hasattr(dataset, "identity"):
        raise InvalidArgumentError(
            f"a student is trained from a CacheDataset, not from a {type(dataset).__name__}: let "
            "the teacher read the text first (open_source(dataset), pack, build_caches; or "
            "`sparselogits cache`)"
        )


def _require_what_args_ask(args: TrainingArguments, dataset: CacheDataset) -> None:
    """Refuse what TRL's arguments ask for beside training, where the cache cannot give it."""
    for name in ("assistant_only_loss", "completion_only_loss"):
        if getattr(args, name, None) and dataset.cache.read(0).mask is None:
            raise InvalidArgumentError(
                f"{name}=True, but the cache at {dataset.cache.root} was built to learn every "
                "token; build it with --completion-only (completion_only=True in Python)"
            )
    if getattr(args, "loss_type", "nll") != "nll":
        raise InvalidArgumentError(
            f"loss_type={args.loss_type!r}: the loss is that of `method` and `alpha`; leave it out"
        )


def _without_budget(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "budget"}


def _require_vocabulary(model: nn.Module, teacher_vocabulary: int) -> None:
    student = int(text_config(model.config).vocab_size)
    if student < teacher_vocabulary:
        raise InvalidTargetsError(
            f"the student's vocabulary has {student} ids, the cache's targets may use "
            f"{teacher_vocabulary}; give the student at least as many (padding rows are harmless)"
        )


def _partial_mask(teacher: TransformersTeacher | None) -> Tensor | None:
    if teacher is None or bool(torch.all(teacher.token_mask)):
        return None
    return teacher.token_mask.to(teacher.device)
