"""Which tokenizer a cache was made with, and whether another one gives ids the same meaning.

The identity of a cache holds a fingerprint of everything that decides which ids a text becomes.
That is stricter than what a student needs: an instruct model and its base share every token and
differ in which of them ends a text or pads a batch. So each shard also records what the ids mean,
without roles, chat template and padding, and the roles by name, to be able to say what differs.
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

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TokenizerFingerprint(str):
    """A sha256, in hex, of everything that decides which ids a text becomes.

    Args:
        value: the fingerprint.
        ids: sha256, in hex, of what the ids mean alone.
        roles: token by its role ("eos", "pad", ...), where the tokenizer has one.
    """

    ids: str
    roles: dict[str, str]

    def __new__(cls, value: str, ids: str, roles: Mapping[str, str]) -> TokenizerFingerprint:
        """Make a fingerprint; see the class."""
        made = super().__new__(cls, value)
        made.ids, made.roles = ids, dict(roles)
        return made

    def __getnewargs__(self) -> tuple[str, str, dict[str, str]]:  # type: ignore[override]
        return str(self), self.ids, self.roles

    def record(self) -> dict[str, Any]:
        """Return what a shard's provenance says about the tokenizer, as plain JSON values."""
        return {"ids": self.ids, "roles": self.roles}


def tokenizer_fingerprint(tokenizer: Any) -> TokenizerFingerprint:
    """Return the fingerprint of a tokenizer.

    For fast tokenizers that of the canonical JSON of the compiled tokenizer, without the state of
    its last call (truncation, padding), with the ids of the special tokens; for slow ones that of
    their vocabulary and its files. Saving and loading a tokenizer keeps the fingerprint.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _ROLES}
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    described: dict[str, Any] = {"special": special, "split_special_tokens": split}
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        described["backend"] = {
            key: value for key, value in state.items() if key not in ("truncation", "padding")
        }
        meaning = _meaning(state)
    else:
        meaning = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "files": _vocabulary_files(tokenizer),
        }
        described |= meaning
    roles = {name: getattr(tokenizer, f"{name}_token", None) for name in _ROLES}
    named = {name: str(token) for name, token in roles.items() if token is not None}
    return TokenizerFingerprint(_sha256(described), _sha256(meaning), named)


def require_tokenizer(
    tokenizer: Any,
    expected: str,
    recorded: object = None,
    *,
    whose: str = "the tokenizer given",
    allow: Collection[str] = (),
) -> None:
    """Check that the ids of a tokenizer mean what they mean in a cache.

    Roles of special tokens, chat template and padding may differ; roles that do are named in a
    `SparseLogitsWarning`.

    Args:
        tokenizer: a transformers tokenizer.
        expected: the cache's, from its identity (`tokenizer_fingerprint`).
        recorded: what a shard's provenance says (`Cache.recorded_tokenizer`); None in caches of
            versions that did not record it, where only the very same tokenizer is recognised.
        whose: what the tokenizer belongs to, for messages.
        allow: names of `ALLOWANCES`; "other-tokenizer" turns the error into a warning.

    Raises:
        IdentityMismatchError: ids that mean other tokens.
    """
    found = tokenizer_fingerprint(tokenizer)
    if found == expected:
        return
    there = recorded if isinstance(recorded, Mapping) else {}
    if there.get("ids") == found.ids:
        theirs = there.get("roles")
        differing = _differing(found.roles, theirs if isinstance(theirs, Mapping) else {})
        if differing:
            warnings.warn(
                f"{whose} has the ids of the cache's tokenizer, and other roles: {differing}",
                SparseLogitsWarning,
                stacklevel=2,
            )
        return
    if "ids" in there:
        known = "its ids mean other tokens (vocabulary, merges, normalisation or added tokens)"
    else:
        known = (
            "the cache does not record what its ids mean, only this fingerprint, so other roles of "
            "special tokens cannot be distinguished from other ids"
        )
    error = IdentityMismatchError(
        f"{whose} ({found[:12]}...) is not the one that the cache was made with "
        f"({expected[:12]}...): {known}. Give the tokenizer of the cache's teacher"
    )
    refuse(error, "other-tokenizer", allow)


def _differing(here: Mapping[str, str], there: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} is {here.get(name)!r} here and {there.get(name)!r} in the cache"
        for name in _ROLES
        if here.get(name) != there.get(name)
    )


def _meaning(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a compiled tokenizer that decide what its ids mean."""
    added = [
        {key: value for key, value in token.items() if key != "special"}
        for token in state.get("added_tokens") or ()
    ]
    return {
        "model": state.get("model"),
        "normalizer": state.get("normalizer"),
        "pre_tokenizer": state.get("pre_tokenizer"),
        "added_tokens": sorted(added, key=lambda token: token["id"]),
    }


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in tokenizer.save_vocabulary(folder) if path]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
