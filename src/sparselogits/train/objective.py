"""The loss, bound into a student's own forward.

`bind` gives one model instance a forward that runs the trunk and then the fused loss on the head's
weight. It has to happen inside the forward that DDP, FSDP2, autocast and torch.compile wrap: a
trunk called from outside, with the head's weight used beside it, skips DDP's gradient
synchronisation without an error.
"""

from __future__ import annotations

import types
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparselogits.causal_lm import Head, Parts, agrees_with_model, split, text_config
from sparselogits.data.dataset import IGNORE_INDEX
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.losses import (
    LossParts,
    MissingMass,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)

Method = Literal["ce", "sparse", "full"]


@dataclass
class Objective:
    """What a student is trained on.

    Args:
        method: "ce" (labels alone), "sparse" (cached targets) or "full" (the teacher's whole
            distribution, online).
        alpha: share of the labels' cross-entropy in the loss, in [0, 1].
        missing_mass: rule for biased targets, see `losses`.
        temperature: at which the teacher was sampled.
        teacher_head: for "full", the teacher's head; its hidden states come with each batch.
        teacher_tokens: for "full", bool [V], which ids are tokens.
    """

    method: Method
    alpha: float = 0.0
    missing_mass: MissingMass = "drop"
    temperature: float = 1.0
    teacher_head: Head | None = None
    teacher_tokens: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Loss parts summed since they were last taken, detached, on the device; for logging."""

    def note(self, parts: LossParts, positions: Tensor, entries: Tensor | None) -> None:
        """Add up what a log line will report, without waiting for the device."""
        values = {"kd": parts.kd, "ce": parts.ce, "positions": positions, "entries": entries}
        for name, value in values.items():
            if value is not None:
                value = value.detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, float]:
        """Means since the last call: `kd` and `ce` in nats a position, entries a position."""
        sums = {name: float(value) for name, value in self.sums.items()}
        self.sums.clear()
        positions = sums.pop("positions", 0.0)
        return {name: value / positions for name, value in sums.items()} if positions else {}


def bind(model: nn.Module, objective: Objective) -> None:
    """Give this instance of a student a forward that computes the objective.

    Called with `shift_labels`, the model returns a loss and no logits; otherwise it does what it
    always did. A model whose parts cannot be told apart computes its own logits first.
    """
    parts = split(model)
    routed = bool(getattr(text_config(model.config), "output_router_logits", False))
    if parts is not None and (routed or not agrees_with_model(model, parts)):
        parts = None  # a mixture of experts balances its router in its own forward
    if parts is None:
        warnings.warn(
            f"{type(model).__name__}: trunk and head cannot be run apart; the loss is computed on "
            "the model's own logits, which costs their memory",
            SparseLogitsWarning,
            stacklevel=2,
        )
    plain_forward = model.forward
    coefficient = float(getattr(text_config(model.config), "router_aux_loss_coef", 0.0))

    def forward(
        self: nn.Module,
        input_ids: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None or input_ids is None:
            return plain_forward(input_ids=input_ids, **inputs)
        return _loss_output(
            plain_forward, parts, objective, coefficient, input_ids, shift_labels, inputs
        )

    model.forward = types.MethodType(forward, model)


def _loss_output(
    plain_forward: Any,
    parts: Parts | None,
    objective: Objective,
    router_coefficient: float,
    input_ids: Tensor,
    labels: Tensor,
    inputs: dict[str, Any],
) -> CausalLMOutputWithPast:
    target_ids = inputs.pop("target_ids", None)
    target_weights = inputs.pop("target_weights", None)
    teacher_hidden = inputs.pop("teacher_hidden", None)
    num_items = inputs.pop("num_items_in_batch", None)
    inputs.pop("labels", None)
    aux = None
    if parts is not None:
        output = parts.trunk(input_ids=input_ids, use_cache=False, **inputs)
        states, head = output.last_hidden_state, parts.bound_head()
    else:
        output = plain_forward(input_ids=input_ids, use_cache=False, **inputs)
        states, head = output.logits, None
        aux = getattr(output, "aux_loss", None)
        if aux is not None:
            aux = aux * router_coefficient
    counted = labels != IGNORE_INDEX
    positions = counted.sum()
    if teacher_hidden is not None and torch.is_grad_enabled():
        found = _dense(objective, states, head, teacher_hidden, labels)
    else:
        distil = target_ids is not None and objective.method == "sparse"
        if not distil:
            target_ids = labels.new_zeros((*labels.shape, 0))
            target_weights = states.new_zeros((*labels.shape, 0), dtype=torch.float32)
        found = _sparse(objective, states, head, target_ids, target_weights, labels, distil)
    entries = None
    if target_weights is not None:
        entries = ((target_weights != 0) & counted[..., None]).sum()
    if torch.is_grad_enabled():
        objective.note(found, positions, entries)
    loss = found.loss / (positions.clamp_min(1) if num_items is None else num_items)
    if aux is not None:
        loss = loss + aux
    return CausalLMOutputWithPast(loss=loss)


def _sparse(
    objective: Objective,
    states: Tensor,
    head: Head | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor,
    distil: bool,
) -> LossParts:
    options: dict[str, Any] = {
        "labels": labels,
        "alpha": objective.alpha if distil else 1.0,
        "temperature": objective.temperature if distil else 1.0,
        "missing_mass": objective.missing_mass if distil else "drop",
        "reduction": "sum",
        "return_parts": True,
    }
    if head is None:
        return sparse_cross_entropy(states, ids, weights, **options)  # type: ignore[no-any-return]
    return linear_sparse_cross_entropy(  # type: ignore[no-any-return]
        states,
        head.weight,
        ids,
        weights,
        linear_bias=head.bias,
        logit_scale=head.scale,
        logit_softcap=head.softcap,
        **options,
    )


def _dense(
    objective: Objective, states: Tensor, head: Head | None, teacher_hidden: Tensor, labels: Tensor
) -> LossParts:
    taught = objective.teacher_head
    if head is None or taught is None:
        raise InvalidArgumentError(
            "full distillation needs a student and a teacher whose trunk and head can be run apart"
        )
    teacher = TeacherHead(
        teacher_hidden.flatten(0, 1),
        taught.weight,
        taught.bias,
        logit_softcap=taught.softcap,
        logit_scale=taught.scale,
        token_mask=objective.teacher_tokens,
    )
    return linear_dense_kd(
        states.flatten(0, 1),
        head.weight,
        teacher,
        labels=labels.flatten(),
        alpha=objective.alpha,
        linear_bias=head.bias,
        logit_softcap=head.softcap,
        logit_scale=head.scale,
        temperature=objective.temperature,
        reduction="sum",
    )
