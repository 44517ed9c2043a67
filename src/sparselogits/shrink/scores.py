"""Score the parts of a model by their contribution on calibration text.

- Blocks: block influence, which is one minus the cosine of a block's input and output, averaged
  over positions (ShortGPT, arXiv 2403.03853); or the loss of the model without the block.
- MLP channels and groups of attention heads: root mean square over positions of the norm of what a
  unit adds to the result of the output projection. For a channel, this norm is the magnitude of the
  activation times the norm of a column of the projection (Minitron, arXiv 2407.14679, uses the
  activation alone).
- Channels of the residual stream: root of the sum over normalisation layers of the mean square over
  positions of their outputs (Minitron).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselogits.errors import ShrinkError
from sparselogits.language_model import predicts_masked
from sparselogits.progress import Progress
from sparselogits.shrink.layout import Layout
from sparselogits.shrink.slicing import norms_of

LayerScore = Literal["influence", "loss", "spaced"]
"""Name of a rule that selects blocks: the score "influence" or "loss" (see the module's docstring),
or "spaced", the rule of `spaced_layers`."""


def spaced_layers(count: int, total: int) -> tuple[int, ...]:
    """Return the indices of evenly spaced blocks, from the first one to the last one.

    A single block is the first one. Six of twelve blocks are those of DistilBERT: 0, 2, 4, 7, 9 and
    11.

    Args:
        count: number of blocks to retain.
        total: number of blocks in the teacher.

    Examples:
        >>> spaced_layers(6, 12)
        (0, 2, 4, 7, 9, 11)
    """
    step = (total - 1) / max(count - 1, 1)
    return tuple(int(step * number + 0.5) for number in range(count))


@torch.no_grad()
def layer_influence(
    model: nn.Module, layout: Layout, windows: Tensor, *, progress: Progress | None = None
) -> list[float]:
    """Return the influence of each block, in [0, 2]; 0 if no input vector changes its direction.

    Args:
        model: a transformers language model.
        layout: layout of the model, from `layout_of`.
        windows: int64 [N, L] calibration tokens.
        progress: function that is called after each window.
    """
    sums = torch.zeros(layout.sizes.layers, dtype=torch.float64)

    def compare(number: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).float()
        after = (output[0] if isinstance(output, tuple) else output).float()
        sums[number] += float((1 - F.cosine_similarity(before, after, dim=-1)).mean())

    with ExitStack() as hooks:
        for number, block in enumerate(layout.blocks_of(model)):
            hook = partial(compare, number)
            hooks.enter_context(block.register_forward_hook(hook, with_kwargs=True))
        _run(model, windows, progress)
    return (sums / len(windows)).tolist()


@torch.no_grad()
def layer_losses(
    model: nn.Module, layout: Layout, windows: Tensor, *, progress: Progress | None = None
) -> list[float]:
    """Return, for each block, the loss of the model without that block, in nats per token.

    This takes one pass over the windows per block. The arguments are those of `layer_influence`,
    but `progress` is called after each block, and windows have at least two tokens.

    Raises:
        ShrinkError: If the model is a masked language model, which predicts no next token.
    """
    if predicts_masked(model):
        raise ShrinkError(
            f"{type(model).__name__} is a masked language model, but the layer score 'loss' is the "
            "loss of next tokens; choose 'influence' or 'spaced' (--layer-score)"
        )

    def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    losses = []
    for number, block in enumerate(layout.blocks_of(model)):
        with block.register_forward_hook(skip, with_kwargs=True):
            losses.append(loss_of(model, windows))
        if progress is not None:
            progress(number + 1, layout.sizes.layers)
    return losses


@torch.no_grad()
def loss_of(model: nn.Module, windows: Tensor) -> float:
    """Return the mean negative log-likelihood of the tokens in windows, in nats per token.

    The first token of each window is not predicted.

    Args:
        model: a transformers causal language model.
        windows: int64 [N, L], L >= 2.
    """
    total = 0.0
    for window in windows:
        tokens = window[None].to(next(model.parameters()).device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, tokens[0, 1:]))
    return total / len(windows)


@torch.no_grad()
def width_scores(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    sizes: Sequence[str],
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the scores of MLP channels, groups of heads or hidden channels, as `sizes` requests.

    Args:
        model: a transformers language model.
        layout: layout of the model, from `layout_of`.
        windows: int64 [N, L] calibration tokens.
        sizes: names of the sizes to score, from "channels", "groups" and "hidden".
        progress: function that is called after each window.

    Returns:
        Float64 scores by size: [layers, channels], [layers, groups] and [hidden].

    Raises:
        ShrinkError: If the output projections of the blocks cannot be identified.
    """
    model_sizes, modules = layout.sizes, dict(model.named_modules())
    scores: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for size in ("channels", "groups"):
            if size not in sizes:
                continue
            count = model_sizes.channels if size == "channels" else model_sizes.groups
            scores[size] = torch.zeros(model_sizes.layers, count, dtype=torch.float64)
            projections = _output_projections(layout, modules, size)
            if sorted(layer for _, _, layer in projections) != list(range(model_sizes.layers)):
                parts = "MLP channels" if size == "channels" else "attention heads"
                raise ShrinkError(
                    f"{type(model).__name__}: its blocks do not each have one output projection "
                    f"for {parts}, so these cannot be scored. Prune only its layers, or use a tool "
                    "for its architecture"
                )
            for name, weight_dim, layer in projections:
                add_up = _contribution(scores[size][layer], modules[name], weight_dim)
                hooks.enter_context(modules[name].register_forward_pre_hook(add_up))
        if "hidden" in sizes:
            scores["hidden"] = torch.zeros(model_sizes.hidden, dtype=torch.float64)

            def add(_: nn.Module, __: Any, output: Tensor) -> None:
                scores["hidden"] += output.double().square().flatten(0, -2).mean(0).cpu()

            for name in norms_of(model, layout):
                hooks.enter_context(modules[name].register_forward_hook(add))
        _run(model, windows, progress)
    return {size: value.div(len(windows)).sqrt() for size, value in scores.items()}


def _contribution(into: Tensor, projection: nn.Module, weight_dim: int) -> Callable[..., None]:
    """Return a forward pre-hook that adds each unit's mean squared contribution to `into` [units].

    The units are runs of equal length of the projection's inputs, which are the dimension
    `weight_dim` of its weight.
    """
    count = len(into)
    weight: Any = projection.weight
    by_unit: Tensor = weight.detach().movedim(weight_dim, 0).float()  # [inputs, D]

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0].flatten(0, -2).float()  # [positions, inputs]
        if states.shape[1] == count:  # with one input per unit, the square is |x|^2 |w|^2
            into.add_((states.square().mean(0) * by_unit.square().sum(1)).double().cpu())
            return
        units = states.reshape(len(states), count, -1).transpose(0, 1)  # [units, positions, inputs]
        added = torch.bmm(units, by_unit.reshape(count, -1, by_unit.shape[1]))
        into.add_(added.square().sum(-1).mean(1).double().cpu())

    return add


def _output_projections(
    layout: Layout, modules: dict[str, nn.Module], size: str
) -> list[tuple[str, int, int]]:
    """Return (name, dimension, block) of each linear layer whose inputs depend on a size.

    The dimension, 0 or 1, is that of the layer's weight along which the inputs are summed. The
    block is the index of the layer's block; -1 for a layer outside of the blocks.
    """
    found = []
    for name, dimensions in layout.dimensions.items():
        module = modules.get(name.removesuffix(".weight"))
        if not name.endswith(".weight") or module is None:
            continue
        inputs = 1 if isinstance(module, nn.Linear) else 0  # GPT-2's Conv1D is [inputs, outputs]
        weight: Any = module.weight
        if weight.ndim == 2 and any(d.size == size and d.dim == inputs for d in dimensions):
            layer = layout.layer_of(name)
            found.append((name.removesuffix(".weight"), inputs, -1 if layer is None else layer))
    return found


def _run(model: nn.Module, windows: Tensor, progress: Progress | None) -> None:
    """Run the model's trunk over each window, so that the hooks on its modules are called."""
    device = next(model.parameters()).device
    language_model: Any = model
    decoder = language_model.get_decoder() if hasattr(model, "get_decoder") else model
    for number, window in enumerate(windows):
        decoder(input_ids=window[None].to(device), use_cache=False)
        if progress is not None:
            progress(number + 1, len(windows))
