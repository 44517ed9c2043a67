"""Compute the gradients of full distillation and of all targets for one student.

The gradient of a target with respect to the logits is computed by autograd from the library's loss.
The docstring of `measure.py` describes the five spaces of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.passes import require_ids
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.moments import Moments
from sparselogits.language_model import Parts, in_eval_mode, split
from sparselogits.losses import Criterion, sparse_cross_entropy
from sparselogits.losses.targets import accumulation_dtype

Space = Literal["logits", "hidden", "summed logits", "summed hidden", "parameters"]
"""Name of a space of gradients, see `measure.py`."""


class Drawn(NamedTuple):
    """One draw of a target at the P positions of a slice that have a label.

    Args:
        ids: vocabulary ids, int64 [P, K].
        weights: weights of the ids, float32 [P, K]; 0 for padding.
    """

    ids: Tensor
    weights: Tensor


class StudentGradients:
    """Gradients of a student, computed window by window and added up over batches.

    For each window, call `begin`, then `add_slice` for each slice of positions, then `end`.

    Args:
        model: the student.
        targets: targets whose gradients are computed.
        draws: number of draws of each target.
        sizes: batch sizes in windows.

    Raises:
        InvalidArgumentError: If trunk and head cannot be run separately, or logits are capped.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        draws: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self.model, self.targets, self.draws = model, targets, draws
        self.parts = _require_parts(model)
        # gradients are computed for views of the parameters, so that the student's stay unset
        trunk, head = self.parts.trunk, self.parts.head
        leaves: dict[Tensor, Tensor] = {}
        for parameter in (*trunk.parameters(), *head.parameters()):
            leaves.setdefault(parameter, parameter.detach().requires_grad_())
        self.trunk_leaves = {name: leaves[p] for name, p in trunk.named_parameters()}
        self.leaves = list(leaves.values())
        self.head_weight = leaves[head.weight]  # type: ignore[index]
        self.head_bias = None if head.bias is None else leaves[head.bias]  # type: ignore[index]
        self.batches = [Batches(size) for size in sizes]

    def begin(self, item: Mapping[str, Any]) -> None:
        """Run the trunk over a window of a `TextDataset`."""
        device = self.parts.head.weight.device
        tokens = item["input_ids"].to(device)[None]
        positions = item.get("position_ids")
        with torch.enable_grad(), in_eval_mode(self.model):
            if positions is None or int((positions == 0).sum()) == 1:
                states = self._run(input_ids=tokens)
            else:
                states = self.documents.run(self._run, tokens, positions[None])
        self.states: Tensor = states[0]
        self.window_weight = float(item.get("loss_weight", 1.0))  # of masked diffusion
        head = self.parts.bound_head()
        dtype = accumulation_dtype(self.states.dtype)
        self.weight = head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        self.full = WindowGradient.zeros(self.states, self.weight)
        self.of_targets = [
            [WindowGradient.zeros(self.states, self.weight) for _ in range(draws)]
            for draws in self.draws
        ]
        self.moments = [Moments.zero(draws) for draws in self.draws]

    @cached_property
    def documents(self) -> Documents:
        """Method by which the student separates packed documents, probed at the first access."""
        return Documents.probe(self.model, self._run)

    def _run(self, **inputs: Any) -> Tensor:
        arguments = {**inputs, "use_cache": False}
        trunk, in_model = self.parts.trunk, self.parts.in_model
        with self.parts.without_product() if in_model else nullcontext():
            output = functional_call(trunk, self.trunk_leaves, (), arguments)
        states: Tensor = output.logits if in_model else output.last_hidden_state
        return states

    @torch.no_grad()
    def add_slice(
        self,
        positions: Tensor,
        teacher_logits: Tensor,
        drawn: Sequence[Sequence[Drawn]],
        labels: Tensor,
    ) -> None:
        """Add the gradients of P positions.

        Args:
            positions: indices of positions of the window, int64 [P].
            teacher_logits: the teacher's logits at these positions, [P, V].
            drawn: draws of each target at these positions.
            labels: token that each position predicts, int64 [P].
        """
        device, dtype = self.weight.device, self.weight.dtype
        rows = positions.to(device)
        states = self.states.detach()[rows].to(dtype)
        z = F.linear(states, self.weight, self.bias).mul_(self.parts.scale)
        logits = teacher_logits.to(device, dtype)
        require_ids(z.shape[1], logits.shape[1])
        true_tokens = labels.to(device)

        def add(gradient: Tensor, window: WindowGradient) -> None:
            window.hidden[rows] = (gradient @ self.weight).mul_(self.parts.scale)
            window.weight.addmm_(gradient.T, states, alpha=self.parts.scale)
            window.logits.add_(gradient.sum(0))

        def gradients(target: Target, draws: Sequence[Drawn], index: int) -> Iterator[Tensor]:
            criterion = Criterion(target.alpha, target.missing_mass, reduction="sum")
            for window, (ids, weights) in zip(self.of_targets[index], draws, strict=True):
                with torch.enable_grad():
                    loss = sparse_cross_entropy(
                        z.requires_grad_(),
                        ids.to(device),
                        weights.to(device),
                        labels=true_tokens,
                        criterion=criterion,
                    )
                (gradient,) = torch.autograd.grad(loss, z)
                gradient *= self.window_weight
                add(gradient, window)
                yield gradient

        full = z.softmax(1)
        full[:, : logits.shape[1]] -= logits.softmax(1)
        full *= self.window_weight
        add(full, self.full)
        for index, (target, draws) in enumerate(zip(self.targets, drawn, strict=True)):
            self.moments[index] += Moments.of(full, gradients(target, draws, index))

    def end(self) -> None:
        """Compute the gradient of all parameters, and add all gradients to the batches."""
        full = self.full
        self._add_sums(None, [full])
        for index, drawn in enumerate(self.of_targets):
            hidden = Moments.of(full.hidden, [w.hidden for w in drawn])
            for batches in self.batches:
                batches.add_moments("logits", index, self.moments[index])
                batches.add_moments("hidden", index, hidden)
            self._add_sums(index, drawn)
        for batches in self.batches:
            batches.end_window()
        del self.states, self.full, self.of_targets

    def _add_sums(self, target: int | None, drawn: Sequence[WindowGradient]) -> None:
        """Add the gradients of draws in the summed spaces; `target` None is full distillation."""
        sums: dict[Space, list[Tensor]] = {
            "summed logits": [w.logits for w in drawn],
            "summed hidden": [w.hidden.sum(0) for w in drawn],
            "parameters": [self._all_parameters(w) for w in drawn],
        }
        for space, vectors in sums.items():
            for batches in self.batches:
                batches.add(space, target, vectors)

    def _all_parameters(self, window: WindowGradient) -> Tensor:
        """Compute the gradient with respect to all trunk and head parameters, concatenated."""
        hidden = window.hidden.to(self.states.dtype)
        gradients = torch.autograd.grad(
            self.states, self.leaves, hidden, retain_graph=True, allow_unused=True
        )
        pieces = []
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            total = torch.zeros_like(leaf) if gradient is None else gradient
            if leaf is self.head_weight:  # a tied weight also has the embedding's gradient
                total = total + window.weight.to(total.dtype)
            elif leaf is self.head_bias:
                total = total + window.logits.to(total.dtype) * self.parts.scale
            pieces.append(total.flatten())
        return torch.cat(pieces)


@dataclass(frozen=True)
class WindowGradient:
    """Gradients of a loss on one window.

    Args:
        hidden: gradient with respect to the head's input at each position, [L, D].
        weight: gradient with respect to the head's weight, [V, D]; the part from a tied embedding
            is not included.
        logits: gradient with respect to the logits, summed over positions, [V].
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor

    @staticmethod
    def zeros(states: Tensor, weight: Tensor) -> WindowGradient:
        """Return a zero gradient for hidden states [L, D] and a head's weight [V, D]."""
        zeros = torch.zeros(states.shape, dtype=weight.dtype, device=weight.device)
        return WindowGradient(zeros, torch.zeros_like(weight), weight.new_zeros(len(weight)))


@dataclass
class Batches:
    """Sums of gradients over batches of consecutive windows, and the moments of each batch.

    In each window, full distillation's gradient (target None) is added before those of the targets.

    Args:
        size: number of windows per batch.
        found: moments of each complete batch, by space and index of the target.
    """

    size: int
    found: dict[tuple[Space, int], list[Moments]] = field(default_factory=dict)
    _done: int = 0
    _sums: dict[tuple[Space, int | None], list[Tensor]] = field(default_factory=dict)
    _moments: dict[tuple[Space, int], Moments] = field(default_factory=dict)
    _full: dict[Space, Tensor] = field(default_factory=dict)

    def add(self, space: Space, target: int | None, vectors: list[Tensor]) -> None:
        """Add a window's gradients, one per draw, in a space that is summed over positions."""
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
        """Add the moments of a window in a space in which positions are concatenated."""
        before = self._moments.pop((space, target), None)
        total = moments if before is None else before + moments
        if self._done == self.size - 1:
            self._close(space, target, total)
        else:
            self._moments[space, target] = total

    def end_window(self) -> None:
        """Count a window whose gradients have all been added."""
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
            f"{type(model).__name__}: trunk and head cannot be run separately, which gradients in "
            "hidden space need; measure a student with a linear head"
        )
    if parts.softcap is not None:
        raise InvalidArgumentError(
            f"{type(model).__name__} caps its logits at {parts.softcap}, and gradients through a "
            "softcap are not supported; measure a student without a softcap"
        )
    return parts
