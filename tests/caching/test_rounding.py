"""Test that builds round real-valued weights, and resume a cache with its own coding."""

import pytest

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
from sparselogits.errors import IdentityMismatchError
from sparselogits.samplers import Systematic, TopK
from sparselogits.store import Cache, verify
from sparselogits.teacher import load_teacher

SHARD = 16


def test_a_cache_is_continued_as_it_was_begun(tmp_path, cache, teacher_folder, tokenizer):
    corpus = PackedCorpus.open(cache / "corpus")
    engine = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    how = {"tokenizer_hash": tokenizer_fingerprint(tokenizer), "windows_per_shard": SHARD}

    def build(name: str, *, exact: bool | None, stop: int = 2 * SHARD) -> Cache:
        drawn = Systematic(9, proposal_exponent=0.8) if name[0] == "s" else TopK(9)
        request = CacheRequest(tmp_path / name, drawn, exact_weights=exact)
        return build_caches(engine, corpus, [request], only=(0, stop), **how).caches[0]

    for name, rounding in (("s", "stochastic"), ("t", "nearest")):
        # as an older version began it, and as the default begins it
        build(f"{name}-exact", exact=True, stop=SHARD)
        exact = build(f"{name}-exact", exact=None)
        assert "rounding" not in exact.identity.codec
        build(f"{name}-interrupted", exact=None, stop=SHARD)
        continued, whole = (build(f"{name}-{how}", exact=None) for how in ("interrupted", "whole"))
        assert continued.identity.codec["rounding"] == rounding
        for windows in whole.finished():
            file = f"shards/windows-{windows[0]:012}-{windows[1]:012}.parquet"
            one, other = (tmp_path / f"{name}-{n}" / file for n in ("interrupted", "whole"))
            assert one.read_bytes() == other.read_bytes()
        assert verify(whole).ok
        sizes = [c.statistics().bits_per_entry for c in (exact, whole)]
        assert sizes[1] < 0.75 * sizes[0]
        with pytest.raises(IdentityMismatchError, match=r"codec\.rounding"):
            build(f"{name}-whole", exact=True)
        with pytest.raises(IdentityMismatchError, match=r"codec\.rounding"):
            build(f"{name}-exact", exact=False)
