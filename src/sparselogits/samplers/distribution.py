"""Sample from a large vocabulary by inverse CDF, without storing the whole distribution.

A proposal with exponent e for logits z is q_i proportional to w_i = 2 ** (e * z_i / ln 2 - shift).
The vocabulary is divided into blocks of 64 ids. `Blocks.of` sums the weights of each block in
float32 (powers of two, because `torch.exp2` takes a third of the time of `torch.exp` on a CPU), and
again in float64 where an accuracy of 1e-9 requires it. `Blocks.tokens_at` searches the running
block sums, which are integers so that they do not depend on the order of additions, and computes
float64 weights only for the blocks that it finds. docs/theory.md states the accuracy;
benchmarks/sampling.py measures the time. The first step has faster forms in C and, for CUDA, in
Triton (compiled.py).

Memory beyond the logits on a CPU: about 2 MiB of float32 weights (4 MiB with moments), and about 24
bytes per block at each of 64 positions. A vocabulary whose size is not a multiple of 64 is padded,
64 positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparselogits.errors import InvalidLogitsError
from sparselogits.samplers import compiled
from sparselogits.targets import offsets_from_lengths

BLOCK = 64
"""Number of ids per block."""

POSITIONS_AT_ONCE = 64
"""Number of positions whose block sums are in memory together on a CPU."""

LARGEST_LOGIT = 2.0**24
"""Largest valid magnitude of a row's largest logit; float32 rounds larger shifts too coarsely."""

_TINY = torch.finfo(torch.float64).tiny
LOG2_E = 1 / math.log(2)
NOTHING = -1e3  # a finite exponent for which the weight is 0, since 0 * -inf is NaN
# Exponent of the likeliest token: the exponents of light blocks are then close to zero, where
# float32 is more accurate. The other blocks are computed again in float64.
PEAK = 8
# A block is heavy, and summed in float64, if its sum exceeds this times the square of the total.
# Then its share of the mass, times the largest probability, exceeds 2**-14. The float32 errors of
# the other blocks change no marginal by 1e-9.
_HEAVY = 2.0 ** (-14 - PEAK)
_UNIT = 2**20  # scale of the fixed-point total, which does not depend on the order of the sum
_SCRATCH = {"cpu": 2**19, "other": 2**26}  # number of float32 weights in memory together


@dataclass(frozen=True, eq=False)
class Blocks:
    """Proposals at R positions, with their weights summed by block.

    Args:
        logits: logits of the teacher, [R, V], with V padded to a multiple of 64.
        shift: float64 [R, 1], chosen so that the likeliest token has a weight of about 2**8; 0 if
            the exponent is 0.
        sums: float64 [R, B], sum of the weights w in each of the row's B blocks.
        exponent: the exponent e of the proposal.
        ceiling: float64 [R, 1]; tokens with at least this weight are excluded. None excludes none.
        moment: float64 [R], sum of w_i log2(w_i), which determines the entropy; None if not
            requested.
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
            logits: [R, V] of any floating-point dtype; -inf for ids that are not tokens.
            exponent: exponent e of the teacher's probability in the proposal.
            first_position: position of the first row, for error messages.
            with_moment: whether to compute `moment`; requires an exponent other than 0.

        Raises:
            InvalidLogitsError: a row contains NaN, or the magnitude of its largest logit exceeds
                `LARGEST_LOGIT`.
        """
        whole = _whole_blocks(logits.detach())
        fast = compiled.fastest_for(whole) if exponent != 0 else None
        peak, blocks = sum_by_block(whole, exponent, with_moment, fast)
        _require_in_range(logits, peak, first_position)
        return blocks

    @property
    def total(self) -> Tensor:
        """Sum of the weights of all blocks, float64 [R, 1]."""
        return self.sums.sum(-1, keepdim=True)

    @property
    def log_normaliser(self) -> Tensor:
        """Logarithm of the sum of exp(e * z_i) over the vocabulary, float64 [R, 1]."""
        return (self.total.log2() + self.shift) / LOG2_E

    @property
    def entropy(self) -> Tensor:
        """Entropy of the proposal in nats, float64 [R]; available only if `moment` was computed."""
        assert self.moment is not None
        total = self.total[:, 0]
        return (total.log2() - self.moment / total) / LOG2_E

    def weights_in(self, blocks: Tensor) -> Tensor:
        """Return the weights in the given blocks, float64 [H, 64].

        `blocks` is int64 [H]; block b of row r has the index r * B + b.
        """
        logits = self.logits.view(-1, BLOCK).index_select(0, blocks).double()
        rows = blocks.div(self.sums.shape[1], rounding_mode="floor")
        if self.exponent == 0:
            weights = (logits > -torch.inf).double()  # 0 * inf is NaN
        else:
            weights = torch.add(-self.shift[rows], logits, alpha=self.exponent * LOG2_E).exp2_()
        if self.ceiling is not None:
            weights.masked_fill_(weights >= self.ceiling[rows], 0)
        return weights

    def largest(self, most: int) -> tuple[Tensor, Tensor]:
        """Return the `most` largest logits of each row in descending order, and their ids.

        Both are [R, K], where K is the smaller of `most` and the padded vocabulary size. Only the
        `most` blocks with the largest maxima are searched, which is faster than `torch.topk` over
        the vocabulary. Ids with a logit of -inf may be padding.
        """
        by_block = self.logits.view(*self.sums.shape, BLOCK)
        chosen = by_block.amax(-1).topk(min(most, by_block.shape[1])).indices
        candidates = by_block.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
        values, index = candidates.topk(min(most, candidates.shape[1]))
        return values, chosen.gather(1, index // BLOCK) * BLOCK + index % BLOCK

    def importance(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the importance weights p / q of drawn ids, float64 [E].

        Args:
            ids: int64 [E], in order of position.
            offsets: int64 [R + 1]; row r has the ids [offsets[r], offsets[r + 1]).
        """
        teacher = Blocks.of(self.logits)
        rows = torch.arange(offsets.numel() - 1, device=ids.device)
        rows = rows.repeat_interleave(offsets.diff())
        logits = self.logits[rows, ids].double()
        normaliser = (self.log_normaliser - teacher.log_normaliser)[rows, 0]
        return ((1 - self.exponent) * logits + normaliser).exp()

    def edges(self) -> tuple[Tensor, Tensor]:
        """Return the running sums of the blocks in fixed point, and the factor that scaled them.

        The sums are int64 [R, B] below 2**62; the factor is float64 [R, 1].
        """
        exponent = torch.frexp(self.total).exponent
        scale = torch.ldexp(torch.ones_like(self.total), 61 - exponent)
        return (self.sums * scale).round_().to(torch.int64).cumsum(-1), scale

    def tokens_at(self, edges: Tensor, levels: Tensor) -> Tensor:
        """Return the ids that contain levels of the cumulative distribution, int64 [R, N].

        Args:
            edges: int64 [R, B] from `edges()`.
            levels: int64 [R, N], ascending in each row, each in [1, edges[:, -1]]. A token whose
                cumulative weight goes from a to b contains the levels a < level <= b.
        """
        block = torch.searchsorted(edges, levels).clamp_max(edges.shape[1] - 1)
        upper = edges.gather(1, block)
        lower = torch.where(block > 0, edges.gather(1, (block - 1).clamp_min(0)), 0)
        rows = torch.arange(levels.shape[0], device=levels.device)[:, None].expand_as(block)
        hit, which = _distinct((rows * edges.shape[1] + block).flatten())
        weights = self.weights_in(hit)
        scale = 2.0**52 / weights.sum(-1, keepdim=True).clamp_min(_TINY)
        fine = (weights * scale).round_().to(torch.int64).cumsum(-1)
        # A level keeps its relative position in the block when sums are replaced by exact weights.
        share = (levels - lower).double() / (upper - lower).clamp_min(1).double()
        top = fine[:, -1][which]
        level = (share.flatten() * top).ceil().to(torch.int64).clamp_min(1).minimum(top)
        column = torch.searchsorted(fine[which], level[:, None])
        return block * BLOCK + column.view_as(block)


def count_runs(tokens: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Count how often each token occurs in each row.

    Returns the distinct ids of each row, int64 [E], their counts, int32 [E], and row offsets, int64
    [R + 1].

    Args:
        tokens: int64 [R, N], ascending in each row.
        drawn: bool [R, N], True for the first tokens of each row, which are counted; None for all.
    """
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    first_counted, counted = first.flatten(), tokens.numel()
    if drawn is not None:
        first &= drawn
        first_counted, counted = first[drawn], int(drawn.sum())
    begins = first_counted.nonzero()[:, 0]
    counts = torch.diff(begins, append=begins.new_tensor([counted]))
    return tokens[first], counts.to(torch.int32), offsets_from_lengths(first.sum(-1))


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of ascending keys [M], int64 [H], and each key's index in them."""
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], first.cumsum(0) - 1


def position_slices(logits: Tensor, uniforms: Tensor, columns: int) -> Iterator[slice]:
    """Validate logits [P, V] and uniforms [P, columns], and yield slices of the positions.

    A slice has at most 64 positions on a CPU, and 2048 on other devices.

    Raises:
        InvalidLogitsError: a shape or dtype is wrong, or a uniform is outside [0, 1).
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise InvalidLogitsError(
            f"logits must be floating-point of shape [positions, vocabulary], found {logits.dtype} "
            f"of shape {tuple(logits.shape)}; pass the teacher's logits for one window"
        )
    if tuple(uniforms.shape) != (logits.shape[0], columns):
        raise InvalidLogitsError(
            f"uniforms must have shape {(logits.shape[0], columns)} for logits of shape "
            f"{tuple(logits.shape)}, found {tuple(uniforms.shape)}; draw them by window_uniforms"
        )
    bad = ~((uniforms >= 0) & (uniforms < 1))
    if bool(bad.any()):
        position, column = bad.nonzero()[0].tolist()
        raise InvalidLogitsError(
            f"position {position}: uniform {column} is {uniforms[position, column].item()}, "
            "expected a value in [0, 1); draw uniforms by window_uniforms"
        )
    at_once = POSITIONS_AT_ONCE if logits.device.type == "cpu" else 2048
    for start in range(0, max(1, logits.shape[0]), at_once):
        yield slice(start, min(start + at_once, logits.shape[0]))


def _whole_blocks(logits: Tensor) -> Tensor:
    """Return contiguous logits padded to whole blocks of ids, copied only if necessary."""
    missing = -logits.shape[1] % BLOCK
    if missing:
        return F.pad(logits, (0, missing), value=-torch.inf)
    return logits.contiguous()


def sum_by_block(
    logits: Tensor,
    exponent: float,
    with_moment: bool,
    library: compiled.Library | compiled.Kernel | None,
) -> tuple[Tensor, Blocks]:
    """Sum the proposals of contiguous logits by block; return the largest logits and the sums.

    The logits are [P, V] with V a multiple of 64, and the largest logits are [P, 1].

    The results of the compiled library, and of PyTorch if `library` is None, are bitwise equal with
    the exception that compiled.py describes. The results of the kernel for CUDA differ by rounding;
    see triton_sums.py.
    """
    if isinstance(library, compiled.Library):
        slope, factors = exponent * LOG2_E, _factors(exponent)
        peak, shift, sums, moments = library.sums(logits, slope, factors, _HEAVY, with_moment)
    else:
        peak, shift, sums, moments = (library or _torch_sums)(logits, exponent, with_moment)
    moment = None if moments is None else moments.sum(-1)
    blocks = Blocks(logits, shift, sums, exponent, moment=moment)
    if not isinstance(library, compiled.Library):
        total = (sums * _UNIT).to(torch.int64).sum(-1, keepdim=True).double() / _UNIT
        heavy = (sums > _HEAVY * total.square()).flatten().nonzero()[:, 0]
        sums.view(-1)[heavy] = blocks.weights_in(heavy).sum(-1)
    return peak, blocks


def _torch_sums(logits: Tensor, exponent: float, with_moment: bool) -> compiled.Sums:
    """Sum weights by block in float32, with the operations of block_sums.c in the same order."""
    positions, vocabulary = logits.shape
    blocks = vocabulary // BLOCK
    scratch = _SCRATCH.get(logits.device.type, _SCRATCH["other"])
    at_once = max(1, min(positions, scratch // vocabulary))
    weights = torch.empty(at_once, vocabulary, dtype=torch.float32, device=logits.device)
    powers = torch.empty_like(weights) if with_moment else weights
    sums = torch.empty(positions, blocks, dtype=torch.float64, device=logits.device)
    moments = torch.empty_like(sums) if with_moment else None
    high = torch.promote_types(logits.dtype, torch.float32)
    peaks = torch.empty(positions, 1, dtype=high, device=logits.device)
    shifts = torch.zeros_like(peaks)
    factor, remainder = _factors(exponent)
    for start in range(0, positions, at_once):
        part = slice(start, min(start + at_once, positions))
        power, weight = powers[: part.stop - start], weights[: part.stop - start]
        chunk = logits[part]
        peaks[part] = chunk.amax(-1, keepdim=True)
        if exponent == 0:
            torch.gt(chunk, -torch.inf, out=weight)  # 0 * inf is NaN
        else:
            shifts[part] = peaks[part] * factor - PEAK
            torch.add(-shifts[part], chunk, alpha=factor, out=power)
            power.add_(power, alpha=remainder)
            torch.exp2(power, out=weight)
        sums[part] = weight.view(-1, blocks, BLOCK).sum(-1)
        if moments is not None:
            torch.mul(weight, power.clamp_min_(NOTHING), out=power)
            moments[part] = power.view(-1, blocks, BLOCK).sum(-1)
    return peaks, shifts.double() * (1 + remainder), sums, moments


@cache
def _factors(exponent: float) -> tuple[float, float]:
    """Return float32 numbers a (slope) and b (remainder) with a * (1 + b) = exponent / ln 2.

    The relative error of the product is below 1e-10, instead of up to 6e-8 for a single float32
    factor. The relative error in the share of a light block (see `_HEAVY`) is that of the product
    times the magnitude of the block's logits.
    """
    if exponent == 0:
        return 0.0, 0.0
    factor = float(np.float32(exponent * LOG2_E / (1 + 2.0**-10)))
    return factor, float(np.float32(exponent * LOG2_E / factor - 1))


def _require_in_range(logits: Tensor, peak: Tensor, first_position: int) -> None:
    """Raise InvalidLogitsError if the largest logit of a row, [R, 1], is NaN or out of range."""
    wrong = ~(peak.abs() <= LARGEST_LOGIT)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0, 0])
    largest, token = logits[row].max(-1)
    position = first_position + row
    if largest == -torch.inf:
        raise InvalidLogitsError(
            f"position {position}: every logit is -inf, expected at least one finite logit; check "
            "the mask of ids that are tokens"
        )
    raise InvalidLogitsError(
        f"position {position}: logit of id {int(token)} is {largest.item()}, expected the row's "
        f"largest logit to be within {LARGEST_LOGIT:,.0f} of 0; if the teacher overflows in "
        "float16, run it in bfloat16 or float32"
    )
