"""Test that results name the commit of sparselogits, and of no other project."""

import subprocess
from pathlib import Path

import pytest

from sparselogits.lab.compare.provenance import commit_of

FILE = "sparselogits/lab/compare/provenance.py"


@pytest.fixture
def project(tmp_path) -> Path:
    """Provide a repository with a commit of `src/sparselogits` and an ignored environment."""
    for folder in ("src", "lib/python", "lib/python/site-packages", "vendored"):
        path = tmp_path / folder / FILE
        path.parent.mkdir(parents=True)
        path.write_text("")
    (tmp_path / ".gitignore").write_text("lib\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", ".gitignore", "src"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_the_commit_is_that_of_the_source_tree(project):
    command = ["git", "-C", str(project), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    file = project / "src" / FILE
    assert head.startswith(commit_of(file))
    file.write_text("changed")
    assert commit_of(file).endswith("-dirty")


@pytest.mark.parametrize("folder", ["lib/python", "lib/python/site-packages", "vendored"])
def test_an_installed_package_has_no_commit_of_another_project(project, folder):
    assert commit_of(project / folder / FILE) == "unknown"
