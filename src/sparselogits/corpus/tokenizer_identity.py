"""Fingerprint tokenizers, and validate that two tokenizers map ids to the same tokens.

A cache's identity contains a fingerprint of all values that determine the ids for a text. A
student does not need an equal fingerprint: an instruct model and its base have the same tokens, but
may use different tokens as end of text or as padding, or one model may have additional tokens. Each
shard therefore also records what is needed to compare the tokens (`TokenizerFingerprint.record`).
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

ROLES = ("eos", "bos", "unk", "sep", "pad", "cls", "mask")
"""Roles of special tokens, as in the attributes `eos_token_id`, ... of a transformers tokenizer.

A token with several roles is mapped to another tokenizer by the first of them.
"""

_MOST_RECORDED = 512  # maximum number of added tokens in a record


class TokenizerFingerprint(str):
    """Hexadecimal sha256 of all values that determine the ids of a text.

    Args:
        value: the fingerprint.
        ids: hexadecimal sha256 of the model (vocabulary, merges), normaliser and pre-tokenizer,
            without added tokens; for a slow tokenizer, of its class, vocabulary and vocabulary
            files.
        added: texts of the tokens that were added to the vocabulary, by their ids as strings.
        roles: texts of the special tokens by role ("eos", "pad", ...).
    """

    ids: str
    added: dict[str, str]
    roles: dict[str, str]

    def __new__(
        cls, value: str, ids: str, added: Mapping[str, str], roles: Mapping[str, str]
    ) -> TokenizerFingerprint:
        """Create a fingerprint; the class documents the arguments."""
        fingerprint = super().__new__(cls, value)
        fingerprint.ids, fingerprint.added, fingerprint.roles = ids, dict(added), dict(roles)
        return fingerprint

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.ids, self.added, self.roles

    def record(self) -> dict[str, Any]:
        """Return a description of the tokenizer for a shard's provenance, as plain JSON values.

        More than 512 added tokens are recorded as one hash.
        """
        few = len(self.added) <= _MOST_RECORDED
        return {
            "ids": self.ids,
            "added": self.added if few else _sha256(self.added),
            "roles": self.roles,
        }


def tokenizer_fingerprint(tokenizer: Any) -> TokenizerFingerprint:
    """Return the fingerprint of a tokenizer.

    A fast tokenizer is described by the canonical JSON of the compiled tokenizer, without the state
    of the last call (truncation, padding), and a slow tokenizer by its class, its vocabulary and
    the vocabulary files. The ids of the special tokens and `split_special_tokens` are hashed too.
    Saving and loading a tokenizer preserves its fingerprint.

    Args:
        tokenizer: a transformers tokenizer.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ROLES}
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
    roles = {name: getattr(tokenizer, f"{name}_token", None) for name in ROLES}
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
    """Validate that each id of a tokenizer stands for the same token as in a cache.

    Roles of special tokens, chat template and padding may differ, and each tokenizer may have added
    tokens that the other lacks, if no id stands for two different tokens. Added tokens that are
    recorded as one hash must be equal. A `SparseLogitsWarning` states differences in roles and
    added tokens.

    Args:
        tokenizer: a transformers tokenizer, or its fingerprint.
        expected: fingerprint in the cache's identity (`tokenizer_fingerprint`).
        recorded: description in a shard's provenance (`Cache.recorded_tokenizer`); None for a cache
            of an older version without it; only an identical tokenizer is then accepted.
        whose: name of the tokenizer in messages, as in "the tokenizer given".
        origin: name in messages of the data that need the expected tokenizer, as in "the cache".
        allow: names of `ALLOWANCES`; "other-tokenizer" turns the error into a warning.

    Raises:
        IdentityMismatchError: vocabulary, normalisation or pre-tokenizer differs, an id stands for
            two different tokens, or `recorded` is None and the fingerprints differ.
    """
    found = tokenizer
    if not isinstance(tokenizer, TokenizerFingerprint):
        found = tokenizer_fingerprint(tokenizer)
    if found == expected:
        return
    cached = recorded if isinstance(recorded, Mapping) else {}
    cached_added = cached.get("added")
    if cached.get("ids") == found.ids:
        conflict = _conflict(found, cached_added, origin)
        if conflict is None:
            difference = _difference(found, cached.get("roles"), cached_added, origin)
            if difference:
                warnings.warn(
                    f"the ids of {whose} are the same tokens as in {origin}, but the tokenizer "
                    f"differs in: {difference}. If this is unintended, use that of {origin}",
                    SparseLogitsWarning,
                    stacklevel=2,
                )
            return
        reason = f"its ids mean other tokens: {conflict}"
    elif "ids" in cached:
        reason = "its ids mean other tokens (vocabulary, merges, normalisation or pre-tokenizer)"
    else:
        reason = (
            f"{origin} records only this fingerprint and not its tokens, so other roles of special "
            "tokens cannot be distinguished from other ids"
        )
    error = IdentityMismatchError(
        f"{whose} ({found[:12]}...) is not the tokenizer of {origin} "
        f"({expected[:12]}...): {reason}. Use the tokenizer of {origin}"
    )
    refuse(error, "other-tokenizer", allow)


def _conflict(found: TokenizerFingerprint, cached_added: object, origin: str) -> str | None:
    """Return a clause about the first id whose added token differs; None if there is no such id.

    If the added tokens of the cache are recorded as a hash, the hashes are compared.
    """
    if not isinstance(cached_added, Mapping):
        return None if cached_added == found.record()["added"] else "added tokens differ"
    for id_, token in found.added.items():
        if cached_added.get(id_, token) != token:
            return f"id {id_} is {token!r} here and {cached_added[id_]!r} in {origin}"
    return None


def _difference(
    found: TokenizerFingerprint, cached_roles: object, cached_added: object, origin: str
) -> str:
    """Return the differences in roles and added tokens, for a warning; empty if there are none."""
    other = cached_roles if isinstance(cached_roles, Mapping) else {}
    differences = [
        f"{role} is {found.roles.get(role)!r} here and {other.get(role)!r} in {origin}"
        for role in ROLES
        if found.roles.get(role) != other.get(role)
    ]
    if isinstance(cached_added, Mapping):
        for more, less, where in (
            (cached_added, found.added, f"in {origin}"),
            (found.added, cached_added, "here"),
        ):
            extra = [str(more[id_]) for id_ in more if id_ not in less]
            if extra:
                number = "1 added token is" if len(extra) == 1 else f"{len(extra)} added tokens are"
                differences.append(f"{number} only {where}, as {extra[0]!r}")
    return ", ".join(differences)


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in tokenizer.save_vocabulary(folder) if path]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
