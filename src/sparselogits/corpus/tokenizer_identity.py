"""Fingerprint tokenizers, and compare what their ids mean.

The identity of a cache holds a fingerprint of everything that decides which ids a text becomes.
That is stricter than what a student needs: an instruct model and its base share every token and
differ in which of them ends a text or pads a batch, or in a few tokens that one of them lacks. So
each shard also records what the ids mean (without roles, chat template and padding), the tokens
that were added to the vocabulary, and the roles by name, so that a message can say what differs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparselogits.allowances import refuse
from sparselogits.errors import IdentityMismatchError, SparseLogitsWarning
from sparselogits.identity import canonical_json

_RECORDED = 512
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TokenizerFingerprint(str):
    """sha256, in hex, of everything that decides which ids a text becomes.

    Args:
        value: the fingerprint.
        ids: sha256, in hex, of what the ids mean, without added tokens.
        added: tokens that were added to the vocabulary, by their ids as text.
        roles: tokens by their roles ("eos", "pad", ...).
    """

    ids: str
    added: dict[str, str]
    roles: dict[str, str]

    def __new__(
        cls, value: str, ids: str, added: Mapping[str, str], roles: Mapping[str, str]
    ) -> TokenizerFingerprint:
        """Create a fingerprint; see the class."""
        made = super().__new__(cls, value)
        made.ids, made.added, made.roles = ids, dict(added), dict(roles)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.ids, self.added, self.roles

    def record(self) -> dict[str, Any]:
        """Return what a shard's provenance records of the tokenizer, as plain JSON values.

        Thousands of added tokens are recorded as one hash.
        """
        few = len(self.added) <= _RECORDED
        return {
            "ids": self.ids,
            "added": self.added if few else _sha256(self.added),
            "roles": self.roles,
        }


def tokenizer_fingerprint(tokenizer: Any) -> TokenizerFingerprint:
    """Return the fingerprint of a tokenizer.

    It covers, for fast tokenizers, the canonical JSON of the compiled tokenizer, without the state
    of the last call (truncation, padding), and the ids of the special tokens; for slow ones, the
    vocabulary and its files. Saving and loading a tokenizer keeps the fingerprint.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _ROLES}
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    described: dict[str, Any] = {"special": special, "split_special_tokens": split}
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        described["backend"] = {
            key: value for key, value in state.items() if key not in ("truncation", "padding")
        }
        meaning = {name: state.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
        tokens = state.get("added_tokens") or ()
        added = {str(token["id"]): token["content"] for token in tokens}
    else:
        meaning = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "files": _vocabulary_files(tokenizer),
        }
        described |= meaning
        added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    roles = {name: getattr(tokenizer, f"{name}_token", None) for name in _ROLES}
    named = {name: str(token) for name, token in roles.items() if token is not None}
    return TokenizerFingerprint(_sha256(described), _sha256(meaning), added, named)


def require_tokenizer(
    tokenizer: Any,
    expected: str,
    recorded: object = None,
    *,
    whose: str = "the tokenizer given",
    origin: str = "the cache",
    allow: Collection[str] = (),
) -> None:
    """Check that the ids of a tokenizer mean what they mean in a cache.

    Roles of special tokens, chat template and padding may differ, and either tokenizer may have
    added tokens that the other lacks, as long as no id is two tokens; a `SparseLogitsWarning` says
    what differs.

    Args:
        tokenizer: a transformers tokenizer.
        expected: fingerprint in the cache's identity (`tokenizer_fingerprint`).
        recorded: what a shard's provenance records (`Cache.recorded_tokenizer`); None in caches of
            versions that did not record it, where only an identical tokenizer is recognised.
        whose: whose tokenizer it is, for messages.
        origin: what was made with the expected tokenizer, for messages.
        allow: names of `ALLOWANCES`; "other-tokenizer" turns the error into a warning.

    Raises:
        IdentityMismatchError: an id means another token.
    """
    found = tokenizer_fingerprint(tokenizer)
    if found == expected:
        return
    there = recorded if isinstance(recorded, Mapping) else {}
    own, theirs = found.added, there.get("added")
    if there.get("ids") == found.ids:
        clash = _clash(found, theirs, origin)
        if clash is None:
            differing = _differing(found.roles, there.get("roles"), own, theirs, origin)
            if differing:
                warnings.warn(
                    f"the ids of {whose} mean what they mean in {origin}, but it differs in: "
                    f"{differing}",
                    SparseLogitsWarning,
                    stacklevel=2,
                )
            return
        known = f"its ids mean other tokens: {clash}"
    elif "ids" in there:
        known = "its ids mean other tokens (vocabulary, merges, normalisation or pre-tokenizer)"
    else:
        known = (
            f"{origin} does not record what its ids mean, only this fingerprint, so other roles of "
            "special tokens cannot be distinguished from other ids"
        )
    error = IdentityMismatchError(
        f"{whose} ({found[:12]}...) is not the one that {origin} was made with "
        f"({expected[:12]}...): {known}. Use the tokenizer that {origin} was made with"
    )
    refuse(error, "other-tokenizer", allow)


def _clash(found: TokenizerFingerprint, theirs: object, origin: str) -> str | None:
    """Return a sentence on an id that is two different added tokens; None where there is none."""
    if not isinstance(theirs, Mapping):
        return None if theirs == found.record()["added"] else "added tokens differ"
    for place, token in found.added.items():
        if theirs.get(place, token) != token:
            return f"id {place} is {token!r} here and {theirs[place]!r} in {origin}"
    return None


def _differing(
    here: Mapping[str, str], there: object, own: Mapping[str, str], theirs: object, origin: str
) -> str:
    other = there if isinstance(there, Mapping) else {}
    found = [
        f"{name} is {here.get(name)!r} here and {other.get(name)!r} in {origin}"
        for name in _ROLES
        if here.get(name) != other.get(name)
    ]
    if isinstance(theirs, Mapping):
        for more, less, where in ((theirs, own, f"in {origin}"), (own, theirs, "here")):
            alone = [str(more[place]) for place in more if place not in less]
            if alone:
                said = "1 added token is" if len(alone) == 1 else f"{len(alone)} added tokens are"
                found.append(f"{said} {where} alone, as {alone[0]!r}")
    return ", ".join(found)


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in tokenizer.save_vocabulary(folder) if path]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
