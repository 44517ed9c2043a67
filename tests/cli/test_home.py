"""Test that commands replace `~` where the shell does not."""

import sys

import pytest

from sparselogits.cli import main


@pytest.mark.parametrize(
    "words", ["info ~/none", "train --cache=~/none --student-config tiny --out=~/run"]
)
def test_a_path_in_the_home_folder(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sparselogits", *words.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"no cache at {tmp_path}/none" in capfd.readouterr().err.replace("\n", "")
    assert not (tmp_path / "run").exists()
