"""Train from a cache with transformers' Trainer.

`SparseKDTrainer` inherits mixed precision, gradient accumulation, DDP, checkpoints, callbacks and
logging from the Trainer, and replaces three parts: the order of the windows, which is computed from
a seed and resumes exactly; the collation; and the loss, which is computed in the student's own
forward (see `objective`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from sparselogits.data import (
    CacheDataset,
    DraftVocabulary,
    Pace,
    Schedule,
    TextDataset,
    TokenisedRows,
    WindowOrder,
    WindowSampler,
    as_windows,
    collate,
)
from sparselogits.documents import require_masked_padding
from sparselogits.errors import (
    InvalidArgumentError,
    InvalidTargetsError,
    SparseLogitsWarning,
    TrainingError,
)
from sparselogits.files import write_whole
from sparselogits.language_model import recording_last_states, require_predicting, text_config
from sparselogits.losses import MissingMass, require_rule_for
from sparselogits.methods import METHODS
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.positions import check_window
from sparselogits.store.ranges import joined, ranges_in_words
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.arguments import require_known, require_objective
from sparselogits.train.finite import FiniteGuard
from sparselogits.train.objective import Objective, Wiring, attach, bind, unbind


class SparseKDTrainer(Trainer):  # type: ignore[misc]
    """Trainer that distils a student from a cache of sparse targets.

    Args:
        model: the student, a transformers language model of the cache's kind, causal or masked. Its
            forward computes the loss while this trainer trains or evaluates, in calls with
            `shift_labels`; otherwise the model is unchanged. None if `model_init` creates it.
        args: transformers' TrainingArguments, or TRL's SFTConfig, whose settings for data
            preparation (`max_length`, `packing`, ...) are ignored, as the cache fixes them. None
            for `TrainingArguments("sparselogits-run")`.
        train_dataset: the cache, or several caches that are mixed (see `CacheDataset`). If it has a
            draft vocabulary, the student must have a head for the classes of the vocabulary
            (`DraftVocabulary.give_head`).
        method: name of a training method in `methods.METHODS`: "sparse" (the cached targets), "ce"
            (labels alone, the baseline without a teacher), or a divergence to the teacher's whole
            distribution with the teacher online: "full" (the expensive reference), "reverse_kl" (as
            in MiniLLM) or "jensen_shannon" (as in GKD).
        alpha: share of the labels' cross-entropy in the loss, in [0, 1].
        beta: for "jensen_shannon", the share of the teacher in the mixture; None for 1/2.
        cosine: weight of the cosine loss between the last hidden states of student and teacher, for
            a method with the teacher online: the mean of 1 - cosine over all positions that are not
            padding (`alpha_cos` of DistilBERT). Hidden sizes must be equal.
        missing_mass: rule for the probability mass that biased targets (Top-K, Top-P) lack; see
            `losses.Criterion`.
        rounds: number of rounds to which the cached targets are thinned, at most the number in the
            cache; or a `Schedule` that changes the number during training. None uses all rounds.
        fresh_noise: with an integer `rounds`, whether to use different rounds in each epoch.
        teacher: the cache's teacher, for a method with the teacher online.
        eval_dataset: held-out windows, a `datasets.Dataset` of tokenised rows (`input_ids`,
            optionally `labels`), or several datasets by name. The evaluation loss is the labels'
            cross-entropy; with the method "sparse", the KD part is reported too for windows with
            targets.
        others: other arguments of transformers' Trainer. docs/training.md lists the arguments of
            the Trainer and of TrainingArguments that behave differently or are rejected.

    Raises:
        InvalidArgumentError: If arguments contradict each other or the cache, or would have no
            effect.
        InvalidTargetsError: If the student has fewer ids than the cache's teacher.

    Examples:
        >>> from transformers import AutoModelForCausalLM, TrainingArguments
        >>> from sparselogits import CacheDataset
        >>> student = AutoModelForCausalLM.from_pretrained("my-student")
        >>> trainer = SparseKDTrainer(
        ...     student,
        ...     TrainingArguments("run", max_steps=2, report_to="none"),
        ...     train_dataset=CacheDataset("my-cache"),
        ...     alpha=0.1,
        ... )
        >>> output = trainer.train()
        >>> output.global_step
        2
    """

    _student: nn.Module
    _wiring: Wiring
    _evaluates = False  # whether an evaluation's batch is computed

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: CacheDataset,
        method: str = "sparse",
        alpha: float = 0.0,
        beta: float | None = None,
        cosine: float = 0.0,
        missing_mass: MissingMass = "drop",
        rounds: int | Schedule | None = None,
        fresh_noise: bool = True,
        teacher: TransformersTeacher | None = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        _require_cache(train_dataset)
        chosen = require_objective(
            *(method, alpha, beta, missing_mass, rounds, fresh_noise, cosine),
            teacher=teacher is not None,
        )
        identity = train_dataset.identity
        if chosen.cached:
            require_rule_for(missing_mass, unbiased=train_dataset.unbiased)
            _require_whole_ids(missing_mass, train_dataset)
        self._draft: DraftVocabulary | None = getattr(train_dataset, "draft", None)
        if self._draft is not None and teacher is not None:
            raise InvalidArgumentError(
                f"method={method!r} compares the student with all ids of the teacher, but "
                "train_dataset has a draft vocabulary; use method='sparse' or 'ce'"
            )
        self._thinning = rounds if isinstance(rounds, Schedule) else None
        if rounds is not None and not isinstance(rounds, Schedule):
            self._thinning = Schedule.constant(int(rounds), fresh_noise=fresh_noise)
        if self._thinning is not None:
            self._thinning.require_within(train_dataset.rounds, train_dataset.teachers_per_window)
        args = args if args is not None else TrainingArguments("sparselogits-run")
        require_known(args, others)
        _require_trl_settings(args, train_dataset)
        if args.label_smoothing_factor and method != "ce" and not alpha:
            warnings.warn(
                f"label_smoothing_factor={args.label_smoothing_factor:g} has no effect, because "
                "alpha=0 leaves the labels' cross-entropy out of the loss. Set alpha, or leave "
                "label_smoothing_factor out",
                SparseLogitsWarning,
                stacklevel=2,
            )
        if cosine and identity.objective is not None and identity.packing.get("reset_attention"):
            raise InvalidArgumentError(
                "the cosine loss of a masked language model needs windows that run as a whole, but "
                "the cache resets attention at document starts; leave cosine out, or build the "
                "cache with --packing documents"
            )
        self.objective = Objective(
            method,
            beta=beta,
            alpha=alpha,
            missing_mass=missing_mass,
            temperature=identity.temperature,
            unbiased=train_dataset.unbiased,
            teacher_head=None if teacher is None else teacher.head,
            teacher_tokens=_partial_mask(teacher),
            label_smoothing=args.label_smoothing_factor,
            cosine=cosine,
            masked=identity.objective is not None,
        )
        self._teacher = teacher
        self._vocabulary = identity.vocab_size
        self._window_length = identity.window_length
        self._padded = identity.packing.get("kind") == "documents"
        self._order: WindowSampler | None = None
        self._windows = len(train_dataset)
        self._guard = FiniteGuard()
        self._uses = 0
        if model is not None:
            self._adopt(model)
        elif others.get("model_init") is None:
            raise InvalidArgumentError(
                "the student is missing: give a model, or model_init, a function that creates one"
            )
        collator = others.pop("data_collator", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._eval_windows(eval_dataset),
            data_collator=collate if collator is None else collator,
            **others,
        )
        if not args.use_cache and self._used_cache is not None:
            # the Trainer has disabled the key-value cache in the student's configuration, which
            # training does not need, because the bound forward passes use_cache=False itself
            self._student.config.use_cache = self._used_cache  # type: ignore[union-attr]
        self.label_names = ["labels"]
        # the Trainer's label smoother needs all logits; the objective smooths labels without them
        self.label_smoother = None
        # the bound forward divides by the number of items of the whole accumulated batch
        self.model_accepts_loss_kwargs = True
        self.add_callback(_SynchroniseOrder(self))
        self.add_callback(_NotebookColumns(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create a student with `model_init`, and validate the student as the constructor does."""
        model: nn.Module = super().call_model_init(trial)
        self._adopt(model)
        return model

    def _adopt(self, model: nn.Module) -> None:
        if not hasattr(model, "config"):
            raise InvalidArgumentError(
                f"the student is a {type(model).__name__} without a configuration; give a "
                "language model of transformers, with or without a PEFT adapter"
            )
        masked = self.objective.masked
        require_predicting(model, masked=masked, whose="the student", of="the cache")
        if self._draft is None:
            _require_vocabulary(model, self._vocabulary)
        else:
            self._draft.require_head(_outputs_of(model))
        check_window(model, _logits_of(model), self._window_length)
        if masked and self._padded:
            require_masked_padding(model, _logits_of(model))
        if self.objective.cosine and self._teacher is not None:
            _require_equal_width(model, self._teacher.model)
        self._used_cache = getattr(model.config, "use_cache", None)
        if self._uses:
            unbind(self._student)
        self._student = model
        self._wiring = bind(model, self.objective)
        if not self._uses:
            unbind(model)

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Bind the objective to the student within a `with` block; nested blocks are allowed."""
        if not self._uses:
            attach(self._student, self._wiring)
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                unbind(self._student)

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        """Train the student; arguments and result are those of transformers' `Trainer.train`.

        Raises:
            InvalidArgumentError: If no weight can be trained, or if the data order of a checkpoint
                cannot be continued: other caches, missing windows, or another number of windows per
                step.
            TrainingError: If the loss or the weights are not finite.
        """
        if not any(parameter.requires_grad for parameter in self._student.parameters()):
            raise InvalidArgumentError(
                f"no weight of the student ({type(self._student).__name__}) requires a gradient: "
                "call student.requires_grad_(True), or load its adapter with is_trainable=True"
            )
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._windows = len(self.train_dataset)
        if checkpoint and not self.args.ignore_data_skip:
            self._windows = _windows_of(Path(checkpoint), self.train_dataset)
        with self._bound():
            output = super().train(resume_from_checkpoint, *arguments, **options)
            self._require_finite(weights=True)
            return output

    def _inner_training_loop(self, *arguments: Any, **options: Any) -> Any:
        self._guard.clear()
        self.objective.training.take()  # an interrupted run may have left sums
        return super()._inner_training_loop(*arguments, **options)

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        return data_collator  # the Trainer's collator would remove the targets as unused columns

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = WindowOrder(self._windows, seed, dataset.identity.fingerprint)
        self._order = WindowSampler(order, thinning=self._thinning, pace=self.pace())
        return self._order

    def pace(self) -> Pace:
        """Compute windows per step, steps per epoch and total steps, as the Trainer does."""
        windows_per_step = self.get_total_train_batch_size(self.args)
        windows_per_batch = windows_per_step // self.args.gradient_accumulation_steps
        batches = self._windows // windows_per_batch
        if not self.args.dataloader_drop_last:
            batches = math.ceil(self._windows / windows_per_batch)
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
        """Return the batches of one step and their number of items; measure the time of waiting."""
        with self.objective.training.waiting():
            return super().get_batch_samples(epoch_iterator, *others)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the labels, or in masked diffusion the tokens, by which a loss is divided."""
        # in masked diffusion, a window has the loss weight 1 / rate, and padding does not count
        if batch_samples and "loss_weight" in batch_samples[0] and not self._evaluates:
            ids = [
                batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
                if "attention_mask" in batch
                else batch["input_ids"]
                for batch in batch_samples
            ]
            batch_samples = [{"labels": own, "shift_labels": own} for own in ids]
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: Any, *others: Any, **options: Any) -> Tensor:
        """Run forward and backward on a batch, and store the loss until it is checked."""
        loss: Tensor = super().training_step(model, inputs, *others, **options)
        if self._guard.add(self.state.global_step, loss):
            self._require_finite()
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Compute the loss in the student's own forward.

        Raises:
            InvalidArgumentError: If the batch has no `shift_labels`.
        """
        if inputs.get("shift_labels") is None:
            raise InvalidArgumentError(
                f"a batch has the keys {', '.join(inputs)}, but no shift_labels, which the loss "
                "needs: let the data_collator call sparselogits.data.collate and change its result"
            )
        with self._bound():
            return super().compute_loss(model, inputs, *arguments, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        *others: Any,
        **options: Any,
    ) -> Any:
        """Evaluate a batch; the logits are computed only if `prediction_loss_only` is False."""
        self.objective.with_logits, self._evaluates = not prediction_loss_only, True
        inputs = self._without_repeated_labels(inputs)
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *others, **options)
        finally:
            self.objective.with_logits = self._evaluates = False

    def _without_repeated_labels(self, inputs: Any) -> Any:
        """Remove the labels of the windows that fill the last batches of an evaluation.

        On several ranks, accelerate repeats windows so that all ranks have equal batches, and joins
        the last batches in the order of the ranks, so that the repeated windows come last.
        """
        state, labels = self.accelerator.gradient_state, inputs.get("shift_labels")
        if self.args.world_size == 1 or labels is None or not state.end_of_dataloader:
            return inputs
        own = max(0, state.remainder - self.args.process_index * len(labels))
        if state.remainder <= 0 or own >= len(labels):
            return inputs
        labels = labels.clone()
        labels[own:] = IGNORE_INDEX
        return {**inputs, "shift_labels": labels}

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """Return a loader of batches; `dataloader_drop_last` has an effect in training only."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and options.get("is_training", False)
        try:
            return super()._get_dataloader(*arguments, **options)
        finally:
            self.args.dataloader_drop_last = drops

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self._teacher is not None and self.model.training:
            starts = None
            if "position_ids" in prepared:
                restarts = prepared["position_ids"].cpu() == 0
                starts = [row.nonzero().flatten().numpy() for row in restarts]
            compares = self.objective.cosine > 0
            of_base = compares and self.objective.masked
            recording: AbstractContextManager[list[Tensor]] = nullcontext([])
            if of_base:
                recording = recording_last_states(self._teacher.model)
            with recording as recorded:
                hidden = self._teacher.hidden(
                    prepared["input_ids"], starts, prepared.get("attention_mask")
                )
            prepared["teacher_hidden"] = hidden
            if compares:
                prepared["teacher_states"] = recorded[0] if of_base else hidden
        if not METHODS[self.objective.method].cached:
            for name in ("target_ids", "target_weights"):
                prepared.pop(name, None)
        return prepared

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log as transformers does; add the metrics of `LossMeter` to a line with the loss.

        Raises:
            TrainingError: If a loss since the last check is not finite.
        """
        if "loss" in logs:
            logs = {**logs, **self.objective.training.take(self._sum_over_ranks)}
            super().log(logs, *arguments, **options)
            self._require_finite()
            return
        super().log(logs, *arguments, **options)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        self._require_finite(weights=True)
        super()._save_checkpoint(*arguments, **options)

    def _require_finite(self, *, weights: bool = False) -> None:
        found = self._guard.check(self._sum_over_ranks, self._student if weights else None)
        if found is None:
            return
        advice = (
            "Nothing was saved, and earlier checkpoints are unchanged. Lower the learning rate or "
            "max_grad_norm, train in bfloat16 instead of float16, or check the data"
        )
        if found.step is None:
            raise TrainingError(
                f"step {self.state.global_step}: the student's weights, or the loss on another "
                f"rank, are not finite. {advice} (`sparselogits verify CACHE`)"
            )
        windows = self._windows_of_batch(found.step, found.batch)
        some = ", ".join(map(str, windows[:16])) + (", ..." if len(windows) > 16 else "")
        raise TrainingError(
            f"step {found.step + 1}: the loss is {found.loss}, not a finite number, on the "
            f"window{'s' if len(windows) > 1 else ''} {some} of the cache. {advice} "
            f"(`sparselogits view CACHE --window {windows[0] if windows else 0}`)"
        )

    def _windows_of_batch(self, step: int, batch: int) -> list[int]:
        """Return the corpus indices of the windows in one batch of a step on this rank."""
        assert self._order is not None
        assert self._order.pace is not None
        pace, size = self._order.pace, self._train_batch_size
        epoch, within = divmod(step, pace.steps_per_epoch)
        first = within * pace.windows_per_step
        first += (batch * self.args.world_size + self.args.process_index) * size
        order, dataset = self._order.order, self.train_dataset
        positions = range(first, min(first + size, order.windows))
        return [dataset.cache.window_index(order[epoch, position]) for position in positions]

    def evaluate(
        self, eval_dataset: Any = None, *arguments: Any, **options: Any
    ) -> dict[str, float]:
        """Evaluate as transformers' Trainer does, and return the metrics by name.

        `eval_loss` is the cross-entropy to the labels. With the method "sparse" and targets in the
        windows, `eval_kd` is the cross-entropy to the targets. If these are unbiased, of the whole
        vocabulary and not retokenized, `eval_kl` estimates KL(teacher || student). All three are
        means over positions with a label, in nats.
        """
        self.objective.evaluation.take(self._sum_over_ranks)
        given = self._eval_windows(eval_dataset)
        return super().evaluate(given, *arguments, **options)  # type: ignore[no-any-return]

    def _eval_windows(self, given: Any) -> Any:
        made = as_windows(given)
        parts = made.values() if isinstance(made, Mapping) else [made]
        for part in parts:
            if part is not None and getattr(part, "draft", None) != self._draft:
                raise InvalidArgumentError(
                    "eval_dataset and train_dataset have different draft vocabularies; give both "
                    "the same one, as in TextDataset(corpus, draft=train_dataset.draft)"
                )
            if not isinstance(part, TextDataset | TokenisedRows):
                continue
            masked = isinstance(part, TextDataset) and part.corruption is not None
            if self.objective.masked and not masked:
                raise InvalidArgumentError(
                    "eval_dataset has windows whose labels are those of a causal language model; "
                    "the cache is for a masked one. Give TextDataset(corpus, corruption=...)"
                )
            if masked and not self.objective.masked:
                raise InvalidArgumentError(
                    "eval_dataset has corrupted windows, but the cache is for a causal language "
                    "model. Give TextDataset(corpus) without a corruption"
                )
        return made

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Run the Trainer's evaluation loop, and set the metrics that `evaluate` lists."""
        with self._bound():
            output = super().evaluation_loop(*arguments, **options)
        found = self.objective.evaluation.take(self._sum_over_ranks)
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": found[k] for k in ("kd", "kl") if k in found})
        # the Trainer's mean over windows depends on the batch size if windows differ in labels
        if "ce" in found:
            output.metrics[f"{prefix}_loss"] = found["ce"]
        return output

    def _sum_over_ranks(self, vector: Tensor) -> Tensor:
        # an unused meter is still on the CPU, where NCCL cannot reduce
        on_device = vector.to(self.args.device)
        return self.accelerator.reduce(on_device, reduction="sum")  # type: ignore[no-any-return]


class _NotebookColumns(TrainerCallback):  # type: ignore[misc]
    """Callback that adds the parts of the loss to the table that transformers shows in a notebook.

    The callback runs after transformers' callback, which writes the row of the step. If the Trainer
    evaluates, the callback does nothing, because the table then contains all metrics.
    """

    def __init__(self, trainer: SparseKDTrainer) -> None:
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        logs = others.get("logs") or {}
        parts = {name.upper(): logs[name] for name in ("kd", "ce", "kl") if name in logs}
        if "loss" not in logs or not parts or args.eval_strategy != "no":
            return
        for callback in self._trainer.callback_handler.callbacks:
            tracker = getattr(callback, "training_tracker", None)
            if tracker is not None:
                tracker.write_line({"Step": state.global_step, **parts})
                tracker.display()


class _SynchroniseOrder(TrainerCallback):  # type: ignore[misc]
    """Callback that passes the epoch to the order of windows, and records the order in checkpoints.

    Before training, the callback validates that a thinning schedule covers all steps.

    Accelerate does not pass the epoch to the sampler of a resumed run on several ranks.
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
                f"the thinning schedule covers {order.pace.steps} steps, but the Trainer runs "
                f"{state.max_steps}: omit the arguments of the Trainer that change the number of "
                "batches per epoch or step"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self._trainer._order is not None
        self._trainer._order.set_epoch(int(state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            dataset = self._trainer.train_dataset
            step = {
                "windows_per_step": self._trainer.get_total_train_batch_size(args),
                "cache": dataset.identity.fingerprint,
                "ranges": joined(dataset.cache.ranges, self._trainer._windows),
            }
            write_whole(checkpoint / _STEP_FILE, json.dumps(step) + "\n")


_STEP_FILE = "sparselogits.json"


def _require_same_step(checkpoint: Path, windows_per_step: int) -> None:
    """Validate that a checkpoint was trained with the same number of windows per step."""
    before = _read_step_file(checkpoint).get("windows_per_step", windows_per_step)
    if before != windows_per_step:
        raise InvalidArgumentError(
            f"{checkpoint} was trained with {before} windows per step, this run takes "
            f"{windows_per_step} (ranks x batch x accumulation) and would resume at a different "
            f"position in the data: use {before} windows per step, or start in another folder. "
            "ignore_data_skip=True resumes the weights, but starts the data anew"
        )


def _windows_of(checkpoint: Path, dataset: CacheDataset) -> int:
    """Return the number of windows that the order of a checkpoint covers.

    The number is smaller than the cache's if windows were added after the checkpoint was saved.
    Raises InvalidArgumentError if the cache is another one or lacks windows of the checkpoint.
    """
    step = _read_step_file(checkpoint)
    if step.get("cache", dataset.identity.fingerprint) != dataset.identity.fingerprint:
        raise InvalidArgumentError(
            f"{checkpoint} was trained from a cache of fingerprint {step['cache'][:12]}..., the "
            f"cache at {dataset.cache.root} has {dataset.identity.fingerprint[:12]}...: give the "
            "same cache, or the same caches and weights, or start in another folder"
        )
    known = step.get("ranges")
    if known is None:
        return len(dataset)
    windows: int = sum(stop - start for start, stop in known)
    held = joined(dataset.cache.ranges)
    if windows > len(dataset) or joined(dataset.cache.ranges, windows) != known:
        raise InvalidArgumentError(
            f"{checkpoint} was trained on {windows} windows ({ranges_in_words(known)}), and the "
            f"cache at {dataset.cache.root} now contains {ranges_in_words(held)}: the run "
            "cannot resume in the same order. Restore the missing windows, or start in another "
            "folder. ignore_data_skip=True resumes the weights, but starts the data anew"
        )
    if windows < len(dataset):
        warnings.warn(
            f"the cache at {dataset.cache.root} has grown from {windows} to {len(dataset)} windows "
            f"since {checkpoint}: this run continues over the first {windows}. A new run uses all "
            "windows",
            SparseLogitsWarning,
            stacklevel=3,
        )
    return windows


def _read_step_file(checkpoint: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((checkpoint / _STEP_FILE).read_text())
    except FileNotFoundError:
        return {}  # the run was killed before the file was written
    return found


def _logits_of(model: nn.Module) -> Callable[..., Tensor]:
    def run(**inputs: Any) -> Tensor:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    return run


def _require_cache(dataset: Any) -> None:
    if not hasattr(dataset, "identity"):
        raise InvalidArgumentError(
            f"train_dataset must be a CacheDataset, found a {type(dataset).__name__}: build a "
            "cache of the text first, with `sparselogits cache`, or in Python with "
            "open_source(dataset), pack and build_caches"
        )


def _require_whole_ids(rule: MissingMass, dataset: CacheDataset) -> None:
    """Validate that a missing-mass rule is defined for a dataset's draft vocabulary or mixture."""
    if rule == "ghost" and getattr(dataset, "draft", None) is not None:
        raise InvalidArgumentError(
            "missing_mass='ghost' is not defined for a draft vocabulary, because the ghost token "
            "stands for missing ids, and the class of all other ids contains stored and missing "
            "ids. Choose drop, smooth or ground_truth"
        )
    if rule == "ghost" and dataset.teachers_per_window > 1:
        raise InvalidArgumentError(
            "missing_mass='ghost' is not defined for a mixture of truncated targets, because an id "
            "may be stored for one teacher and missing for another, and the ghost token stands for "
            "ids that are missing for all. Choose drop, smooth or ground_truth, or one teacher per "
            'window (weights="best")'
        )


def _require_trl_settings(args: TrainingArguments, dataset: CacheDataset) -> None:
    """Validate that the settings of TRL's SFTConfig agree with the cache and the objective."""
    for name in ("assistant_only_loss", "completion_only_loss"):
        if getattr(args, name, None) and dataset.cache.read(0).mask is None:
            raise InvalidArgumentError(
                f"{name}=True, but the cache at {dataset.cache.root} has no loss mask; build it "
                "with --completion-only (completion_only=True in Python)"
            )
    if getattr(args, "loss_type", "nll") != "nll":
        raise InvalidArgumentError(
            f"loss_type={args.loss_type!r} would have no effect: `method` and `alpha` define the "
            "loss; leave loss_type out"
        )


def _require_vocabulary(model: nn.Module, teacher_vocabulary: int) -> None:
    student = int(text_config(model.config).vocab_size)
    if student < teacher_vocabulary:
        raise InvalidTargetsError(
            f"the student's vocabulary has {student} ids, and the cache's targets use up to "
            f"{teacher_vocabulary}; give the student at least as many (padding rows are harmless)"
        )


def _require_equal_width(student: nn.Module, teacher: nn.Module) -> None:
    own, other = (int(text_config(m.config).hidden_size) for m in (student, teacher))
    if own != other:
        raise InvalidArgumentError(
            f"the cosine loss compares hidden states of equal size, but the student's have {own} "
            f"numbers and the teacher's {other}; leave cosine out, or give a student of the "
            "teacher's width, for example one with fewer layers (sparselogits shrink)"
        )


def _outputs_of(model: nn.Module) -> int:
    """Return the number of outputs of a model's head; 0 if it has no head."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else len(head.weight)


def _partial_mask(teacher: TransformersTeacher | None) -> Tensor | None:
    if teacher is None or bool(torch.all(teacher.token_mask)):
        return None
    return teacher.token_mask.to(teacher.device)
