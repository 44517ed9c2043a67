"""Test the way from each kind of input to a student, as shell scripts, with all messages.

A script runs line by line in this process, with a tiny model instead of `demo`; text-file.sh also
runs in a separate shell. `make journey` runs the scripts with the real `demo`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparselogits.cli import main
from tests.journeys.material import write_material
from tests.stand_ins import stand_in_for_named_models
from tests.test_docs_code import assert_command

SCRIPTS = sorted(Path(__file__).parent.glob("*.sh"))


@pytest.fixture
def desk(tmp_path, tokenizer, monkeypatch) -> dict[str, str]:
    write_material(tmp_path / "desk", 30_000)
    monkeypatch.chdir(tmp_path / "desk")
    return stand_in_for_named_models(tmp_path / "home", tokenizer, monkeypatch)


def lines(script: Path) -> list[list[str]]:
    found = (shlex.split(line, comments=True) for line in script.read_text().splitlines())
    return [words for words in found if words]


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_journey(script, capsys, monkeypatch):
    for words in lines(script):
        if words[0] == "python":
            code = words[2] if words[1] == "-c" else Path(words[1]).read_text()
            exec(compile(code, script.name, "exec"), {"__name__": "__main__"})
            capsys.readouterr()
            continue
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code in (0, None), said.err
        require_good_messages(said.out, said.err, " ".join(words))


def require_good_messages(out: str, err: str, command: str) -> None:
    """Nothing that a new user would stumble over, and the next step at the end."""
    everything = out + err
    assert "Traceback" not in everything
    assert not re.search(r"Warning:|FutureWarning|deprecated", everything), everything
    assert not re.search(
        r"(?<![\d.,])1 (shards|windows|entries|rows|files|tokens|steps)\b", everything
    )
    assert not re.search(r"(?<![\d.,])0(\.0)?( [a-zA-Z]+)?/s", err), err
    assert not re.search(r"\b(nan|inf|None)\b", everything), everything
    last = err.strip().splitlines()[-1]
    assert last.startswith("Next: "), err
    if last.startswith("Next: sparselogits"):
        assert_command(shlex.split(last.removeprefix("Next: ")), command)


@pytest.mark.slow
def test_a_journey_in_a_shell(desk, tmp_path):
    """What an installation has: the command on the path, a process each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    # no link to the interpreter: it would not find its environment
    for name, words in (("sparselogits", "-m sparselogits "), ("python", "")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        command.chmod(0o755)
    environment = os.environ | desk | {"PATH": f"{folder}:{os.environ['PATH']}"}
    script = Path(__file__).with_name("text-file.sh")
    done = subprocess.run(
        ["bash", "-eu", str(script)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "generated_text" in done.stdout
    assert done.stderr.count("Next: sparselogits") == 4
