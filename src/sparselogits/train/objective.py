"""The loss, bound into a student's own forward.

`bind` gives one model instance a forward that runs the trunk and then the fused loss on the head's
weight. It has to happen inside the forward that DDP, FSDP2, autocast and torch.compile wrap: a
trunk called from outside, with the head's weight used beside it, skips DDP's gradient
synchronisation without an error.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparselogits.causal_lm import Head, Parts, agrees_with_model, split
from sparselogits.data.dataset import IGNORE_INDEX
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.losses import (
    Divergence,
    LossParts,
    MissingMass,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)
from sparselogits.train.meter import LossMeter
from sparselogits.train.router import BalancingLoss, balances_experts, balancing_loss, coefficient

Method = Literal["ce", "sparse", "full", "reverse_kl"]

DIVERGENCES: dict[Method, Divergence] = {"full": "forward_kl", "reverse_kl": "reverse_kl"}
"""Methods with the teacher online, and what they minimise."""


@dataclass
class Objective:
    """What a student is trained on.

    Args:
        method: "ce" (labels alone), "sparse" (cached targets), "full" (the teacher's whole
            distribution, online) or "reverse_kl" (the same, KL(student || teacher) as in MiniLLM).
        alpha: share of the labels' cross-entropy in the loss, in [0, 1].
        missing_mass: rule for biased targets, see `losses`.
        temperature: at which the teacher was sampled.
        unbiased: whether the targets are, so that a KL can be reported.
        teacher_head: with the teacher online, its head; its hidden states come with each batch.
        teacher_tokens: likewise, bool [V], which ids are tokens.
    """

    method: Method
    alpha: float = 0.0
    missing_mass: MissingMass = "drop"
    temperature: float = 1.0
    unbiased: bool = True
    teacher_head: Head | None = None
    teacher_tokens: Tensor | None = None
    training: LossMeter = field(default_factory=LossMeter)
    """Figures of training since the last log line."""
    evaluation: LossMeter = field(default_factory=LossMeter)
    """Figures of an evaluation."""


class _Wiring(NamedTuple):
    """A student, ready to compute an objective: parts and balancing are None where not told."""

    plain_forward: Callable[..., Any]
    parts: Parts | None
    balancing: BalancingLoss | None
    router_coefficient: float
    objective: Objective


def bind(model: nn.Module, objective: Objective) -> None:
    """Give this instance of a student a forward that computes the objective.

    Called with `shift_labels`, the model returns a loss and no logits: the objective where
    gradients are recorded, the labels' cross-entropy where they are not (evaluation). Otherwise it
    does what it always did. A model whose parts cannot be told apart computes its own logits first.
    """
    parts = split(model)
    if parts is not None and not agrees_with_model(model, parts):
        parts = None
    balancing = None
    if parts is not None and balances_experts(model):
        balancing = balancing_loss(model, parts)
        if balancing is None:
            parts = None  # the router is balanced in the model's own forward only
    if parts is None:
        warnings.warn(
            f"{type(model).__name__}: trunk and head cannot be run apart; the loss is computed on "
            "the model's own logits, which costs their memory",
            SparseLogitsWarning,
            stacklevel=2,
        )
    wiring = _Wiring(model.forward, parts, balancing, coefficient(model), objective)

    def forward(
        self: nn.Module,
        input_ids: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None or input_ids is None:
            return wiring.plain_forward(input_ids=input_ids, **inputs)
        return _loss_output(wiring, input_ids, shift_labels, inputs)

    model.forward = types.MethodType(forward, model)


def _loss_output(
    wiring: _Wiring, input_ids: Tensor, labels: Tensor, inputs: dict[str, Any]
) -> CausalLMOutputWithPast:
    objective = wiring.objective
    target_ids = inputs.pop("target_ids", None)
    target_weights = inputs.pop("target_weights", None)
    teacher_hidden = inputs.pop("teacher_hidden", None)
    entropy = inputs.pop("teacher_entropy", None)
    num_items = inputs.pop("num_items_in_batch", None)
    inputs.pop("labels", None)
    states, head, aux = _run(wiring, input_ids, inputs)
    training = torch.is_grad_enabled()
    counted = labels != IGNORE_INDEX
    positions = counted.sum()
    online = teacher_hidden is not None and training
    distil = not online and target_ids is not None and objective.method == "sparse"
    if online:
        found = _dense(objective, states, head, teacher_hidden, labels)
    else:
        if not distil:
            target_ids = labels.new_zeros((*labels.shape, 0))
            target_weights = states.new_zeros((*labels.shape, 0), dtype=torch.float32)
        found = _sparse(objective, states, head, target_ids, target_weights, labels, distil)
    known = distil and objective.unbiased and entropy is not None
    meter = objective.training if training else objective.evaluation
    meter.add(
        kd=found.kd if distil or online else None,
        ce=found.ce,
        entropy=(entropy * counted.sum(-1)).sum() if known else None,
        entries=((target_weights != 0) & counted[..., None]).sum() if distil else None,
        positions=positions,
        tokens=labels.numel(),
    )
    loss = found.loss if training or found.ce is None else found.ce
    items = positions if num_items is None else torch.as_tensor(num_items)
    items = torch.where(items == 0, 1, items)  # a batch of prompts alone has nothing to learn
    loss = loss / items
    if aux is not None:  # over micro-batches and ranks a mean, weighted as the loss is
        loss = loss + aux * (positions / items)
    return CausalLMOutputWithPast(loss=loss)


def _run(
    wiring: _Wiring, input_ids: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Head | None, Tensor | None]:
    """Hidden states and head, or logits and None; and a mixture's auxiliary loss."""
    if wiring.parts is None:
        output = wiring.plain_forward(input_ids=input_ids, use_cache=False, **inputs)
        aux = getattr(output, "aux_loss", None)
        return output.logits, None, None if aux is None else aux * wiring.router_coefficient
    routed = {} if wiring.balancing is None else {"output_router_logits": True}
    output = wiring.parts.trunk(input_ids=input_ids, use_cache=False, **routed, **inputs)
    aux = None
    if wiring.balancing is not None:
        aux = wiring.balancing(output, inputs.get("attention_mask"))
    return output.last_hidden_state, wiring.parts.bound_head(), aux


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
            "distillation with the teacher online needs a student and a teacher whose trunk and "
            "head can be run apart"
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
        divergence=DIVERGENCES[objective.method],
        labels=labels.flatten(),
        alpha=objective.alpha,
        linear_bias=head.bias,
        logit_softcap=head.softcap,
        logit_scale=head.scale,
        temperature=objective.temperature,
        reduction="sum",
    )
