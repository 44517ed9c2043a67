"""Turn rows of caches that other trainers wrote into rows of Top-K logprobs.

- DistillKit: `compressed_logprobs` and `bytepacked_indices`, whose settings are in the file
  `compression_config.yaml` next to the data (`DistillKitPacking`).
- Published Top-K lists: `exp_logits` and `index`, read as probabilities. A sum above 1 is refused.
- MaxText: `top_k_logits` and `top_k_indices`. Refused, because the normaliser is not stored. With
  the check "unnormalised-logits" allowed, the K likeliest tokens are taken for all there are.

Raw probabilities are kept, so the mass that a list lacks is known and the loss can give it to the
ghost token. DistillKit's older layout (`packed_indices`) is refused: it stores neither its settings
nor whether its values are normalised.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from sparselogits.caching.collected_rows import MASS_TOLERANCE
from sparselogits.corpus.records import Where
from sparselogits.errors import CorpusError, InvalidTargetsError
from sparselogits.safe_yaml import read_mapping

SETTINGS = "compression_config.yaml"
"""File of DistillKit's settings, in the folder of its Parquet files."""
LOSSY_MASS = 1.05
"""Largest mass that packed values may have: approximated probabilities are scaled to sum to 1."""

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
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResidualBin(_Settings):
    """A run of values that share a scale."""

    scale_dtype: _Float
    element_bits: Annotated[int, Field(ge=1, le=32)]
    num_elements: _Size


class DistillKitPacking(_Settings):
    """Settings of DistillKit's packing, as its `compression_config.yaml` has them.

    Bytes of a position, in this order: the `exact_k` largest values; a coefficient per polynomial
    term; for each bin a scale and its values as whole numbers of `element_bits`, most significant
    bit first, padded to a byte. With `delta_encoding` each value but the first is the difference
    from the one before. Ids take as many bits as the largest of `d` ids, packed in the same way.
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
        binned = sum(own.num_elements for own in self.residual_bins)
        if self.exact_k > self.k or binned > self.k - self.exact_k:
            raise ValueError("exact_k and the bins hold more values than k")
        return self

    @classmethod
    def read(cls, path: Path) -> DistillKitPacking:
        """Read the settings of a file.

        Raises:
            RecipeError: the file cannot be read, or is not YAML.
            CorpusError: the file holds other settings; names the first.
        """
        values = read_mapping(path, "the packing")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "settings"
            raise CorpusError(
                f"{path} holds no settings of DistillKit's packing: {place}: {first['msg']}; name "
                "the file that was written with the data"
            ) from error

    @property
    def id_bits(self) -> int:
        """Bits per id."""
        return (self.d - 1).bit_length()

    @property
    def value_bytes(self) -> int:
        """Bytes per position of the values."""
        terms = len(self.polynomial_terms or ())
        size = self.exact_k * _itemsize(self.exact_dtype) + terms * _itemsize(self.term_dtype)
        for own in self.residual_bins:
            size += _itemsize(own.scale_dtype) + _bytes_of(own.num_elements * own.element_bits)
        return size

    @property
    def id_bytes(self) -> int:
        """Bytes per position of the ids."""
        return _bytes_of(self.k * self.id_bits)

    def ids(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the ids [P, k] of packed bytes [P, id_bytes]."""
        return _whole_numbers(packed, self.id_bits, self.k)

    def logprobs(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the values [P, k] of packed bytes [P, value_bytes]."""
        at, rest = 0, self.k - self.exact_k
        exact_dtype = getattr(torch, self.exact_dtype)

        def take(count: int, dtype: str) -> Tensor:
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
        for own in self.residual_bins:
            scale, size = take(1, own.scale_dtype), _bytes_of(own.num_elements * own.element_bits)
            numbers = _whole_numbers(packed[:, at : at + size], own.element_bits, own.num_elements)
            at += size
            if own.element_bits == 1:
                steps = 2 * numbers - 1
            else:
                steps = numbers - (1 << (own.element_bits - 1))
            residuals.append(torch.from_numpy(steps).float() * scale)
        residual = torch.cat(residuals, -1)
        residual = torch.nn.functional.pad(residual, (0, rest - residual.shape[1]))
        values = torch.cat([exact, (approximate + residual).to(exact_dtype)], -1)
        if self.delta_encoding:
            values = values.float().cumsum(-1).to(exact_dtype)
        return values.double().numpy()

    def _terms(self, count: int) -> Tensor:
        """Return the polynomial's terms [count, terms] at each place of the approximated values."""
        dtype = getattr(torch, self.term_dtype)
        places = torch.arange(count, dtype=dtype)
        if self.normalize_t:
            places = torch.linspace(0, 1, count, dtype=dtype)
        functions = {"sqrt": torch.sqrt, "exp": torch.exp}
        columns = [
            places**term if isinstance(term, int) else functions[term](places)
            for term in self.polynomial_terms or ()
        ]
        return torch.stack(columns, -1)


def plain_row(
    values: Mapping[str, Any],
    where: Where,
    packing: DistillKitPacking | None,
) -> Mapping[str, Any]:
    """Return a row with lists of ids and logprobs; a row of another form unchanged.

    Args:
        values: the row.
        where: names the row, for errors.
        packing: settings of DistillKit's packing; None where none are found.

    Raises:
        InvalidTargetsError: the row has not the form that its columns name.
    """
    if _OLD in values:
        _refuse(
            where,
            "it is packed in DistillKit's older layout, which stores neither its settings nor "
            "whether its values are normalised; expected compressed_logprobs. Unpack it with the "
            "settings of its training recipe, and write topk_ids and topk_logprobs",
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
    if packing is None:
        _refuse(
            where,
            f"it is packed by DistillKit, but its settings are unknown; keep {SETTINGS} next to "
            "the files, or name the file (--compression-config)",
        )
    count = _length(values, where)
    packed = _byte_rows(values, "compressed_logprobs", packing.value_bytes, where)
    ids = packing.ids(_byte_rows(values, "bytepacked_indices", packing.id_bytes, where))
    if len(packed) != len(ids) or len(ids) not in (count, count - 1):
        _refuse(
            where,
            f"it has {count} tokens, {len(packed)} packed values and {len(ids)} packed ids; "
            "expected a position per token, or one fewer",
        )
    logs = np.minimum(packing.logprobs(packed), 0)  # approximations may exceed a probability of 1
    mass = np.exp(logs).sum(-1, keepdims=True)
    scaled = (mass > 1) & (mass <= LOSSY_MASS)
    logs -= np.where(scaled, np.log(np.maximum(mass, 1e-300)), 0)
    rest: list[list[Any]] = [[]] * (count - len(ids))  # nothing follows the last token
    return _lists(values, [*ids.tolist(), *rest], [*logs.tolist(), *rest], _PACKED)


def _of_probabilities(values: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
    logs = []
    for position, row in enumerate(_rows(values, "exp_logits", where)):
        numbers = _floats(row, "exp_logits", where)
        if not (numbers >= 0).all() or numbers.sum() > 1 + MASS_TOLERANCE:
            _refuse(
                where,
                f"position {position} has exp_logits that sum to {numbers.sum():.4g}; expected "
                "probabilities, so the mass of the tail is unknown. Divide each by the sum over "
                "the whole vocabulary",
            )
        with np.errstate(divide="ignore"):
            logs.append(np.log(numbers).tolist())
    return _lists(values, _rows(values, "index", where), logs, _PROBABILITIES)


def has_normaliser(values: Mapping[str, Any]) -> bool:
    """Return whether the probabilities of a row are known, and not only its logits."""
    return not all(name in values for name in _LOGITS)


def unnormalised(where: Where) -> InvalidTargetsError:
    """Return the error for a row of logits without their normaliser."""
    return InvalidTargetsError(
        f"{where()}: it holds the K largest logits without their normaliser, so the probability of "
        "the other tokens is unknown; expected logprobs. If this is allowed, the K tokens are "
        "taken for all there are, which makes the targets too confident"
    )


def _of_logits(values: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
    learnt = values.get("targets_segmentation")  # 0 is padding
    logs: list[list[float]] = []
    for position, row in enumerate(_rows(values, "top_k_logits", where)):
        numbers = _floats(row, "top_k_logits", where)
        if learnt is not None and position < len(learnt) and not learnt[position]:
            numbers = np.full(len(numbers), -np.inf)
        elif not np.isfinite(numbers).all():
            _refuse(where, f"position {position} has a logit that is not finite; expected numbers")
        else:
            numbers = numbers - np.logaddexp.reduce(numbers)
        logs.append(np.minimum(numbers, 0).tolist())
    ids = _rows(values, "top_k_indices", where)
    return _lists(values, ids, logs, (*_LOGITS, "targets_segmentation", *_IGNORED_OF_MAXTEXT))


def settings_of(folder: Path, named: Path | None) -> DistillKitPacking | None:
    """Return the settings of a named file, or those in a folder; None where there are none."""
    path = named or folder / SETTINGS
    return DistillKitPacking.read(path) if named or path.is_file() else None


def _lists(
    values: Mapping[str, Any], ids: Any, logs: Any, replaced: Collection[str]
) -> Mapping[str, Any]:
    """Return the other columns of a row with lists of ids and logprobs."""
    rest = {name: value for name, value in values.items() if name not in replaced}
    return rest | {"topk_ids": ids, "topk_logprobs": logs}


def _length(values: Mapping[str, Any], where: Where) -> int:
    tokens = values.get("input_ids")
    if not isinstance(tokens, list):
        _refuse(where, "it has no list of input_ids; expected one next to the packed columns")
    return len(tokens)


def _rows(values: Mapping[str, Any], name: str, where: Where) -> list[list[Any]]:
    column = values[name]
    if not isinstance(column, list) or not all(isinstance(row, list) for row in column):
        _refuse(where, f"{name} is no list of lists; expected a list for each position")
    return column


def _floats(row: list[Any], name: str, where: Where) -> NDArray[np.float64]:
    try:
        return np.array(row, np.float64)
    except (TypeError, ValueError):
        _refuse(where, f"{name} holds other values than numbers; expected lists of numbers")


def _byte_rows(values: Mapping[str, Any], name: str, size: int, where: Where) -> NDArray[np.uint8]:
    rows = _rows(values, name, where)
    lengths = {len(row) for row in rows} or {size}
    if lengths != {size}:
        _refuse(
            where,
            f"{name} has {min(lengths)} to {max(lengths)} bytes per position, its settings make "
            f"{size}; name the settings that the data were written with",
        )
    try:
        numbers = np.array(rows, np.int64).reshape(len(rows), size)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array([[-1]])
    if numbers.size and not (0 <= numbers.min() <= numbers.max() < 256):
        _refuse(where, f"{name} holds other values than bytes; expected 0 to 255")
    return numbers.astype(np.uint8)


def _whole_numbers(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return [P, count] numbers of so many bits, most significant first, from bytes."""
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    numbers = np.empty((len(packed), count), np.int64)
    for start in range(0, len(packed), _BLOCK):  # a bit takes eight bytes
        flat = np.unpackbits(packed[start : start + _BLOCK], axis=1)[:, : bits * count]
        numbers[start : start + _BLOCK] = flat.reshape(len(flat), count, bits) @ powers
    return numbers


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _bytes_of(bits: int) -> int:
    return math.ceil(bits / 8)


def _refuse(where: Where, what: str) -> NoReturn:
    raise InvalidTargetsError(f"{where()}: {what}")
