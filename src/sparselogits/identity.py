"""Describe what a cache was made from, in canonical form, and hash the description.

Two shards belong together exactly when their identities are equal. An identity holds what changes
the *meaning* of the targets (teacher, tokenizer, sampler, packing, ...) or of the bytes (codec,
format); versions of libraries and the device change only low-order bits and are recorded in each
shard's provenance instead. The corpus is not part of the identity, so that text can be appended:
each shard carries the fingerprint of its own piece of text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.untrusted import printable, shown

FORMAT_VERSION = 1
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")
_SNAPSHOT = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+?)/snapshots/")
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("teacher", "packing", "sampler", "codec"), dict),
    **dict.fromkeys(("tokenizer", "token_mask"), str),
    **dict.fromkeys(("vocab_size", "window_length", "windows_per_shard", "seed"), int),
    "temperature": (int, float),
}


@dataclass(frozen=True)
class Identity:
    """Everything that two shards must share to belong to one cache.

    Args:
        teacher: name (for people, not compared), sha256 of the weights, dtype, engine and
            quantization of the teacher.
        tokenizer: sha256 of the tokenizer's canonical bytes.
        vocab_size: number of columns of the teacher's head.
        token_mask: sha256 of the bitmap of ids that are tokens, or "all".
        window_length: number of positions per window.
        windows_per_shard: number of windows per shard file.
        packing: separator and beginning-of-text ids, attention reset, hold-out share.
        sampler: name and all parameters of the sampler.
        seed: seed of the uniforms, together with the window index.
        temperature: temperature by which the teacher's logits are divided before sampling.
        codec: name and parameters of the coding of targets.
        format_version: version of the directory and shard layout.
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
    format_version: int = FORMAT_VERSION

    def without_paths(self) -> Identity:
        """Return the same identity with the folders removed from the teacher's name."""
        if not isinstance(self.teacher.get("name"), str):
            return self
        return replace(self, teacher={**self.teacher, "name": label_of(self.teacher["name"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as written to `cache.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Identity:
        """Return the identity that `to_json` wrote.

        Raises:
            CacheError: a field is missing, unknown or of the wrong type, or the format version is
                another one.
        """
        if not isinstance(value, dict):
            raise CacheError("the identity is not a JSON object; restore cache.json from a copy")
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise CacheError(
                f"the cache has format version {shown(version)}, this library reads "
                f"{FORMAT_VERSION}; install the version of sparselogits that wrote it"
            )
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            odd = sorted(names.symmetric_difference(value))
            raise CacheError(
                f"the identity has missing or unknown fields: {shown(odd)}; restore cache.json "
                "from a copy"
            )
        for name, kind in _KINDS.items():
            if not isinstance(value[name], kind) or isinstance(value[name], bool):
                raise CacheError(
                    f"the identity's {name} is {shown(value[name])}, which has the wrong type; "
                    "restore cache.json from a copy"
                )
        return cls(**value)

    def teacher_in_words(self) -> str:
        """Return the teacher's name and dtype on one line, for people."""
        name, dtype = (_word(self.teacher.get(key)) for key in ("name", "dtype"))
        return f"{name or 'unnamed'} ({dtype or 'unknown'})"

    def sampler_in_words(self) -> str:
        """Return the sampler's name and parameters on one line, for people."""
        parameters = [
            f"{_word(k)} {_word(v)}"
            for k, v in self.sampler.items()
            if k != "name" and v is not None
        ]
        return f"{_word(self.sampler.get('name')) or 'unnamed'} ({', '.join(parameters[:16])})"

    def _compared(self) -> dict[str, Any]:
        compared = self.to_json()
        compared["teacher"] = {k: v for k, v in compared["teacher"].items() if k != "name"}
        return compared

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the canonical JSON of all fields that are compared."""
        return hashlib.sha256(canonical_json(self._compared())).hexdigest()

    def differences(self, other: Identity) -> list[tuple[str, Any, Any]]:
        """Return (dotted field, value here, value there) for every field that differs."""
        return list(differing_fields(self._compared(), other._compared()))

    def require_equal(self, other: Identity, *, here: str, there: str) -> None:
        """Validate that two identities are equal.

        Args:
            other: identity to compare with.
            here: what `self` describes, for the message ("the cache at ...").
            there: what `other` describes.

        Raises:
            IdentityMismatchError: the identities differ; names the fields and both values.
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
    """Return the name of a model or a text for publication: a hub name, or a name without folders.

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


def _word(value: object) -> str:
    """Return a value of an identity as one line of text; an empty text for None."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else shown(value)
    return " ".join(printable(text, 200).split())


def canonical_json(value: object) -> bytes:
    """Return the canonical bytes of a value: sorted keys, no spaces, UTF-8, shortest floats."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def differing_fields(
    here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, value here, value there) of every value that differs in nested mappings.

    A key that one mapping lacks counts as None there.

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
