"""Test that the tests, scripts and pages that the documentation names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPT = re.compile(r"`(?:python |)((?:tests|benchmarks|experiments|examples|docs)/[\w./-]+\.\w+)")
TEST = re.compile(r"`(tests/[\w/]+\.py|)::(test_\w+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def joined(page: Path) -> str:
    """The page, with names that a line break cuts in two put together again."""
    return re.sub(r"(::|/)\n\s*", r"\1", page.read_text(encoding="utf-8"))


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page):
    file = ""
    for path, name in TEST.findall(joined(page)):
        file = path or file
        assert (ROOT / file).is_file(), file
        assert name in functions(ROOT / file), f"{page.name} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for path in SCRIPT.findall(joined(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for path in LINK.findall(joined(page)):
        assert (page.parent / path).exists(), f"{page.name} links {path}"


URL = re.compile(r"https?://[^\s)>`\"'|]+")
REVIEWED = [
    # each was looked up when it was added, which a test without a network cannot do again
    re.compile(r"https://github\.com/[\w.-]+/[\w.-]+(/(issues|pull)/\d+)?"),
    re.compile(r"https://aclanthology\.org/2025\.acl-long\.885/"),
    re.compile(r"https://s3fs\.readthedocs\.io"),
    re.compile(r"https://docs\.vllm\.ai/en/latest/features/[\w/]+/"),
    re.compile(r"https://tinker-docs\.thinkingmachines\.ai/tinker/losses/cross-entropy"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_elsewhere_are_of_a_reviewed_form(page):
    for url in URL.findall(page.read_text(encoding="utf-8")):
        assert any(form.fullmatch(url) for form in REVIEWED), f"{page.name}: {url}"


def test_the_theory_names_its_tests():
    assert len(TEST.findall(joined(ROOT / "docs" / "theory.md"))) >= 15
