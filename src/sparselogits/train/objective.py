"""Compute the loss inside a student's own forward.

`bind` replaces the forward of one model instance by one that runs the trunk and then the fused loss
on the head's weight. The loss is computed inside the forward that DDP, FSDP2, autocast and
torch.compile wrap; outside it, DDP would silently skip the synchronisation of gradients.
"""

from __future__ import annotations

import copyreg
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from inspect import unwrap
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.language_model import Head, Parts, recording_last_states, split
from sparselogits.losses import (
    Criterion,
    LossParts,
    MissingMass,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)
from sparselogits.methods import METHODS
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.positions import positions_explained
from sparselogits.train.meter import LossMeter
from sparselogits.train.router import BalancingLoss, balances_experts, balancing_loss, coefficient


@dataclass
class Objective:
    """Loss that a student is trained with, and the meters that accumulate its metrics.

    Args:
        method: name of a training method, see `methods.METHODS`.
        beta: share of the teacher in the mixture, for a divergence that uses a mixture; None for
            the default.
        alpha: share of the labels' cross-entropy in the loss, in [0, 1].
        missing_mass: rule for the probability mass that biased targets lack, see `losses`.
        temperature: temperature at which the teacher was sampled.
        unbiased: whether the targets are unbiased, so that a KL divergence can be reported.
        teacher_head: head of the online teacher, whose hidden states are then in each training
            batch; None without an online teacher.
        teacher_tokens: mask of the online teacher's ids that are tokens, bool [V]; None if all ids
            are tokens.
        label_smoothing: share of the uniform distribution in the labels' part of the loss.
        cosine: weight of the mean of 1 - cosine between the last hidden states of student and
            online teacher, over all positions that are not padding.
        with_logits: whether evaluation returns the student's logits too.
        masked: whether the student is a masked language model. Few of its positions have a label,
            and only these are multiplied by the head.
    """

    method: str
    beta: float | None = None
    alpha: float = 0.0
    missing_mass: MissingMass = "drop"
    temperature: float = 1.0
    unbiased: bool = True
    teacher_head: Head | None = None
    teacher_tokens: Tensor | None = None
    label_smoothing: float = 0.0
    cosine: float = 0.0
    with_logits: bool = False
    masked: bool = False
    training: LossMeter = field(default_factory=LossMeter)
    """Metrics of training since the last log line."""
    evaluation: LossMeter = field(default_factory=LossMeter)
    """Metrics of the current evaluation since its start."""


@dataclass(frozen=True)
class Wiring:
    """Modules and functions with which a student computes an objective.

    Args:
        objective: the objective.
        trunk: name of the trunk among the student's modules; None if the loss is computed on the
            logits of the student's own forward.
        head: name of the head among the student's modules; None if `trunk` is None.
        parts: trunk and head of the student; None if `trunk` is None.
        balancing: function that computes the load-balancing loss of a mixture of experts; None if
            the model has no such loss, or if the student's own forward computes the loss.
        router_coefficient: coefficient of the load-balancing loss.
        documents: method of running packed windows whose attention restarts at document borders.
    """

    objective: Objective
    trunk: str | None
    head: str | None
    parts: Parts | None
    balancing: BalancingLoss | None
    router_coefficient: float
    documents: Documents

    def parts_of(self, model: nn.Module) -> Parts | None:
        """Return the trunk and the head of a model, found by name; None if `trunk` is None.

        Args:
            model: the bound student, or a copy or replica whose modules differ from `parts`.
        """
        if self.parts is None or self.trunk is None or self.head is None:
            return None
        trunk, head = model.get_submodule(self.trunk), model.get_submodule(self.head)
        return replace(self.parts, trunk=trunk, head=head)


def bind(model: nn.Module, objective: Objective) -> Wiring:
    """Replace the forward of one model instance by one that computes the objective.

    Called with `input_ids` and `shift_labels`, the model returns a loss: the objective if gradients
    are recorded, otherwise the labels' cross-entropy (evaluation), with logits only if the
    objective has `with_logits`. Other calls are unchanged. The class of the model is replaced by a
    subclass of the same name; copies and pickles have the original class. If trunk and head cannot
    be run separately, the loss is computed on the logits of the model's forward, with a warning.

    Returns:
        The wiring, with which `attach` binds the model again after `unbind`.
    """
    unbind(model)
    parts = split(model)
    names = {id(module): name for name, module in model.named_modules()}
    if parts is not None and not {id(parts.trunk), id(parts.head)} <= names.keys():
        parts = None
    balancing = None
    if parts is not None and balances_experts(model):
        balancing = balancing_loss(model, parts)
        if balancing is None:
            parts = None  # only the model's own forward balances the router
    if parts is None:
        warnings.warn(
            f"{type(model).__name__}: trunk and head cannot be run separately, so the loss is "
            "computed on the logits of all positions, which take more memory. If memory runs out, "
            "use smaller batches",
            SparseLogitsWarning,
            stacklevel=2,
        )
    plain = model.forward

    def run(**given: Any) -> Tensor:
        if parts is None:
            logits: Tensor = plain(use_cache=False, **given).logits
            return logits
        return parts.states(**given)

    wiring = Wiring(
        objective,
        trunk=None if parts is None else names[id(parts.trunk)],
        head=None if parts is None else names[id(parts.head)],
        parts=parts,
        balancing=balancing,
        router_coefficient=coefficient(model),
        documents=Documents.probe(model, run),
    )
    attach(model, wiring)
    return wiring


def attach(model: nn.Module, wiring: Wiring) -> None:
    """Replace the forward of a student as `bind` does, given the wiring that `bind` returns.

    Args:
        model: the student.
        wiring: wiring of the student.
    """
    if not isinstance(model, _Bound):
        model.__class__ = _bound_class(type(model))  # type: ignore[arg-type]
    model.__dict__[_WIRING] = wiring
    own = model.__dict__.get("forward")  # set by a library that patches one instance
    if own is not None and not _computes(own):
        function = getattr(own, "__func__", None) or _without_self(own)
        model.__dict__[_PATCHED] = own
        model.__dict__["forward"] = types.MethodType(_computing(function), model)


def unbind(model: nn.Module) -> None:
    """Undo `bind` or `attach`; a model that is not bound is not changed."""
    if isinstance(model, _Bound):
        model.__dict__.pop(_WIRING, None)
        if _PATCHED in model.__dict__:
            model.__dict__["forward"] = model.__dict__.pop(_PATCHED)
        if _PLAIN in vars(type(model)):  # else another library, such as FSDP2, has subclassed it
            model.__class__ = vars(type(model))[_PLAIN]


_WIRING, _PATCHED = "_sparselogits_wiring", "_sparselogits_patched_forward"
_PLAIN, _MARK = "_sparselogits_plain_class", "_sparselogits_computes_objective"


class _Bound:
    """Base of the classes of bound students; copies and pickles have the original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the state with which `copy` and `pickle` restore the original class."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, state, *others = reduced
        plain = getattr(type(self), _PLAIN)
        if function is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            # pickle accepts `__newobj__` with the class of the instance only
            function, arguments = object.__new__, (plain, *arguments[1:])
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if k not in (_WIRING, _PATCHED)}
            if _PATCHED in self.__dict__:
                state["forward"] = self.__dict__[_PATCHED]
        return (function, arguments, state, *others)


@cache
def _bound_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `plain`, with the same name, whose forward computes the objective.

    A function set on an instance instead would remain bound to the original in copies and replicas.
    """
    return type(
        plain.__name__,
        (_Bound, plain),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "forward": _computing(plain.forward),
            _PLAIN: plain,
        },
    )


def _computing(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that computes the objective for labels, or calls `plain`.

    `plain` is called if the model is not bound, or `shift_labels` or `input_ids` is missing.

    The result has the signature of `plain`, which transformers inspects, for example to decide
    whether to pass an attention mask.
    """

    @wraps(plain)
    def forward(self: nn.Module, *arguments: Any, **inputs: Any) -> Any:
        wiring = self.__dict__.get(_WIRING)
        if wiring is None or inputs.get("shift_labels") is None:
            return plain(self, *arguments, **inputs)
        if arguments:
            inputs["input_ids"] = arguments[0]
        if inputs.get("input_ids") is None:
            return plain(self, **inputs)
        return _loss_output(self, plain, wiring, inputs)

    setattr(forward, _MARK, True)
    return forward


def _computes(function: Callable[..., Any]) -> bool:
    """Return whether a forward is a result of `_computing`, possibly wrapped (by accelerate)."""
    innermost = unwrap(function, stop=lambda f: getattr(f, _MARK, False))
    return getattr(innermost, _MARK, False)


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def forward(_: nn.Module, *arguments: Any, **inputs: Any) -> Any:
        return function(*arguments, **inputs)

    return forward


def _loss_output(
    model: nn.Module, plain: Callable[..., Any], wiring: Wiring, inputs: dict[str, Any]
) -> CausalLMOutputWithPast:
    objective = wiring.objective
    labels = inputs.pop("shift_labels")
    target_ids = inputs.pop("target_ids", None)
    target_weights = inputs.pop("target_weights", None)
    teacher_hidden = inputs.pop("teacher_hidden", None)
    teacher_states = inputs.pop("teacher_states", None)
    entropy = inputs.pop("teacher_entropy", None)
    num_items = inputs.pop("num_items_in_batch", None)
    window_weight = inputs.pop("loss_weight", None)
    inputs.pop("labels", None)
    with positions_explained(model, labels.shape[1]):
        states, head, aux, last = _run(model, plain, wiring, inputs)
    if states.shape[:2] != labels.shape:
        raise InvalidArgumentError(
            f"the student returned {tuple(states.shape[:2])} positions for {tuple(labels.shape)} "
            "labels: the student adds or removes positions (as prompt tuning does), but each "
            "position needs a target; train with LoRA, or train all weights"
        )
    training = torch.is_grad_enabled()
    counted = labels != IGNORE_INDEX
    mask = inputs.get("attention_mask")
    labelled, whole = counted.sum(), states
    positions = labelled  # or their weights
    tokens = labels.numel() if mask is None else mask.sum()  # without padding
    weight = None
    if window_weight is not None and training:
        weight = window_weight[:, None].expand_as(labels)
        positions = (weight * counted).sum()
        num_items = tokens if num_items is None else num_items
    entropy = None if entropy is None else entropy[:, None].expand_as(labels)
    if objective.masked:
        rows = counted.clone()
        rows[0, 0] = True  # at least one row, which adds nothing where it has no label
        states, labels, counted = states[rows], labels[rows], counted[rows]
        target_ids, target_weights, teacher_hidden, weight, entropy = (
            None if value is None else value[rows]
            for value in (target_ids, target_weights, teacher_hidden, weight, entropy)
        )
    online = teacher_hidden is not None and training
    distil = not online and target_ids is not None and METHODS[objective.method].cached
    criterion = Criterion(
        alpha=objective.alpha if distil or online else 1.0,
        missing_mass=objective.missing_mass if distil else "drop",
        temperature=objective.temperature if distil or online else 1.0,
        logit_scale=1.0 if head is None else head.scale,
        logit_softcap=None if head is None else head.softcap,
        reduction="sum",
    )
    if online:
        found = _dense(objective, states, head, teacher_hidden, labels, weight, criterion)
    else:
        if not distil:
            target_ids = labels.new_zeros((*labels.shape, 0))
            target_weights = states.new_zeros((*labels.shape, 0), dtype=torch.float32)
        found = _sparse(states, head, target_ids, target_weights, labels, weight, criterion)
    known = distil and objective.unbiased and entropy is not None
    cosine = None
    if online and objective.cosine and last is not None:
        cosine = _cosine_distance(last, teacher_states, mask)
    meter = objective.training if training else objective.evaluation
    meter.add(
        kd=found.kd if distil or online else None,
        ce=found.ce,
        cosine=None if cosine is None else cosine * positions,
        entropy=(entropy * counted * (1 if weight is None else weight)).sum() if known else None,
        entries=((target_weights != 0) & counted[..., None]).sum() if distil else None,
        positions=positions,
        labelled=labelled,
        tokens=tokens,
    )
    loss = found.loss if training or found.ce is None else found.ce
    if training and objective.label_smoothing and criterion.alpha:
        surplus = _label_surplus(states, head, labels, counted, weight)
        loss = loss + criterion.alpha * objective.label_smoothing * surplus
    items = positions if num_items is None else torch.as_tensor(num_items)
    items = items.reshape(())  # nn.DataParallel passes each replica a tensor of shape [1]
    items = torch.where(items == 0, 1, items)  # a batch may have no label
    loss = loss / items
    # means over a batch are averaged over micro-batches and ranks like the loss, by positions
    if aux is not None:
        loss = loss + aux * (positions / items)
    if cosine is not None:
        loss = loss + objective.cosine * cosine * (positions / items)
    logits = None
    if objective.with_logits and not training:
        logits = whole if head is None else head(whole)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def _cosine_distance(student: Tensor, teacher: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mean of 1 - cosine over positions that are not padding (DistilBERT's `loss_cos`).

    `student` and `teacher` are last hidden states [B, L, D]; the mask [B, L] is 0 at padding.
    """
    distances = 1 - nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
    if attention_mask is None:
        return distances.mean()
    return (distances * attention_mask).sum() / attention_mask.sum()


def _label_surplus(
    states: Tensor, head: Head | None, labels: Tensor, counted: Tensor, weight: Tensor | None
) -> Tensor:
    """Return the weighted sum of (label's logit - mean logit) over positions with a label.

    With label smoothing e, cross-entropy to (1 - e) * label + e * uniform exceeds cross-entropy to
    the label by e times this sum, because both have the same log-partition.
    """
    rows, taken = states[counted], labels[counted]
    weights = 1.0 if weight is None else weight[counted]
    if head is None or head.softcap is not None:
        logits = rows.float()
        if head is not None:
            logits = nn.functional.linear(rows, head.weight, head.bias).float() * head.scale
            logits = head.softcap * (logits / head.softcap).tanh()  # type: ignore[operator]
        return ((logits.gather(1, taken[:, None])[:, 0] - logits.mean(-1)) * weights).sum()
    difference = head.weight[taken] - head.weight.mean(0)
    surplus = (rows.float() * difference.float()).sum(-1)
    if head.bias is not None:
        surplus = surplus + (head.bias[taken] - head.bias.mean()).float()
    return (surplus * weights).sum() * head.scale


def _run(
    model: nn.Module, plain: Callable[..., Any], wiring: Wiring, inputs: dict[str, Any]
) -> tuple[Tensor, Head | None, Tensor | None, Tensor | None]:
    """Run a bound student without its loss.

    Returns:
        Hidden states [B, L, D] (logits [B, L, V] if trunk and head cannot be run separately), the
        head (None with logits), the load-balancing loss of a mixture of experts, multiplied by its
        coefficient (or None), and the last hidden states [B, L, D] for the cosine loss (None
        without trunk or cosine loss).
    """
    inputs["use_cache"] = False
    parts = wiring.parts_of(model)
    aux: list[Tensor | None] = []

    def run(**given: Any) -> Tensor:
        if parts is None or parts.in_model:
            with nullcontext() if parts is None else parts.without_product():
                output = plain(model, **given)
            own = getattr(output, "aux_loss", None)
            aux.append(None if own is None else own * wiring.router_coefficient)
            logits: Tensor = output.logits
            return logits
        routed = {} if wiring.balancing is None else {"output_router_logits": True}
        output = parts.trunk(**routed, **given)
        if wiring.balancing is not None:
            aux.append(wiring.balancing(output, given.get("attention_mask")))
        return output.last_hidden_state  # type: ignore[no-any-return]

    compares = wiring.objective.cosine > 0 and parts is not None
    of_base = compares and parts is not None and parts.in_model
    recording: AbstractContextManager[list[Tensor]] = nullcontext([])
    if of_base:
        recording = recording_last_states(model)
    with recording as recorded:
        states = _run_documents(model, run, wiring, inputs)
    last = recorded[0] if of_base else states if compares else None
    head = None if parts is None else parts.bound_head()
    return states, head, aux[0] if aux else None, last


def _run_documents(
    model: nn.Module, run: Callable[..., Tensor], wiring: Wiring, inputs: dict[str, Any]
) -> Tensor:
    """Run the windows of a batch; attention restarts where `position_ids` restart at 0."""
    positions = inputs.get("position_ids")
    if positions is not None and int((positions == 0).sum()) > len(positions):
        del inputs["position_ids"]
        # one call, if other ranks expect the same number or experts are balanced over each call
        experts = balances_experts(model)
        together = experts or (dist.is_initialized() and dist.get_world_size() > 1)
        ids = inputs.pop("input_ids")
        return wiring.documents.run(
            run, ids, positions, one_call=together, mask_padding=experts, **inputs
        )
    return run(**inputs)


def _sparse(
    states: Tensor,
    head: Head | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor,
    position_weights: Tensor | None,
    criterion: Criterion,
) -> LossParts:
    given: dict[str, Any] = {"position_weights": position_weights, "criterion": criterion}
    if head is None:
        return sparse_cross_entropy(states, ids, weights, labels=labels, return_parts=True, **given)
    return linear_sparse_cross_entropy(
        *(states, head.weight, ids, weights),
        labels=labels,
        linear_bias=head.bias,
        return_parts=True,
        **given,
    )


def _dense(
    objective: Objective,
    states: Tensor,
    head: Head | None,
    teacher_hidden: Tensor,
    labels: Tensor,
    position_weights: Tensor | None,
    criterion: Criterion,
) -> LossParts:
    taught = objective.teacher_head
    divergence = METHODS[objective.method].divergence
    if head is None or taught is None or divergence is None:
        raise InvalidArgumentError(
            "the trunk and head of the student or the teacher cannot be run separately, which "
            "distillation with the teacher online needs: use other models, or a method without the "
            "teacher"
        )
    teacher = TeacherHead(
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        taught.weight,
        taught.bias,
        logit_softcap=taught.softcap,
        logit_scale=taught.scale,
        token_mask=objective.teacher_tokens,
    )
    return linear_dense_kd(
        states.reshape(-1, states.shape[-1]),
        head.weight,
        teacher,
        divergence=divergence,
        beta=objective.beta,
        labels=labels.flatten(),
        position_weights=None if position_weights is None else position_weights.flatten(),
        linear_bias=head.bias,
        criterion=criterion,
    )
