"""Compute one student's gradients on a window: full distillation's and every target's.

Each target's gradient with respect to the logits is that of the library's own loss, by autograd.
See `measure.py` for the five spaces that it is taken to, and for the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.moments import Moments
from sparselogits.language_model import Parts, split
from sparselogits.losses import Criterion, sparse_cross_entropy
from sparselogits.losses.targets import accumulation_dtype

Space = Literal["logits", "hidden", "summed logits", "summed hidden", "parameters"]


class Drawn(NamedTuple):
    """Hold one draw of a target at the counted positions of a slice.

    Attributes:
        ids: int64 [P, K].
        weights: float32 [P, K].
    """

    ids: Tensor
    weights: Tensor


class Learner:
    """Compute one student's gradients on the current window and add them up over batches."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        draws: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self.model, self.targets, self.draws = model, targets, draws
        self.parts = _require_parts(model)
        # separate leaves over the student's storage, so that the student has no gradients after
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
        """How the student runs packed windows; probed on first use."""
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
        wanted = labels[counted].to(device)

        def add(gradient: Tensor, window: WindowGradient) -> None:
            window.hidden[rows] = (gradient @ self.weight).mul_(self.parts.scale)
            window.weight.addmm_(gradient.T, states, alpha=self.parts.scale)
            window.logits.add_(gradient.sum(0))

        def formed(target: Target, draws: Sequence[Drawn], index: int) -> Iterator[Tensor]:
            criterion = Criterion(target.alpha, target.missing_mass, reduction="sum")
            for window, (ids, weights) in zip(self.own[index], draws, strict=True):
                with torch.enable_grad():
                    loss = sparse_cross_entropy(
                        z.requires_grad_(),
                        ids.to(device),
                        weights.to(device),
                        labels=wanted,
                        criterion=criterion,
                    )
                (gradient,) = torch.autograd.grad(loss, z)
                add(gradient, window)
                yield gradient

        full = z.softmax(1)
        full[:, : logits.shape[1]] -= logits.softmax(1)
        add(full, self.full)
        for index, (target, draws) in enumerate(zip(self.targets, drawn, strict=True)):
            self.moments[index] += Moments.of(full, formed(target, draws, index))

    def end(self) -> None:
        """Add the window's gradients, including those of all parameters, to the batches."""
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
        """Return the gradient of every parameter, of head and trunk, in one vector."""
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
    """Hold a gradient on one window.

    Args:
        hidden: [L, D], with respect to the head's input, per position.
        weight: [V, D], with respect to the head's weight, summed over positions; without the
            contribution of a tied embedding.
        logits: [V], with respect to the logits, summed over positions.
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor

    @staticmethod
    def empty(states: Tensor, weight: Tensor) -> WindowGradient:
        """Return zeros for a window with these states [L, D] and a head of this weight [V, D]."""
        zeros = torch.zeros(states.shape, dtype=weight.dtype, device=weight.device)
        return WindowGradient(zeros, torch.zeros_like(weight), weight.new_zeros(len(weight)))


@dataclass
class Batches:
    """Add up gradients over batches of `size` consecutive windows.

    The moments of a batch are computed when the gradients of its last window are added, so no sum
    is kept longer than needed. The full gradient (target None) must be added first.
    """

    size: int
    found: dict[tuple[Space, int], list[Moments]] = field(default_factory=dict)
    _done: int = 0
    _sums: dict[tuple[Space, int | None], list[Tensor]] = field(default_factory=dict)
    _moments: dict[tuple[Space, int], Moments] = field(default_factory=dict)
    _full: dict[Space, Tensor] = field(default_factory=dict)

    def add(self, space: Space, target: int | None, vectors: list[Tensor]) -> None:
        """Add a window's gradients, one per draw."""
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
        """Add a window's moments, for spaces in which positions are kept side by side."""
        before = self._moments.pop((space, target), None)
        total = moments if before is None else before + moments
        if self._done == self.size - 1:
            self._close(space, target, total)
        else:
            self._moments[space, target] = total

    def end_window(self) -> None:
        """Note that all gradients of a window have been added."""
        self._done = (self._done + 1) % self.size
        self._full.clear()

    def _close(self, space: Space, target: int, moments: Moments) -> None:
        if moments.full == 0:
            raise InvalidArgumentError(
                "full distillation's gradient is zero: the student equals its teacher, or no "
                "position of a batch has a label; measure another student or larger batches"
            )
        self.found.setdefault((space, target), []).append(moments)


def _require_parts(model: nn.Module) -> Parts:
    parts = split(model)
    if parts is None:
        raise InvalidArgumentError(
            f"{type(model).__name__}: head and trunk cannot be run separately, which gradients in "
            "hidden space need; measure a student with a plain linear head"
        )
    if parts.softcap is not None:
        raise InvalidArgumentError(
            f"{type(model).__name__} caps its logits at {parts.softcap}, and gradients through a "
            "softcap are not measured; measure a student without one"
        )
    return parts
