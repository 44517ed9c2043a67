"""What a cache was made from: a canonical description, and its hash.

Two shards belong together exactly when their identities are equal. The description holds what
changes the *meaning* of the targets (teacher, tokenizer, sampler, packing, ...) or of the bytes
(codec, format); versions of libraries and the device change only low-order bits and stand in each
shard's provenance instead. The corpus is not part of it, so that text can be appended: each shard
carries the fingerprint of its own piece of text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
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
    """Everything two shards must share to stand in one cache.

    Args:
        teacher: name (for people, not compared), sha256 of its weights, dtype, engine,
            quantization.
        tokenizer: sha256 of the tokenizer's canonical bytes.
        vocab_size: columns of the teacher's head.
        token_mask: sha256 of the bitmap of ids that are tokens, or "all".
        window_length: positions a window.
        windows_per_shard: windows a shard file covers.
        packing: separator and beginning-of-text ids, attention reset, hold-out share.
        sampler: its name and all its parameters.
        seed: of the uniforms, together with the window index.
        temperature: the teacher's logits are divided by it before sampling.
        codec: name and parameters of the coding of targets.
        format_version: of the directory and shard layout.
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
        """Return the same identity with a teacher's name that tells no folder of this machine."""
        if not isinstance(self.teacher.get("name"), str):
            return self
        return replace(self, teacher={**self.teacher, "name": label_of(self.teacher["name"])})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as written to `cache.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Identity:
        """Read what `to_json` wrote.

        Raises:
            CacheError: for missing or unknown fields, or a newer format version.
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
            raise CacheError(f"the identity has missing or unknown fields: {shown(odd)}")
        for name, kind in _KINDS.items():
            if not isinstance(value[name], kind) or isinstance(value[name], bool):
                raise CacheError(f"the identity's {name} is {shown(value[name])}, which cannot be")
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
        """sha256, in hex, of the canonical JSON of everything that is compared."""
        return hashlib.sha256(canonical_json(self._compared())).hexdigest()

    def differences(self, other: Identity) -> list[tuple[str, Any, Any]]:
        """(dotted field, here, there) for every field that differs."""
        return list(_differences("", self._compared(), other._compared()))

    def require_equal(self, other: Identity, *, here: str, there: str) -> None:
        """Insist that two identities are one.

        Args:
            other: the identity to compare with.
            here: what `self` describes, for the message ("the cache at ...").
            there: what `other` describes.

        Raises:
            IdentityMismatchError: naming every differing field and both values.
        """
        found = self.differences(other)
        if found:
            lines = "\n".join(
                f"  {name}: {shown(a)} in {here}, {shown(b)} in {there}"
                for name, a, b in found[:20]
            )
            raise IdentityMismatchError(
                f"{here} and {there} were not made alike:\n{lines}\n"
                "Use the same settings, or choose another output directory."
            )


def label_of(name: str) -> str:
    """Return what may be published of the name of a model or a text: a hub name, or no folders.

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
    """Return a value of an identity as it is shown on one line; an empty text for none."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else shown(value)
    return " ".join(printable(text, 200).split())


def canonical_json(value: object) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces, UTF-8, shortest floats."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _differences(prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Any:
    for key in sorted(set(a) | set(b)):
        here, there = a.get(key), b.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from _differences(f"{prefix}{key}.", here, there)
        elif here != there:
            yield f"{prefix}{key}", here, there
