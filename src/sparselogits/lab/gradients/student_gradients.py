"""One student's gradients on a window: full distillation's and every target's, in five spaces.

See `gradients.py` for what is measured and what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sparselogits.causal_lm import Parts, agrees_with_model, split
from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.logit_gradients import LogitGradient, Positions
from sparselogits.lab.gradients.moments import Moments
from sparselogits.losses.targets import accumulation_dtype, place_missing_mass

Space = Literal["logits", "hidden", "summed logits", "summed hidden", "parameters"]


class Drawn(NamedTuple):
    """A target of the counted positions of a slice: ids int64 [P, K], weights float32 [P, K]."""

    ids: Tensor
    weights: Tensor


class Learner:
    """One student: its gradients on the window being read, and the batches they add up to."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        draws: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self.model, self.targets, self.draws = model, targets, draws
        self.parts = _require_parts(model)
        # leaves of their own over the student's storage: nothing of the student is touched
        trunk, head = self.parts.trunk, self.parts.head
        leaves: dict[Tensor, Tensor] = {}
        for parameter in (*trunk.parameters(), *head.parameters()):
            leaves.setdefault(parameter, parameter.detach().requires_grad_())
        self.trunk_leaves = {name: leaves[p] for name, p in trunk.named_parameters()}
        self.leaves = list(leaves.values())
        self.head_weight = leaves[head.weight]  # type: ignore[index]
        self.head_bias = None if head.bias is None else leaves[head.bias]  # type: ignore[index]
        self.levels = [Batches(size) for size in sizes]

    def begin(self, item: Mapping[str, Any]) -> None:
        """Run the trunk over a window."""
        device = self.parts.head.weight.device
        tokens = item["input_ids"].to(device)[None]
        positions = item.get("position_ids")
        was_training = self.model.training
        self.model.eval()
        with torch.enable_grad():
            if positions is None or int((positions == 0).sum()) == 1:
                states = self._run(input_ids=tokens)
            else:
                states = self.documents.run(self._run, tokens, positions[None])
        self.model.train(was_training)
        self.states: Tensor = states[0]
        head = self.parts.bound_head()
        dtype = accumulation_dtype(self.states.dtype)
        self.weight = head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        self.full = WindowGradient.empty(self.states, self.weight)
        self.own = [
            [WindowGradient.empty(self.states, self.weight) for _ in range(draws)]
            for draws in self.draws
        ]
        self.moments = [Moments.zero(draws) for draws in self.draws]

    @cached_property
    def documents(self) -> Documents:
        """How the student runs packed windows; probed when it is first asked for."""
        return Documents.probe(self.model, self._run)

    def _run(self, **inputs: Any) -> Tensor:
        arguments = {**inputs, "use_cache": False}
        output = functional_call(self.parts.trunk, self.trunk_leaves, (), arguments)
        states: Tensor = output.last_hidden_state
        return states

    @torch.no_grad()
    def take(
        self,
        part: slice,
        counted: Tensor,
        teacher_logits: Tensor,
        drawn: Sequence[Sequence[Drawn]],
        labels: Tensor,
    ) -> None:
        """Add the gradients of a slice of positions."""
        device, dtype = self.weight.device, self.weight.dtype
        rows = torch.arange(part.start, part.stop)[counted].to(device)
        states = self.states.detach()[rows].to(dtype)
        z = F.linear(states, self.weight, self.bias).mul_(self.parts.scale)
        logits = teacher_logits[counted.to(teacher_logits.device)].to(device, dtype)
        vocabulary = z.shape[1]
        if vocabulary < logits.shape[1]:
            raise InvalidArgumentError(
                f"the student's vocabulary has {vocabulary} ids, the teacher's {logits.shape[1]}; "
                "a student may have more ids than its teacher, not fewer"
            )
        p = F.pad(logits.softmax(1), (0, vocabulary - logits.shape[1]))
        here = Positions(z.softmax(1), p, states, self.weight, self.parts.scale)
        self.full.hidden[rows] = here.hidden_of_full()
        self.full.weight.add_(here.weight_of_full())
        self.full.logits.add_(here.sum_of_full())
        ones = torch.ones(len(rows), dtype=dtype, device=device)
        wanted = labels[counted].to(device)
        for index, (target, own) in enumerate(zip(self.targets, drawn, strict=True)):
            rule, alpha = target.missing_mass, target.alpha
            gradients = []
            for window, (ids, weights) in zip(self.own[index], own, strict=True):
                placed = place_missing_mass(
                    ids.to(device), weights.to(device), ones, wanted, rule, vocabulary
                )
                gradient = LogitGradient.of(placed, here.student).with_labels(wanted, alpha)
                window.hidden[rows] = here.hidden(gradient)
                here.weight_(gradient, window.weight)
                window.logits.add_(here.sum(gradient))
                gradients.append(gradient)
            self.moments[index] += here.moments(gradients)

    def end(self) -> None:
        """Hand the window's gradients to the batches, all parameters among them."""
        full = self.full
        self._add("summed logits", None, [full.logits])
        self._add("summed hidden", None, [full.hidden.sum(0)])
        self._add("parameters", None, [self._all_parameters(full)])
        for index, own in enumerate(self.own):
            hidden = Moments.of(full.hidden, [w.hidden for w in own])
            for level in self.levels:
                level.add_moments("logits", index, self.moments[index])
                level.add_moments("hidden", index, hidden)
            self._add("summed logits", index, [w.logits for w in own])
            self._add("summed hidden", index, [w.hidden.sum(0) for w in own])
            self._add("parameters", index, [self._all_parameters(w) for w in own])
        for level in self.levels:
            level.end_window()
        del self.states, self.full, self.own

    def _add(self, space: Space, target: int | None, vectors: list[Tensor]) -> None:
        for level in self.levels:
            level.add(space, target, vectors)

    def _all_parameters(self, window: WindowGradient) -> Tensor:
        """The gradient of every parameter in one vector, head and trunk."""
        gradients = torch.autograd.grad(
            self.states,
            self.leaves,
            window.hidden.to(self.states.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        pieces = []
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            own = torch.zeros_like(leaf) if gradient is None else gradient
            if leaf is self.head_weight:  # tied to the embedding, or not
                own = own + window.weight.to(own.dtype)
            elif leaf is self.head_bias:
                own = own + window.logits.to(own.dtype) * self.parts.scale
            pieces.append(own.flatten())
        return torch.cat(pieces)


@dataclass(frozen=True)
class WindowGradient:
    """A gradient on one window, summed over positions where it is not one a position.

    Args:
        hidden: [L, D], of the head's input.
        weight: [V, D], of the head's weight, by way of the logits alone.
        logits: [V].
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor

    @staticmethod
    def empty(states: Tensor, weight: Tensor) -> WindowGradient:
        """Zeros for the window with these states [L, D] and a head of this weight [V, D]."""
        zeros = torch.zeros(states.shape, dtype=weight.dtype, device=weight.device)
        return WindowGradient(zeros, torch.zeros_like(weight), weight.new_zeros(len(weight)))


@dataclass
class Batches:
    """Gradients added up over `size` consecutive windows, again and again.

    A batch's moments are taken as its last window's gradients arrive, so that no sum is kept
    longer than it is needed. The full gradient (target None) comes first.
    """

    size: int
    found: dict[tuple[Space, int], list[Moments]] = field(default_factory=dict)
    _done: int = 0
    _sums: dict[tuple[Space, int | None], list[Tensor]] = field(default_factory=dict)
    _moments: dict[tuple[Space, int], Moments] = field(default_factory=dict)
    _full: dict[Space, Tensor] = field(default_factory=dict)

    def add(self, space: Space, target: int | None, vectors: list[Tensor]) -> None:
        """A window's gradients, one a draw."""
        last = self._done == self.size - 1
        sums = self._sums.pop((space, target), None)
        if sums is None:
            sums = vectors if last else [v.clone() for v in vectors]
        else:
            for total, vector in zip(sums, vectors, strict=True):
                total += vector
        if not last:
            self._sums[space, target] = sums
        elif target is None:
            self._full[space] = sums[0]
        else:
            self._close(space, target, Moments.of(self._full[space], sums))

    def add_moments(self, space: Space, target: int, moments: Moments) -> None:
        """A window's moments, where positions stand side by side."""
        before = self._moments.pop((space, target), None)
        total = moments if before is None else before + moments
        if self._done == self.size - 1:
            self._close(space, target, total)
        else:
            self._moments[space, target] = total

    def end_window(self) -> None:
        """All of a window's gradients have been added."""
        self._done = (self._done + 1) % self.size
        self._full.clear()

    def _close(self, space: Space, target: int, moments: Moments) -> None:
        if moments.full == 0:
            raise InvalidArgumentError(
                "full distillation's gradient is zero: the student is its teacher, or no position "
                "of a batch has a label; measure another student or larger batches"
            )
        self.found.setdefault((space, target), []).append(moments)


def _require_parts(model: nn.Module) -> Parts:
    parts = split(model)
    if parts is None or not agrees_with_model(model, parts):
        raise InvalidArgumentError(
            f"{type(model).__name__}: head and trunk cannot be run apart, which gradients in "
            "hidden space need; measure a student with a plain linear head"
        )
    if parts.softcap is not None:
        raise InvalidArgumentError(
            f"{type(model).__name__} caps its logits at {parts.softcap}; gradients through a "
            "softcap are not measured: take a student without one"
        )
    return parts
