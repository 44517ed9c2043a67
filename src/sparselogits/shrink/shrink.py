"""Create a student from a teacher by removing blocks, MLP channels, heads and hidden channels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from torch import Tensor, nn

from sparselogits.errors import InvalidArgumentError, ShrinkError
from sparselogits.language_model import in_eval_mode
from sparselogits.progress import Progress
from sparselogits.shrink.layout import Layout, layout_of, sizes_of
from sparselogits.shrink.plan import Kept, ShrinkTarget, kept_layers, largest
from sparselogits.shrink.scores import (
    LayerScore,
    layer_influence,
    layer_losses,
    spaced_layers,
    width_scores,
)
from sparselogits.shrink.slicing import Slicer, build, order_of


@dataclass(frozen=True)
class Shrunk:
    """Pruned student and a description of its differences from the teacher.

    Args:
        model: the student, an ordinary transformers model in the teacher's dtype, on the CPU and in
            eval mode.
        dropped_layers: indices of the teacher's blocks that were removed.
        layer_scores: score of each block in the teacher; None if blocks were not selected by score.
        before: the teacher's sizes, by field name of `Sizes`.
        after: the student's sizes, by field name of `Sizes`.
        parameters_before: number of parameters in the teacher.
        parameters_after: number of parameters in the student.
    """

    model: nn.Module
    dropped_layers: tuple[int, ...]
    layer_scores: tuple[float, ...] | None
    before: dict[str, int]
    after: dict[str, int]
    parameters_before: int
    parameters_after: int

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the model, as plain JSON values."""
        return {k: v for k, v in vars(self).items() if k != "model"}


def shrink(
    model: nn.Module,
    *,
    layers: int | None = None,
    drop_layers: tuple[int, ...] | None = None,
    channels: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    windows: Tensor | None = None,
    layer_score: LayerScore = "influence",
    progress: Progress | None = None,
) -> Shrunk:
    """Create a smaller model from part of a larger model's weights.

    Blocks are selected first; channels, heads and hidden channels are then scored on the model
    without the removed blocks. The pruning is verified on the first two retained blocks and a few
    tokens: the logits must equal those of these blocks with the removed parts set to zero, up to
    rounding.

    Args:
        model: a transformers language model, causal or masked; it is not changed.
        layers: number of blocks in the student; None for all.
        drop_layers: indices of the blocks to remove, counted from 0, instead of `layers`.
        channels: number of MLP channels per layer (`intermediate_size`); None for all.
        heads: number of query heads per layer, a multiple of the number of query heads that share
            a key-value head; None for all.
        hidden: width of the residual stream (`hidden_size`); None for the teacher's.
        windows: int64 [N, L] calibration tokens, N >= 1, L >= 2; required unless only `drop_layers`
            is given, or `layers` with "spaced".
        layer_score: rule that selects blocks: the score "influence" (one pass over the windows) or
            "loss" (one pass per block; causal models only), or "spaced" for evenly spaced blocks
            from the first to the last one (DistilBERT).
        progress: function that is called with the number of finished windows (with "loss", blocks)
            and their total; counted anew when channels, heads and hidden channels are scored.

    Raises:
        ShrinkError: If no size or an invalid one is given; the structure of the model, or its
            pruning to these sizes, is not supported; or "loss" is given for a masked model.
        InvalidArgumentError: If calibration windows are required, but missing or not [N, L], or
            `layer_score` is unknown.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                 num_hidden_layers=3, num_attention_heads=2)
        ... )
        >>> student = shrink(teacher, drop_layers=(1,)).model
        >>> student.config.num_hidden_layers
        2
    """
    if layer_score not in get_args(LayerScore):
        raise InvalidArgumentError(
            f"layer_score={layer_score!r}; give influence, loss or spaced as the rule that selects "
            "blocks"
        )
    layout = layout_of(model)
    target = ShrinkTarget(layers, drop_layers, channels, heads, hidden)
    target = target.require_possible(layout, type(model).__name__)
    if replace(target, drop_layers=target.drop_layers or None) == ShrinkTarget():
        raise ShrinkError("nothing to prune: give layers, drop_layers, channels, heads or hidden")
    total = layout.sizes.layers
    if layer_score == "spaced" and target.layers is not None:
        kept_spaced = spaced_layers(target.layers, total)
        dropped = tuple(n for n in range(total) if n not in kept_spaced)
        target = replace(target, layers=None, drop_layers=dropped)
    chosen_by_score = target.layers is not None and target.layers < total
    sizes = {"channels": channels, "groups": target.heads, "hidden": target.hidden}
    wide = [size for size, value in sizes.items() if value is not None]
    if (chosen_by_score or wide) and (windows is None or windows.ndim != 2 or not len(windows)):
        raise InvalidArgumentError(
            "selecting the parts to remove needs calibration windows, int64 [N, L], found "
            f"{windows if windows is None else tuple(windows.shape)}; give windows, or only the "
            "layers to remove (drop_layers), or evenly spaced ones (spaced)"
        )
    with in_eval_mode(model):
        scores = None
        if chosen_by_score:
            assert windows is not None
            measure = layer_influence if layer_score == "influence" else layer_losses
            scores = measure(model, layout, windows, progress=progress)
        kept = Kept(kept_layers(target, total, scores))
        if wide:
            assert windows is not None
            kept = _select_width(model, layout, target, kept, windows, wide, progress)
        order = order_of(model, layout, kept)
        student = build(model, Slicer(layout, kept, order))
    return Shrunk(
        model=student,
        dropped_layers=tuple(n for n in range(total) if n not in kept.layers),
        layer_scores=None if scores is None else tuple(scores),
        before=asdict(layout.sizes),
        after=asdict(sizes_of(student)),
        parameters_before=_parameters(model),
        parameters_after=_parameters(student),
    )


def _select_width(
    model: nn.Module,
    layout: Layout,
    target: ShrinkTarget,
    kept: Kept,
    windows: Tensor,
    wide: list[str],
    progress: Progress | None,
) -> Kept:
    """Return `kept` with the units of the sizes `wide` that have the largest scores."""
    shallow, shallow_layout = model, layout
    if len(kept.layers) < layout.sizes.layers:
        shallow = build(model, Slicer(layout, kept, "concatenated"))
        shallow.to(next(model.parameters()).device)
        shallow_layout = layout_of(shallow)
    scores = width_scores(shallow, shallow_layout, windows, wide, progress=progress)
    per_layer: dict[str, tuple[Tensor, ...]] = {}
    for size, count in (("channels", target.channels), ("groups", target.heads)):
        if size in scores:
            assert count is not None
            units = count if size == "channels" else count // layout.sizes.heads_per_group
            per_layer[size] = tuple(largest(row, units) for row in scores[size])
    hidden = None
    if "hidden" in scores:
        assert target.hidden is not None
        hidden = largest(scores["hidden"], target.hidden)
    return Kept(kept.layers, per_layer.get("channels"), per_layer.get("groups"), hidden)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
