"""Test that invalid arguments are rejected by name before the teacher runs."""

import json
import math
from typing import Any

import numpy as np
import pytest

from sparselogits.caching import CacheRequest, import_collected, retokenize
from sparselogits.caching.executors import Workers
from sparselogits.caching.plan import Share
from sparselogits.corpus import Packing
from sparselogits.errors import InvalidArgumentError, require_whole
from sparselogits.samplers import Systematic, TopP
from tests.conftest import build_cache

WRONG = [0, -1, True, 2.0, math.nan, "8", None]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["batch", "windows_per_shard"])
def test_a_build_with_an_invalid_number(
    name: str, value: Any, tmp_path, tokenizer, teacher_folder, packed_text
):
    with pytest.raises(InvalidArgumentError, match=f"{name} is .* whole number of at least 1"):
        build_cache(
            teacher_folder,
            packed_text(32),
            tmp_path / "c",
            Systematic(5),
            tokenizer,
            **{name: value},
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": True}, "seed is True"),
        ({"temperature": 0.0}, r"the temperature is 0.0; give a number from 1e-06 to 1e\+06"),
        ({"temperature": math.nan}, "the temperature is nan"),
        ({"budget": 0.5}, "the budget is 0.5; give a finite mean number .* of at least 1"),
        ({"budget": math.inf}, "the budget is inf"),
        ({"sampler": TopP(), "budget": 5}, "give its parameters instead"),
    ],
)
def test_a_request_with_an_invalid_setting(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        CacheRequest("cache", **({"sampler": Systematic()} | changes))


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (0, 0, "number of workers is 0"),
        (2, 2, "index of a worker is 2; expected .* at most 1"),
        (-1, 2, "index of a worker is -1"),
        (True, 2, "index of a worker is True"),
    ],
)
def test_a_share_of_no_worker(index: int, count: int, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        Share(index, count)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), "number of workers is 0"),
        ((1, 0), "number of threads per worker is 0"),
        ((1, 1, -0.5), "number of GPUs per worker is -0.5"),
        ((1, 1, math.nan), "number of GPUs per worker is nan"),
    ],
)
def test_workers_that_cannot_run(values: tuple[Any, ...], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        Workers(*values)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8"])
@pytest.mark.parametrize("name", ["window", "k", "windows_per_shard", "vocab_size"])
def test_an_import_with_an_invalid_number(name: str, value: Any, tmp_path, tokenizer):
    options = {"vocab_size": 700} | {name: value}
    with pytest.raises(InvalidArgumentError, match=f"{name} is .* whole number of at least [12]"):
        import_collected(str(tmp_path / "none.jsonl"), tokenizer, tmp_path / "out", **options)


@pytest.mark.parametrize(("name", "value"), [("followed", -1), ("followed", 1.5), ("window", 2.0)])
def test_a_rewrite_with_an_invalid_number(name: str, value: Any, tmp_path, cache, tokenizer):
    with pytest.raises(InvalidArgumentError, match=f"{name}.* is .* whole number of at least [02]"):
        retokenize(cache, tokenizer, tmp_path / "out", **{name: value})


def test_numbers_of_numpy_become_python_numbers():
    """An identity is JSON, and its fingerprint that of the same Python numbers."""
    one, half = np.int64(1), np.float32(0.5)
    request = CacheRequest("cache", Systematic(one, half), seed=np.uint64(2**64 - 1))
    packing = Packing(np.int32(64), separator_id=one, bos_id=one, holdout=half)
    share = Share(one, np.int16(2))
    made = [request.sampler.parameters(), request.seed, packing.to_json(), share.index, share.count]
    expected = [{"rounds": 1, "proposal_exponent": 0.5}, 2**64 - 1]
    expected += [Packing(64, separator_id=1, bos_id=1, holdout=0.5).to_json(), 1, 2]
    assert json.dumps(made) == json.dumps(expected)
    tempered = CacheRequest("cache", Systematic(), temperature=half)
    assert type(tempered.temperature) is float
    for refused in (np.True_, np.float64(2), np.int64(0)):
        with pytest.raises(InvalidArgumentError, match="expected a whole number of at least 1"):
            require_whole("k", refused, 1)
