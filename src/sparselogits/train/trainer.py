"""`SparseKDTrainer`: transformers' Trainer, training from a cache.

Everything the Trainer does (mixed precision, gradient accumulation, DDP, checkpoints, callbacks,
logging) it still does. Different are the order, which is computed from a seed and resumes exactly;
the collation; and the loss, which is bound into the student's own forward (see `objective`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from sparselogits.causal_lm import text_config
from sparselogits.data import CacheDataset, TextDataset, WindowOrder, WindowSampler, collate
from sparselogits.errors import InvalidArgumentError, InvalidTargetsError
from sparselogits.losses import MissingMass, require_rule_for
from sparselogits.samplers import from_parameters
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Method, Objective, bind


class SparseKDTrainer(Trainer):  # type: ignore[misc]
    """Distil a student from a cache of sparse targets.

    Args:
        model: the student, a transformers causal language model.
        args: transformers' TrainingArguments.
        train_dataset: a cache.
        method: "sparse" (the cached targets), "ce" (labels alone: the baseline without a teacher)
            or "full" (the teacher's whole distribution, online: the expensive reference).
        alpha: share of the labels' cross-entropy.
        missing_mass: what becomes of the mass that Top-K and Top-P targets lack.
        rounds: thin the cached targets to so many rounds; a divisor of the cache's.
        fresh_noise: with `rounds`, keep other cached rounds in each epoch.
        teacher: for "full".
        eval_dataset: held-out windows; their loss is the labels' cross-entropy.
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
        rounds: int | None = None,
        fresh_noise: bool = True,
        teacher: TransformersTeacher | None = None,
        eval_dataset: TextDataset | CacheDataset | None = None,
        **others: Any,
    ) -> None:
        identity = train_dataset.identity
        sampler = from_parameters(_without_budget(identity.sampler))
        if method == "sparse":
            require_rule_for(missing_mass, unbiased=sampler.unbiased)
        if (method == "full") != (teacher is not None):
            raise InvalidArgumentError(
                'method="full" needs a teacher, and the other methods take none'
            )
        _require_rounds(rounds, sampler.rounds)
        _require_vocabulary(model, identity.vocab_size)
        self.objective = Objective(
            method,
            alpha=alpha,
            missing_mass=missing_mass,
            temperature=identity.temperature,
            teacher_head=None if teacher is None else teacher.head,
            teacher_tokens=_partial_mask(teacher),
        )
        self._teacher = teacher
        self._rounds, self._fresh_noise = rounds, fresh_noise
        bind(model, self.objective)
        args = args if args is not None else TrainingArguments("sparselogits-run")
        args.remove_unused_columns = False
        args.prediction_loss_only = True
        args.label_names = ["shift_labels"]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=others.pop("data_collator", collate),
            **others,
        )
        # the bound forward divides by the items of the whole accumulated batch
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = WindowOrder(len(dataset), seed, dataset.identity.fingerprint)
        return WindowSampler(order, rounds=self._rounds, fresh_noise=self._fresh_noise)

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
        """Log, with the KD and CE parts and the entries a position since the last line."""
        if "loss" in logs:
            logs = {**logs, **self.objective.take()}
        super().log(logs, *arguments, **options)


def _without_budget(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "budget"}


def _require_rounds(rounds: int | None, cached: int | None) -> None:
    if rounds is None:
        return
    if cached is None:
        raise InvalidArgumentError(
            f"rounds={rounds}: this cache's entries are not drawn in rounds and cannot be thinned"
        )
    if rounds < 1 or cached % rounds:
        divisors = [d for d in range(1, cached + 1) if cached % d == 0]
        raise InvalidArgumentError(
            f"rounds={rounds} does not divide the cache's {cached} rounds; choose one of {divisors}"
        )


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
