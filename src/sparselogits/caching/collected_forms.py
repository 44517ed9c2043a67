"""Convert rows in the formats of other trainers to rows of Top-K logprobs.

- DistillKit: `compressed_logprobs` and `bytepacked_indices`, with settings in the file
  `compression_config.yaml` next to the data (`DistillKitPacking`).
- Published Top-K lists: `exp_logits` and `index`, read as probabilities. A sum above 1, beyond
  rounding, is rejected.
- MaxText: `top_k_logits` and `top_k_indices`, rejected because the normaliser is not stored. If
  "unnormalised-logits" is allowed, the logits are normalised over the K listed tokens.

Other probabilities with a sum below 1 are not renormalised, so the missing mass of a list is known
and the loss can assign it to the ghost token. DistillKit's old layout (`packed_indices`) stores
neither its settings nor whether its values are normalised, and is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from sparselogits.caching.collected_rows import MASS_TOLERANCE, TOKENS, as_numbers, fail
from sparselogits.corpus.records import Where
from sparselogits.errors import CorpusError, InvalidTargetsError
from sparselogits.safe_yaml import read_mapping
from sparselogits.wording import counted

SETTINGS = "compression_config.yaml"
"""Name of the file with DistillKit's settings, in the folder of its Parquet files."""

LOSSY_MASS = 1.05
"""Largest valid sum of a position's packed probabilities; valid sums above 1 are scaled to 1."""

_Float = Literal["float16", "bfloat16", "float32", "float64"]
_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Power = Annotated[int, Field(ge=-16, le=16)]
_Count = Annotated[int, Field(ge=0, le=1 << 20)]
_BLOCK = 64
_OLD = "packed_indices"
_PACKED = ("compressed_logprobs", "bytepacked_indices")
_PROBABILITIES = ("exp_logits", "index")
_LOGITS = ("top_k_logits", "top_k_indices")
_IGNORED_OF_MAXTEXT = ("inputs_position", "inputs_segmentation", "targets")


class _Settings(BaseModel):
    """Base class of settings; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ResidualBin(_Settings):
    """Settings for `num_elements` residuals of `element_bits` bits each that share one scale."""

    scale_dtype: _Float
    element_bits: Annotated[int, Field(ge=1, le=32)]
    num_elements: _Size


class DistillKitPacking(_Settings):
    """Settings of DistillKit's packing, named as in its file `compression_config.yaml`.

    A position is stored as the `exact_k` largest values, then one coefficient per polynomial term,
    then for each bin a scale and its residuals. Residuals are integers of `element_bits` bits, most
    significant bit first, padded to whole bytes. With `delta_encoding` each value after the first
    is stored as the difference from the preceding value. Ids are packed like residuals, with as
    many bits as the largest id requires.

    Attributes:
        d: vocabulary size.
        k: number of values per position.
        exact_k: number of values that are stored exactly.
        exact_dtype: dtype of the exact values.
        polynomial_terms: terms that approximate the other values as functions of their rank:
            exponents, or "sqrt" or "exp". None for no approximation.
        term_dtype: dtype of the coefficients.
        residual_bins: bins of the residuals of the approximation.
        delta_encoding: whether values are stored as differences.
        error_diffusion: whether each rounding error was added to the next value; ignored when
            reading.
        normalize_t: whether the ranks of approximated values are scaled to [0, 1].
    """

    d: Annotated[int, Field(ge=2, le=1 << 24)]
    k: _Size
    exact_k: _Count
    exact_dtype: _Float = "float32"
    polynomial_terms: list[_Power | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Float = "float32"
    residual_bins: list[ResidualBin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _require_sizes(self) -> DistillKitPacking:
        """Validate that exact values and bins have at most k values."""
        binned = sum(part.num_elements for part in self.residual_bins)
        if self.exact_k > self.k or binned > self.k - self.exact_k:
            raise ValueError(
                f"exact_k and the bins have {self.exact_k + binned} values, expected at most k = "
                f"{self.k}"
            )
        return self

    @classmethod
    def read(cls, path: Path) -> DistillKitPacking:
        """Read settings from a YAML file. Raises RecipeError or CorpusError for an invalid file."""
        values = read_mapping(path, "the packing")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "settings"
            raise CorpusError(
                f"{path} has invalid settings of DistillKit's packing: {field}: {first['msg']}; "
                "give the file that was written with the data"
            ) from error

    @property
    def id_bits(self) -> int:
        """Number of bits per id."""
        return (self.d - 1).bit_length()

    @property
    def value_bytes(self) -> int:
        """Number of bytes per position for the packed values."""
        terms = len(self.polynomial_terms or ())
        size = self.exact_k * _itemsize(self.exact_dtype) + terms * _itemsize(self.term_dtype)
        for part in self.residual_bins:
            size += _itemsize(part.scale_dtype) + _bytes_of(part.num_elements * part.element_bits)
        return size

    @property
    def id_bytes(self) -> int:
        """Number of bytes per position for the packed ids."""
        return _bytes_of(self.k * self.id_bits)

    def ids(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Unpack the ids of P positions, int64 [P, k], from uint8 [P, id_bytes]."""
        return _integers(packed, self.id_bits, self.k)

    def logprobs(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Unpack the logprobs of P positions, float64 [P, k], from uint8 [P, value_bytes]."""
        if not len(packed):  # PyTorch cannot view bytes of no rows as other numbers
            return np.empty((0, self.k))
        at, rest = 0, self.k - self.exact_k
        exact_dtype = getattr(torch, self.exact_dtype)

        def take(count: int, dtype: str) -> Tensor:  # the next values of every position
            nonlocal at
            size = count * _itemsize(dtype)
            part = torch.from_numpy(np.ascontiguousarray(packed[:, at : at + size]))
            at += size
            return part.view(getattr(torch, dtype)).reshape(len(packed), count)

        exact = take(self.exact_k, self.exact_dtype)
        approximate = torch.zeros(len(packed), rest, dtype=exact_dtype)
        if self.polynomial_terms:
            coefficients = take(len(self.polynomial_terms), self.term_dtype)
            approximate = (coefficients[:, None, :] * self._terms(rest)).sum(-1)
        residuals = [torch.zeros(len(packed), 0)]
        for part in self.residual_bins:
            scale = take(1, part.scale_dtype)
            size = _bytes_of(part.num_elements * part.element_bits)
            numbers = _integers(packed[:, at : at + size], part.element_bits, part.num_elements)
            at += size
            if part.element_bits == 1:
                steps = 2 * numbers - 1
            else:
                steps = numbers - (1 << (part.element_bits - 1))
            residuals.append(torch.from_numpy(steps).float() * scale)
        residual = torch.cat(residuals, -1)
        residual = torch.nn.functional.pad(residual, (0, rest - residual.shape[1]))
        values = torch.cat([exact, (approximate + residual).to(exact_dtype)], -1)
        if self.delta_encoding:
            values = values.float().cumsum(-1).to(exact_dtype)
        return values.double().numpy()

    def _terms(self, count: int) -> Tensor:
        """Return the values of the polynomial terms at each rank, [count, terms]."""
        dtype = getattr(torch, self.term_dtype)
        ranks = torch.arange(count, dtype=dtype)
        if self.normalize_t:
            ranks = torch.linspace(0, 1, count, dtype=dtype)
        functions = {"sqrt": torch.sqrt, "exp": torch.exp}
        columns = [
            ranks**term if isinstance(term, int) else functions[term](ranks)
            for term in self.polynomial_terms or ()
        ]
        return torch.stack(columns, -1)


def plain_row(
    values: Mapping[str, Any], where: Where, packing: DistillKitPacking | None
) -> Mapping[str, Any]:
    """Convert a row in another trainer's format to lists of ids and logprobs.

    A row in none of the formats of this module is returned unchanged.

    Args:
        values: columns of the row by name.
        where: function that returns the location of the row, for messages.
        packing: DistillKit's settings; None if they are unknown.

    Raises:
        InvalidTargetsError: the row is invalid; the message contains the file and the row.
    """
    for name in TOKENS:
        tokens = values.get(name)
        if isinstance(tokens, list) and tokens and isinstance(tokens[0], list):
            fail(
                where,
                f"{name} is a list of {counted(len(tokens), 'list')}, as in a record of a whole "
                "batch ([B, L] tokens, [B, L, K] logits); expected the token ids of one sequence",
                "Write each sequence of the batch as a row of its own",
            )
    if _OLD in values:
        fail(
            where,
            "the row is packed in DistillKit's old layout, which stores neither its settings nor "
            "whether its values are normalised; expected compressed_logprobs",
            "Unpack the row with the settings of its training recipe, and write topk_ids and "
            "topk_logprobs",
        )
    if all(name in values for name in _PACKED):
        return _unpacked(values, where, packing)
    if all(name in values for name in _PROBABILITIES):
        return _of_probabilities(values, where)
    if all(name in values for name in _LOGITS):
        return _of_logits(values, where)
    return values


def _unpacked(
    values: Mapping[str, Any], where: Where, packing: DistillKitPacking | None
) -> Mapping[str, Any]:
    """Convert a row in DistillKit's format to lists of ids and logprobs.

    Probabilities above 1, and sums above 1 but at most `LOSSY_MASS`, are reduced to 1. Raises
    InvalidTargetsError for an invalid row, or if `packing` is None.
    """
    if packing is None:
        fail(
            where,
            "the row is packed by DistillKit, but its settings are unknown",
            f"Put {SETTINGS} next to the files, or give the file (--compression-config)",
        )
    tokens = values.get("input_ids")
    if not isinstance(tokens, list):
        fail(where, "the row has no list of input_ids; expected one next to the packed columns")
    count = len(tokens)
    packed = _byte_rows(values, "compressed_logprobs", packing.value_bytes, where)
    ids = packing.ids(_byte_rows(values, "bytepacked_indices", packing.id_bytes, where))
    if len(packed) != len(ids) or len(ids) not in (count, count - 1):
        fail(
            where,
            f"the row has {count} tokens, but {len(packed)} positions with values and {len(ids)} "
            "with ids; expected one position per token, or one position fewer",
        )
    logs = np.minimum(packing.logprobs(packed), 0)  # approximations may exceed a probability of 1
    mass = np.exp(logs).sum(-1, keepdims=True)
    logs -= np.log(np.where((mass > 1) & (mass <= LOSSY_MASS), mass, 1))
    rest: list[list[Any]] = [[]] * (count - len(ids))  # no distribution after the last token
    return _lists(values, [*ids.tolist(), *rest], [*logs.tolist(), *rest], _PACKED)


def _of_probabilities(values: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
    """Convert a row of probabilities. Raises InvalidTargetsError."""
    logs = []
    for position, row in enumerate(_rows(values, "exp_logits", where)):
        numbers = _floats(row, "exp_logits", where)
        if not (numbers >= 0).all() or numbers.sum() > 1 + MASS_TOLERANCE:
            fail(
                where,
                f"the exp_logits of position {position} sum to {numbers.sum():.4g}, the smallest "
                f"is {numbers.min():.4g}; expected numbers from 0 with a sum of at most 1",
                "Divide them by the sum over the whole vocabulary",
            )
        with np.errstate(divide="ignore"):
            logs.append(np.log(numbers).tolist())
    return _lists(values, _rows(values, "index", where), logs, _PROBABILITIES)


def has_normaliser(values: Mapping[str, Any]) -> bool:
    """Return False for a row of logits without their normaliser (MaxText), True for others."""
    return not all(name in values for name in _LOGITS)


def unnormalised(where: Where) -> InvalidTargetsError:
    """Return the error for a row of logits without their normaliser."""
    return InvalidTargetsError(
        f"{where()}: the row has the K largest logits without their normaliser, so the probability "
        "of the other tokens is unknown; expected logprobs. If this is allowed, the logits are "
        "normalised over the K tokens, which makes the targets too confident"
    )


def _of_logits(values: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
    """Convert a row of logits, normalising them over the listed ids. Raises InvalidTargetsError.

    All logprobs of a position are -inf if `targets_segmentation` marks the position as padding.
    """
    segments = values.get("targets_segmentation")  # 0 for padding
    logs: list[list[float]] = []
    for position, row in enumerate(_rows(values, "top_k_logits", where)):
        numbers = _floats(row, "top_k_logits", where)
        if segments is not None and position < len(segments) and not segments[position]:
            numbers = np.full(len(numbers), -np.inf)
        elif not np.isfinite(numbers).all():
            fail(where, f"position {position} has a logit that is not finite; expected numbers")
        else:
            numbers = numbers - np.logaddexp.reduce(numbers)
        logs.append(np.minimum(numbers, 0).tolist())
    ids = _rows(values, "top_k_indices", where)
    return _lists(values, ids, logs, (*_LOGITS, "targets_segmentation", *_IGNORED_OF_MAXTEXT))


def settings_of(folder: Path, named: Path | None) -> DistillKitPacking | None:
    """Read DistillKit's settings from the file `named`; if it is None, from the folder of the data.

    The result is None if the folder has no such file. Raises RecipeError or CorpusError for an
    invalid file.
    """
    path = named or folder / SETTINGS
    return DistillKitPacking.read(path) if named or path.is_file() else None


def _lists(
    values: Mapping[str, Any], ids: Any, logs: Any, replaced: Collection[str]
) -> Mapping[str, Any]:
    """Return a row with lists of ids and logprobs instead of the `replaced` columns."""
    rest = {name: value for name, value in values.items() if name not in replaced}
    return rest | {"topk_ids": ids, "topk_logprobs": logs}


def _rows(values: Mapping[str, Any], name: str, where: Where) -> list[list[Any]]:
    """Return a column with one list per position, empty for null. Raises InvalidTargetsError."""
    column = values[name]
    if not isinstance(column, list) or not all(isinstance(row, list | None) for row in column):
        fail(where, f"{name} is not a list of lists; expected one list or null per position")
    return [row or [] for row in column]


def _floats(row: list[Any], name: str, where: Where) -> NDArray[np.float64]:
    """Convert a list from a column to a float array. Raises InvalidTargetsError."""
    return as_numbers(row, "fiu", name, where).astype(np.float64)


def _byte_rows(values: Mapping[str, Any], name: str, size: int, where: Where) -> NDArray[np.uint8]:
    """Return a column of packed bytes, uint8 [P, size]. Raises InvalidTargetsError."""
    rows = _rows(values, name, where)
    lengths = {len(row) for row in rows} or {size}
    if lengths != {size}:
        fail(
            where,
            f"{name} has {min(lengths)} to {max(lengths)} bytes per position, expected {size} "
            "according to the settings",
            "Give the settings with which the data were written",
        )
    flat = list(chain.from_iterable(rows))
    numbers = as_numbers(flat, "iu", name, where).reshape(len(rows), size)
    if numbers.size and not (0 <= numbers.min() <= numbers.max() < 256):
        fail(where, f"{name} contains values other than bytes; expected 0 to 255")
    return numbers.astype(np.uint8)


def _integers(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Unpack `count` integers of `bits` bits, the most significant bit first, per row of bytes."""
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    numbers = np.empty((len(packed), count), np.int64)
    for start in range(0, len(packed), _BLOCK):  # in blocks, because each bit takes eight bytes
        flat = np.unpackbits(packed[start : start + _BLOCK], axis=1)[:, : bits * count]
        numbers[start : start + _BLOCK] = flat.reshape(len(flat), count, bits) @ powers
    return numbers


def _itemsize(dtype: str) -> int:
    """Return the size in bytes of one value of a dtype."""
    return int(getattr(torch, dtype).itemsize)


def _bytes_of(bits: int) -> int:
    """Return the number of bytes that are needed to store `bits` bits."""
    return math.ceil(bits / 8)
