"""Test forged caches with valid checksums and invalid values.

The contents of a shard are bounded (docs/format.md, "What a reader may expect"): each forged value
is rejected where it is decoded, by reading and by `verify`, with the file and the windows in the
error. tests/faults/strangers.py tests memory.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparselogits.errors import CacheCorruptionError, CacheError
from sparselogits.store import Cache, repair, verify
from sparselogits.store.cache import same_record
from tests.faults.forge import Shard, fingerprint_of, write_identity
from tests.store.draws import KINDS, identity, records

Change = Callable[[Shard], None]


def column(name: str, row: int, value: Any) -> Change:
    def change(shard: Shard) -> None:
        shard.columns[name][row] = value
        shard.bind_text()

    return change


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda shard: shard.columns[name].__setitem__(3, change(shard.columns[name][3]))


def hidden(name: str, value: float) -> Change:
    """A figure of a row of which the footer says nothing."""
    return lambda shard: shard.columns[name].__setitem__(3, value)


def number(name: str, place: int, value: float) -> Change:
    return lambda shard: shard.numbers[name][3].__setitem__(place, value)


def about(**changes: Any) -> Change:
    return lambda shard: shard.description.update(changes)


def text(content: bytes) -> Change:
    return lambda shard: setattr(shard, "text", content)


def starts(*positions: int) -> Change:
    return column("document_starts", 3, np.array(positions, np.int64))


TOKENS = np.arange(64)

VALUES: dict[str, tuple[str, Change, str]] = {
    "weight of 3e38": ("float32", number("weights", 5, 3e38), "weights from"),
    "weight of 400": ("topk", number("weights", 5, 400.0), "weights from"),
    "mass of 400": ("topk", lambda s: s.numbers["weights"][3].fill(0.9), "position sum to"),
    "weight NaN": ("float32", number("weights", 5, float("nan")), "weights from nan"),
    "weight infinite": ("float32", number("weights", 5, float("inf")), "weights from"),
    "weight negative": ("float32", number("weights", 5, -0.5), "weights from -0.5"),
    "weight NaN beside rounds": ("counts+float32", number("weights", 5, np.nan), "weights"),
    "weight beyond the proposal's": ("plain", number("weights", 5, 1.5), "weights from"),
    "weight below tau": ("threshold", number("weights", 0, 0.01), "weights from 0.01"),
    "weight above one beside tau": ("threshold", number("weights", 0, 2.5), "weights from"),
    "level of 2^32 - 1": ("float32-rounded", number("levels", 5, 2**32 - 1), "level 4294967295"),
    "level behind the last": ("float32-rounded", number("levels", 5, 7587), "level 7587"),
    "the last level": ("float32-rounded", number("levels", 5, 7586), "weights from"),
    "level below tau": ("threshold-rounded", number("levels", 0, 3809), "weights from 0.0078"),
    "level above one": ("threshold-rounded", number("levels", 0, 4547), "weights from"),
    "flag of 2": ("threshold", number("heavy", 5, 2), "flags"),
    "count of 2^32 - 1": ("counts", number("counts", 5, 2**32 - 1), "exceed its 21 rounds"),
    "counts beyond N": ("counts", number("counts", 5, 25), "exceed its 21 rounds"),
    "input beyond V": ("masked-counts", changed("inputs", lambda i: i + 1000), "input outside"),
    "an input too few": ("masked-counts", changed("inputs", lambda i: i[1:]), "one input per"),
    "no mask beside inputs": ("masked-counts", column("mask", 3, None), "no mask"),
    "rate of 0": ("masked-counts", column("rate", 3, 0.0), "window 3 has a rate"),
    "rate NaN": ("masked-counts", column("rate", 3, float("nan")), "window 3 has a rate"),
    "token beyond V": ("counts", column("tokens", 3, TOKENS + 960), "window 3 has a token"),
    "token of -1": ("counts", column("tokens", 3, TOKENS - 1), "window 3 has a token"),
    "a token too few": ("counts", column("tokens", 3, TOKENS[1:]), "511 values"),
    "tokens of another length": (
        "counts",
        lambda s: (column("tokens", 3, TOKENS[1:])(s), column("tokens", 4, np.arange(65))(s)),
        "window 3 does not have 64 tokens",
    ),
    "start of -2^31": ("counts", starts(-(2**31)), "window 3 has the document start"),
    "start beyond L": ("counts", starts(3, 64), "window 3 has the document start"),
    "starts unsorted": ("counts", starts(30, 20), "window 3 has the document start"),
    "starts twice": ("counts", starts(20, 20), "window 3 has the document start"),
    "mask too short": ("counts", column("mask", 2, np.ones(63, bool)), "mask whose length"),
    "mask of another window": ("counts", column("mask", 2, np.ones(64, bool)), "damaged"),
    "loss NaN": ("counts", hidden("teacher_loss", np.nan), "teacher_loss outside"),
    "loss infinite": ("counts", hidden("teacher_loss", np.inf), "teacher_loss outside"),
    "loss negative": ("counts", column("teacher_loss", 3, -3.0), "teacher_loss outside"),
    "entropy beyond ln V": ("counts", column("teacher_entropy", 3, 9.0), "teacher_entropy"),
    "another window's number": ("counts", column("window_index", 3, 4), "index of another window"),
    "window of -1": ("counts", column("window_index", 3, -1), "index of another window"),
    "gaps beyond the window": ("counts", number("places_0", 0, 2**31), "gap exceeds"),
    "ids beyond V": ("counts", number("ids", 5, 2**31), "an id below 1000"),
    "lists of 2^31": (
        "counts",
        lambda s: s.lists.__setitem__(3, 2**31),
        "at most 1000, one per id",
    ),
    "sizes of 2^32 - 1": ("counts", number("sizes", 5, 2**32 - 1), "expected at most"),
    "hit of 2": ("counts", number("hits", 5, 2), "neither 0 nor 1"),
    "an empty block": ("counts", lambda s: s.columns.update(targets=[b""] * 8), "shorter"),
}

FOOTERS: dict[str, tuple[Change, str]] = {
    "tables a list": (about(tables=[]), "tables is []"),
    "tables null": (about(tables=None), "tables is None"),
    "tables of numbers": (about(tables={"hits": 3}), "coding tables"),
    "a table of three parts": (about(tables={"hits": [[0, "", 1]]}), "coding table"),
    "a table's start a float": (about(tables={"hits": [[0.5, ""]]}), "coding table"),
    "a table not base64": (about(tables={"hits": [[0, "\u00e9"]]}), "footer"),
    "provenance missing": (lambda s: s.description.pop("provenance"), "provenance"),
    "provenance a list": (about(provenance=[1]), "provenance is [1]"),
    "entries a string": (about(entries="many"), "entries is 'many'"),
    "entries negative": (about(entries=-1), "entries is -1"),
    "entries of 10^300": (about(entries=10**300), "entries is"),
    "entries true": (about(entries=True), "entries is True"),
    "positions a float": (about(positions=1.5), "positions is 1.5"),
    "loss null": (about(teacher_loss=None), "teacher_loss is None"),
    "loss NaN": (text(b'{"teacher_loss": NaN}'), "NaN is not a JSON number"),
    "nested deep": (text(b"[" * 10**5), "nested too deep"),
    "many values": (text(b"[" + b"[]," * 10**6 + b"0]"), "the footer has"),
    "no object": (text(b"[]"), "does not contain a description"),
    "no JSON": (text(b"\xff\x00"), "footer"),
    "half a character": (text(b'{"a": "\\ud800"}'), "surrogate"),
    "another fingerprint": (about(fingerprint="\x1b[2J"), "fingerprint '\\x1b[2J'"),
    "other windows": (about(stop=9), "description states"),
    "start as a float": (about(start=0.5), "description states"),
}


def forged(kind: str, change: Change, folder: Path) -> Path:
    named: dict[str, Any] = {
        "topk": ("float32", {"name": "topk", "k": 8}),
        "plain": ("counts+float32", {"name": "systematic", "rounds": 21, "proposal_exponent": 1.0}),
    }
    kind, sampler = named.get(kind, (kind, {"name": kind}))
    shard = Shard.of(identity(kind, sampler=sampler), records(kind, 0, 8))
    change(shard)
    shard.description["start"] = shard.description.get("start", 0)
    return shard.write(folder)


def require_refused(folder: Path, said: str) -> None:
    cache = Cache.open(folder)
    with pytest.raises(CacheCorruptionError) as caught:
        list(map(cache.read, range(8)))
    told = str(caught.value)
    assert said in told or said == "damaged", told
    assert "windows-000000000000-000000000008.parquet" in told
    assert any(f"windows {w}" in told for w in ("0 to 7", "3 to 3", "2 to 2", "0 to 0")), told
    (report,) = verify(cache).shards
    assert said in str(report.error) or said == "damaged"
    moved = repair(Cache.open(folder))
    assert [before for before, _ in moved.set_aside] == [report.name]
    assert Cache.open(folder).finished() == []


@pytest.mark.parametrize("what", VALUES)
def test_a_forged_value_is_refused_where_it_is_decoded(what, tmp_path):
    kind, change, said = VALUES[what]
    forged(kind, change, tmp_path)
    require_refused(tmp_path, said)


@pytest.mark.parametrize("what", FOOTERS)
def test_a_forged_footer_is_refused_and_set_aside(what, tmp_path):
    change, said = FOOTERS[what]
    path = forged("counts", change, tmp_path)
    path.rename(path.with_name("windows-000000000000-000000000008.parquet"))
    with pytest.raises(CacheCorruptionError, match="footer"):
        Cache.open(tmp_path).statistics()
    require_refused(tmp_path, said)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forger_s_sound_shard_is_sound(kind, tmp_path):
    """Without which refusing what it makes would say nothing."""
    made = records(kind, 0, 19)
    Shard.of(identity(kind), made).write(tmp_path)
    cache = Cache.open(tmp_path)
    assert verify(cache).ok
    assert all(same_record(cache.read(i), record) for i, record in enumerate(made))


IDENTITIES: dict[str, tuple[dict[str, Any], str]] = {
    "rounds of 2^31": ({"codec": {"rounds": 2**31}}, "codec.rounds is 2147483648"),
    "rounds of 2^64": ({"codec": {"rounds": 2**64}}, "codec.rounds is"),
    "no rounds": ({"codec": {"rounds": 0}}, "codec.rounds is 0"),
    "rounds of 20.5": ({"codec": {"rounds": 20.5}}, "codec.rounds is 20.5"),
    "rounds true": ({"codec": {"rounds": True}}, "codec.rounds is True"),
    "rounds that the sampler has not": ({"sampler": {"rounds": 12}}, "sampler has rounds 12"),
    "weights a list": ({"codec": {"weights": ["counts"]}}, "this library reads"),
    "codec of another version": ({"codec": {"version": 3}}, "this library reads"),
    "counts that are rounded": ({"codec": {"version": 2, "rounding": "nearest"}}, "other than"),
    "version 2 without rounding": ({"codec": {"version": 2}}, "other than"),
    "exact weights with rounding": ({"codec": {"rounding": "nearest"}}, "has no rounding"),
    "tau beside rounds": ({"codec": {"tau": 0.5}}, "no tau"),
    "a vocabulary of 2^31": ({"vocab_size": 2**31}, "vocab_size is"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size is 0"),
    "windows of 2^40": ({"window_length": 2**40}, "window_length is"),
    "windows of -1": ({"window_length": -1}, "window_length is -1"),
    "temperature of 0": ({"temperature": 0}, "temperature is 0"),
    "seed of 10^4000": ({"seed": 10**4000}, "seed is"),
    "format of a list": ({"format_version": [1] * 10**4}, "format version"),
    "objective beside format 1": ({"objective": {}}, "unknown fields"),
    "an unknown field": ({"\x1b]0;x\x07": 1}, "unknown fields"),
    "a teacher of text": ({"teacher": "gpt"}, "teacher"),
    "vocabulary a dict": ({"vocab_size": {"a": [1] * 10**4}}, "vocab_size"),
}


@pytest.mark.parametrize("what", IDENTITIES)
def test_a_forged_identity_is_refused_when_the_cache_is_opened(what, tmp_path):
    changes, said = IDENTITIES[what]
    content = identity("counts").to_json()
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = {**content[key], **value} if merged else value
    text = json.dumps({"fingerprint": fingerprint_of(content), "identity": content})
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CacheError) as caught:
        Cache.open(tmp_path)
    told = str(caught.value)
    assert said in told, told
    assert len(told) < 2000
    assert told.isprintable()


CACHE_JSONS: dict[str, bytes] = {
    "an array of arrays": b"[" + b"[]," * 300_000 + b"[]]",
    "192 MiB": b"[" * 1_100_000,
    "nested": b'{"identity":' + b"[" * 200_000,
    "a list": b"[1, 2]",
    "null": b"null",
    "half a character": b'{"fingerprint": "\\ud800", "identity": {}}',
    "UTF-16": "{}".encode("utf-16"),
    "NaN": b'{"identity": NaN}',
    "empty": b"",
    "numbers of a megabyte": b"[" + b"9" * 900_000 + b"]",
}


@pytest.mark.parametrize("what", CACHE_JSONS)
def test_a_forged_cache_json_is_damage(what, tmp_path):
    (tmp_path / "cache.json").write_bytes(CACHE_JSONS[what])
    with pytest.raises(CacheCorruptionError, match=r"cache\.json"):
        Cache.open(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
@pytest.mark.parametrize("name", ["cache.json", "shards/windows-000000000000-000000000008.parquet"])
def test_nothing_but_a_regular_file_is_read(name, kind, tmp_path):
    forged("counts", lambda _: None, tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140600)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CacheCorruptionError, match="where a regular file is expected"):
        Cache.open(tmp_path).read(0)
    if name != "cache.json":
        assert "regular file" in str(verify(Cache.open(tmp_path)).shards[0].error)


def test_a_long_window_is_decoded_alone(tmp_path):
    """Those that follow it in the row group would otherwise be decoded with it, in vain."""
    write_identity(tmp_path, identity("counts", window_length=1 << 20))
    assert Cache.open(tmp_path).identity.window_length == 1 << 20
