"""Describe in canonical form what a cache is built from, and hash the description.

All shards of a cache have equal identities. An identity contains what changes the *meaning* of the
targets (teacher, tokenizer, sampler, packing, ...) or of the bytes (codec, format). Versions of
libraries and the device are recorded in each shard's provenance instead, because they should change
only low-order bits. The corpus is not part of the identity, so that text can be appended: each
shard contains the fingerprint of its windows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparselogits.errors import CacheError, IdentityMismatchError, InvalidArgumentError
from sparselogits.objectives import TokenObjective, objective_from_json
from sparselogits.untrusted import printable, shown

CAUSAL_FORMAT, MASKED_FORMAT = 1, 2
"""Versions of the directory and shard layout: without and with corrupted inputs."""

LARGEST_VOCABULARY = 1 << 24
"""Largest allowed vocabulary size."""

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")
_SNAPSHOT = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+?)/snapshots/")
_FIELD_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(
        ("teacher", "packing", "sampler", "codec", "objective"), (dict, "a JSON object")
    ),
    **dict.fromkeys(("tokenizer", "token_mask"), (str, "a string")),
    **dict.fromkeys(
        ("vocab_size", "window_length", "windows_per_shard", "seed"), (int, "a whole number")
    ),
    "temperature": ((int, float), "a number"),
}


@dataclass(frozen=True)
class Identity:
    """Settings that are equal in all shards of a cache.

    Args:
        teacher: name (for display, not compared), fingerprint of the weights, dtype, engine and
            quantization of the teacher; in some caches further fields, such as vLLM's options, the
            shares of a mixture, or what the targets were retokenized from.
        tokenizer: fingerprint of the tokenizer, see `tokenizer_fingerprint`.
        vocab_size: number of ids over which targets are defined: the teacher's logits per position;
            the ids of the student's tokenizer in a retokenized cache; D + 1 for a draft vocabulary
            of D ids.
        token_mask: sha256 of the bitmap that marks ids which are tokens; "all" if every id is one,
            and in a retokenized cache; "mixture" for a mixture of caches.
        window_length: number of positions per window.
        windows_per_shard: number of windows per shard file.
        packing: separator and beginning-of-text ids, attention reset, hold-out share, and kind and
            padding id if each window has one document.
        sampler: name and all parameters of the sampler.
        seed: seed that determines the random numbers of the sampler, together with the window
            index.
        temperature: temperature by which the teacher's logits are divided before sampling.
        codec: name and parameters of the codec that encodes targets.
        objective: JSON values from `Masked.to_json` if positions predict hidden tokens; None if
            they predict the next token.
    """

    teacher: Mapping[str, Any]
    tokenizer: str
    vocab_size: int
    token_mask: str
    window_length: int
    windows_per_shard: int
    packing: Mapping[str, Any]
    sampler: Mapping[str, Any]
    seed: int
    temperature: float
    codec: Mapping[str, Any]
    objective: Mapping[str, Any] | None = None

    @property
    def format_version(self) -> int:
        """Version of the directory and shard layout."""
        return CAUSAL_FORMAT if self.objective is None else MASKED_FORMAT

    @property
    def retokenized(self) -> bool:
        """Whether the targets were rewritten for a student with another tokenizer."""
        return "retokenized" in self.teacher

    @cached_property
    def predicts(self) -> TokenObjective:
        """Objective, which determines the token that each position of a window predicts.

        Raises InvalidArgumentError for an objective that is unknown to this library.
        """
        return objective_from_json(self.objective)

    def without_paths(self) -> Identity:
        """Return a copy of the identity with the folders removed from the teacher's name."""
        if not isinstance(self.teacher.get("name"), str):
            return self
        return replace(self, teacher={**self.teacher, "name": label_of(self.teacher["name"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as written to `cache.json`."""
        told = asdict(self) | {"format_version": self.format_version}
        if self.objective is None:  # identities of version 1 have no such field
            del told["objective"]
        return told

    @classmethod
    def from_json(cls, value: object) -> Identity:
        """Create an identity from JSON values that `to_json` returned.

        Raises CacheError if a field is missing, unknown or of the wrong type, or the version or the
        objective is unknown.
        """

        def damaged(problem: str) -> CacheError:
            return CacheError(f"the identity{problem}; restore cache.json from a copy")

        if not isinstance(value, dict):
            raise damaged(" is not a JSON object")
        version = value.get("format_version")
        if version not in (CAUSAL_FORMAT, MASKED_FORMAT):
            raise CacheError(
                f"the cache has format version {shown(version)}, this library reads "
                f"{CAUSAL_FORMAT} and {MASKED_FORMAT}; install the version of sparselogits that "
                "wrote it"
            )
        names = {"format_version", *(field.name for field in fields(cls))}
        if version == CAUSAL_FORMAT:
            names.remove("objective")
        if set(value) != names:
            odd = sorted(names.symmetric_difference(value))
            raise damaged(f" has missing or unknown fields: {shown(odd)}")
        for name, (kind, expected) in _FIELD_TYPES.items():
            wrong = name in names and not isinstance(value[name], kind)
            if wrong or isinstance(value.get(name), bool):
                raise damaged(f"'s {name} is {shown(value[name])}, expected {expected}")
        identity = cls(**{name: own for name, own in value.items() if name != "format_version"})
        try:
            identity.predicts  # noqa: B018
        except InvalidArgumentError as error:
            raise damaged(f"'s {error}") from error
        return identity

    def teacher_in_words(self) -> str:
        """Return the teacher's name and dtype on one line, for display."""
        name, dtype = (_one_line(self.teacher.get(key)) for key in ("name", "dtype"))
        return f"{name or 'unnamed'} ({dtype or 'unknown'})"

    def sampler_in_words(self) -> str:
        """Return the sampler's name and up to 16 parameters on one line, for display."""
        parameters = [
            f"{_one_line(k)} {_one_line(v)}"
            for k, v in self.sampler.items()
            if k != "name" and v is not None
        ]
        return f"{_one_line(self.sampler.get('name')) or 'unnamed'} ({', '.join(parameters[:16])})"

    def _compared(self) -> dict[str, Any]:
        """Return the identity as JSON values, without the teacher's name, which is for display."""
        compared = self.to_json()
        compared["teacher"] = {k: v for k, v in compared["teacher"].items() if k != "name"}
        return compared

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the canonical JSON of all fields except the teacher's name."""
        return hashlib.sha256(canonical_json(self._compared())).hexdigest()

    def differences(self, other: Identity) -> list[tuple[str, Any, Any]]:
        """Return (dotted field name, value in self, value in other) for every differing field.

        The teacher's name is not compared, and a missing field equals None.
        """
        return list(differing_fields(self._compared(), other._compared()))

    def require_equal(self, other: Identity, *, here: str, there: str) -> None:
        """Validate that two identities are equal, apart from the teacher's name.

        Args:
            other: identity to compare with.
            here: name of the object that `self` describes, for the message ("the cache at ...").
            there: name of the object that `other` describes.

        Raises:
            IdentityMismatchError: the identities differ.
        """
        found = self.differences(other)
        if found:
            lines = "\n".join(
                f"  {name}: {shown(a)} in {here}, {shown(b)} in {there}"
                for name, a, b in found[:20]
            )
            raise IdentityMismatchError(
                f"{here} and {there} differ in their settings:\n{lines}\n"
                "Use the same settings, or choose another output directory."
            )


def label_of(name: str) -> str:
    """Return the name of a model or text without local folders, for publication.

    Examples:
        >>> label_of("/home/me/models/teacher/"), label_of("HuggingFaceTB/SmolLM2-135M")
        ('teacher', 'HuggingFaceTB/SmolLM2-135M')
        >>> label_of("/c/hub/models--org--name/snapshots/0123"), label_of("../texts/*.jsonl")
        ('org/name', '*.jsonl')
    """
    snapshot = _SNAPSHOT.search(name)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..", "~")]
    if _HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    return parts[-1] if parts else "unnamed"


def _one_line(value: object) -> str:
    """Return a value of an identity as one line of text; an empty string for None."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else shown(value)
    return " ".join(printable(text, 200).split())


def canonical_json(value: object) -> bytes:
    """Encode a value as JSON in UTF-8 with sorted keys, and no spaces between tokens.

    Raises ValueError for a float that is not finite.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def differing_fields(
    here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, value in `here`, value in `there`) for each difference of two mappings.

    Nested mappings are compared key by key; a missing key equals None.

    Examples:
        >>> list(differing_fields({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}))
        [('b.c', 2, 3)]
    """
    for key in sorted(set(here) | set(there)):
        a, b = here.get(key), there.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
