"""Test that a device is rejected before work starts if it is not available or cannot be used."""

import pytest
import torch

from sparselogits.devices import resolve_device, resolve_training_device
from sparselogits.errors import InvalidArgumentError
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe

NUMBERED = r"the device is cuda:{0}, but training uses all visible GPUs.* CUDA_VISIBLE_DEVICES={0}"


def test_devices_that_exist():
    assert resolve_device("cpu") == resolve_training_device("cpu") == "cpu"
    assert resolve_training_device("cpu:0") == "cpu:0"
    assert resolve_training_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("resolve", [resolve_device, resolve_training_device])
def test_a_device_that_does_not_exist(resolve):
    with pytest.raises(InvalidArgumentError, match="the device tpu is not available here"):
        resolve("tpu")


def test_training_on_one_of_several_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for number in (0, 1):
        with pytest.raises(InvalidArgumentError, match=NUMBERED.format(number)):
            resolve_training_device(f"cuda:{number}")


def test_a_run_rejects_the_devices_that_the_command_rejects(tmp_path):
    out = tmp_path / "out"
    recipe = parse_recipe(
        {"cache": str(tmp_path / "c"), "out": str(out), "student": {"size": "tiny"}},
        source="a test",
    )
    with pytest.raises(InvalidArgumentError, match=NUMBERED.format(1)):
        run(recipe, device="cuda:1")
    assert not out.exists()
