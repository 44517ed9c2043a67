"""Sample from a large vocabulary by inverse CDF, without materialising the distribution.

A proposal is q_i proportional to w_i = exp(e * (z_i - shift)). To find the tokens in which given
levels of its cumulative sum fall, the vocabulary is cut into blocks of 64 ids:

1. `Blocks.of`: w in float32, a few rows at a time (they stay in the processor's cache), summed by
   block; then the blocks that matter for an accuracy of 1e-9 once more in float64.
2. `Blocks.edges`: block sums as 62-bit integers, running sums of those. Integer addition does not
   depend on the order, so the edges are the same on every device and for every batch.
3. `Blocks.tokens_at`: binary search for the block of each level, then float64 weights for the
   blocks that are hit, and only for those.

Accuracy: float32 exponentials err by about 3e-8, with mean zero; only what the light blocks hold
carries that error, which leaves marginals within 1e-9 of a float64 softmax (tests and
benchmarks/sampling.py measure it). A token of zero width, a masked one above all, is never hit.

Cost: about three `torch.softmax` over the same logits in warm memory (benchmarks/sampling.py).
Memory beyond the logits, on CPU: 2 MiB of float32 weights whatever the vocabulary, and 24 bytes per
block for 64 positions (0.4 bytes per position and id); a vocabulary that is no multiple of 64 is
padded, 64 positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselogits.errors import InvalidLogitsError
from sparselogits.targets import offsets_from_lengths

BLOCK = 64  # ids per block: one gather of 256 bytes, V / 64 block sums
POSITIONS_AT_ONCE = 64  # positions whose block sums are alive together on a CPU
# A block is summed in float64 when its share of the mass, times the largest probability, exceeds
# this: what lighter blocks get wrong moves no marginal by 1e-9.
_REFINE = 2.0**-14
_TINY = torch.finfo(torch.float64).tiny
_NOTHING = -1e4  # exp of it is 0, and 0 times it no NaN
_SCRATCH = {"cpu": 2**19, "other": 2**26}  # float32 weights alive at once


@dataclass(frozen=True, eq=False)
class Blocks:
    """Hold the proposals of R positions, summed by block.

    Args:
        logits: the teacher's logits, [R, V].
        shift: float32 or float64 [R, 1], each position's largest logit rounded to an integer.
        sums: float64 [R, B], weight in each block.
        exponent: the exponent e of the proposal.
        ceiling: float64 [R, 1]; tokens that weigh at least this much are left out. None keeps all.
        moment: float64 [R], sum of w_i (z_i - shift) at exponent 1, for the entropy; None unless
            it was asked for.
    """

    logits: Tensor
    shift: Tensor
    sums: Tensor
    exponent: float
    ceiling: Tensor | None = None
    moment: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: Tensor,
        exponent: float = 1.0,
        first_position: int = 0,
        *,
        with_moment: bool = False,
    ) -> Blocks:
        """Sum the proposals of a few positions by block.

        Args:
            logits: float [R, V] of any floating dtype; -inf where the id is no token.
            exponent: e, of the teacher's probability in the proposal.
            first_position: what to add to a row in error messages.
            with_moment: keep `moment` too; for exponent 1.

        Raises:
            InvalidLogitsError: NaN, +inf, or a row of -inf only.
        """
        high = torch.promote_types(logits.dtype, torch.float32)
        peak = logits.amax(-1, keepdim=True).to(high)
        _require_finite(logits, peak, first_position)
        whole = _whole_blocks(logits)
        # Subtracting an integer is exact for most logits; subtracting the peak itself would round
        # all of a row alike, by the peak's low bits.
        shift = peak.round()
        sums, moment = _coarse_sums(whole, shift, exponent, with_moment=with_moment)
        coarse = cls(whole, shift, sums, exponent, moment=moment)
        peak_weight = _proposal((peak - shift).double(), exponent)
        heavy = coarse.sums * peak_weight > _REFINE * coarse.total.square()
        rows, blocks = heavy.nonzero(as_tuple=True)
        coarse.sums[rows, blocks] = coarse.weights_in(rows, blocks).sum(-1)
        return coarse

    @property
    def total(self) -> Tensor:
        """Sum of all weights, float64 [R, 1]."""
        return self.sums.sum(-1, keepdim=True)

    def weights_in(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Return the weights in H blocks, given by row and by block, float64 [H, 64]."""
        flat = rows * self.sums.shape[1] + blocks
        chosen = self.logits.view(-1, BLOCK).index_select(0, flat).double()
        weights = _proposal(chosen.sub_(self.shift[rows].double()), self.exponent)
        if self.ceiling is not None:
            weights.masked_fill_(weights >= self.ceiling[rows], 0)
        return weights

    def importance(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return p / q of drawn tokens, float64 [E], from logits and the two normalisers.

        Args:
            ids: int64 [E], position after position.
            offsets: int64 [R + 1], where the tokens of each position begin.
        """
        teacher = Blocks.of(self.logits)
        rows = torch.arange(offsets.numel() - 1, device=ids.device)
        rows = rows.repeat_interleave(offsets.diff())
        gap = self.logits[rows, ids].double() - self.shift[rows, 0].double()
        normaliser = (self.total / teacher.total)[rows, 0]
        return ((1 - self.exponent) * gap).exp() * normaliser

    def edges(self) -> tuple[Tensor, Tensor]:
        """Return running block sums in fixed point.

        Returns:
            edges int64 [R, B], inclusive, below 2**62; and the scale float64 [R, 1], a power of
            two, with which a weight becomes such an integer.
        """
        exponent = torch.frexp(self.total).exponent
        scale = torch.ldexp(torch.ones_like(self.total), 61 - exponent)
        return (self.sums * scale).round().to(torch.int64).cumsum(-1), scale

    def tokens_at(self, edges: Tensor, levels: Tensor) -> Tensor:
        """Find the token in which each level of the cumulative distribution falls.

        Args:
            edges: int64 [R, B] from `edges()`.
            levels: int64 [R, N], ascending in each row, each in [1, edges[:, -1]]. A token whose
                cumulative weight goes from a to b holds the levels a < level <= b.

        Returns:
            int64 [R, N], ascending in each row; any id for levels outside that range.
        """
        block = torch.searchsorted(edges, levels).clamp_max(edges.shape[1] - 1)
        upper = edges.gather(1, block)
        lower = torch.where(block > 0, edges.gather(1, (block - 1).clamp_min(0)), 0)
        rows = torch.arange(levels.shape[0], device=levels.device)[:, None].expand_as(block)
        hit, which = _distinct((rows * edges.shape[1] + block).flatten())
        hit_rows = hit.div(edges.shape[1], rounding_mode="floor")
        weights = self.weights_in(hit_rows, hit - hit_rows * edges.shape[1])
        scale = 2.0**52 / weights.sum(-1, keepdim=True).clamp_min(_TINY)
        fine = (weights * scale).round().to(torch.int64).cumsum(-1)
        # How far into its block a level lies, carried over to the block's exact weights.
        share = (levels - lower).double() / (upper - lower).clamp_min(1).double()
        top = fine[:, -1][which]
        level = (share.flatten() * top).ceil().to(torch.int64).clamp_min(1).minimum(top)
        column = (fine[which] < level[:, None]).sum(-1)
        return block * BLOCK + column.view_as(block)


def count_runs(tokens: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge repeated tokens.

    Args:
        tokens: int64 [R, N], ascending in each row.
        drawn: bool [R, N], true up to some column of each row: the rounds that count. None for all.

    Returns:
        The distinct ids int64 [E], how often each was drawn int32 [E], offsets int64 [R + 1].
    """
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    kept = tokens
    if drawn is not None:
        first &= drawn
        first_kept, kept = first[drawn], tokens[drawn]
    else:
        first_kept = first.flatten()
    begins = first_kept.nonzero()[:, 0]
    counts = torch.diff(begins, append=begins.new_tensor([kept.numel()]))
    return tokens[first], counts.to(torch.int32), offsets_from_lengths(first.sum(-1))


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct of ascending keys int64 [M], [H], and which of them each key is, [M]."""
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], first.cumsum(0) - 1


def position_slices(logits: Tensor, uniforms: Tensor, columns: int) -> Iterator[slice]:
    """Check shapes, then walk over the positions, a bounded number at a time; at least one slice.

    Args:
        logits: [P, V].
        uniforms: [P, U].
        columns: the U the sampler expects.

    Raises:
        InvalidLogitsError: for shapes, dtypes or uniforms that do not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise InvalidLogitsError(
            f"logits must be floating point of shape [positions, vocabulary], found {logits.dtype} "
            f"of shape {tuple(logits.shape)}"
        )
    if tuple(uniforms.shape) != (logits.shape[0], columns):
        raise InvalidLogitsError(
            f"uniforms must have shape {(logits.shape[0], columns)} for logits of shape "
            f"{tuple(logits.shape)}, found {tuple(uniforms.shape)}"
        )
    if uniforms.numel() and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        bad = ~((uniforms >= 0) & (uniforms < 1))
        position, column = bad.nonzero()[0].tolist()
        raise InvalidLogitsError(
            f"position {position}: uniform {column} is {uniforms[position, column].item()}, "
            "expected a value in [0, 1)"
        )
    at_once = POSITIONS_AT_ONCE if logits.device.type == "cpu" else 2048
    for start in range(0, max(1, logits.shape[0]), at_once):
        yield slice(start, min(start + at_once, logits.shape[0]))


def _proposal(gap: Tensor, exponent: float) -> Tensor:
    """Return the weights of logits that lie `gap` above the shift; may overwrite `gap`."""
    if exponent == 0:
        return (gap > -torch.inf).to(gap.dtype)  # 0 * inf is no number
    return (gap if exponent == 1 else gap.mul_(exponent)).exp_()


def _whole_blocks(logits: Tensor) -> Tensor:
    """Return contiguous logits of whole blocks of ids; they are copied only where needed."""
    missing = -logits.shape[1] % BLOCK
    if missing:
        return F.pad(logits, (0, missing), value=-torch.inf)
    return logits.contiguous()


def _coarse_sums(
    logits: Tensor, shift: Tensor, exponent: float, *, with_moment: bool
) -> tuple[Tensor, Tensor | None]:
    """Return block sums float64 [P, B], and the moment [P] or None; see `Blocks`."""
    positions, vocabulary = logits.shape
    blocks = vocabulary // BLOCK
    scratch = _SCRATCH.get(logits.device.type, _SCRATCH["other"])
    at_once = max(1, min(positions, scratch // vocabulary))
    weights = torch.empty(at_once, vocabulary, dtype=torch.float32, device=logits.device)
    gaps = torch.empty_like(weights) if with_moment else weights
    sums = torch.empty(positions, blocks, dtype=torch.float64, device=logits.device)
    moment = sums.new_empty(positions) if with_moment else None
    for start in range(0, positions, at_once):
        part = slice(start, min(start + at_once, positions))
        gap, weight = gaps[: part.stop - start], weights[: part.stop - start]
        torch.sub(logits[part], shift[part], out=gap)
        if moment is not None:
            torch.exp(gap.clamp_min_(_NOTHING), out=weight)
            moment[part] = torch.linalg.vecdot(weight, gap)
        elif exponent == 0:
            weight.copy_(_proposal(gap, exponent))
        else:
            _proposal(gap, exponent)
        sums[part] = weight.view(-1, blocks, BLOCK).sum(-1)
    return sums, moment


def _require_finite(logits: Tensor, peak: Tensor, first_position: int) -> None:
    wrong = ~peak.isfinite()
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0, 0])
    if peak[row, 0] == -torch.inf:
        raise InvalidLogitsError(
            f"position {first_position + row}: every logit is -inf; at least one id must be a token"
        )
    bad = logits[row].isnan() | (logits[row] == torch.inf)
    token = int(bad.nonzero()[0, 0])
    raise InvalidLogitsError(
        f"position {first_position + row}: logit of id {token} is {logits[row, token].item()}; "
        "a teacher that overflows usually needs bfloat16 or float32 instead of float16"
    )
