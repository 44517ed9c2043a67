"""Every block of code in docs/ runs, page by page, and the site is built without a remote load.

A block that needs what a test has not (a cluster, a bucket, a package) stands below a line
`<!-- not run: why -->`; one that is part of something that another test runs, below
`<!-- run by: tests/... -->`.

pytest tests/test_docs_code.py
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from sparselogits.cli import main
from tests.conftest import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"(?:<!-- (not run|run by): ([^>]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
LANGUAGES = {"python", "bash", "yaml"}


class Block(NamedTuple):
    mark: str
    why: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = [Block(*groups) for groups in BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in LANGUAGES]


@pytest.fixture
def desk(
    tmp_path: Path,
    teacher_folder: Path,
    cache: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the pages take for granted: a teacher, a student, text, a cache; in short form."""
    shutil.copytree(cache, tmp_path / "my-cache")
    shutil.copytree(teacher_folder, tmp_path / "my-teacher")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    shutil.copytree(tmp_path / "my-student", tmp_path / "my-run" / "model")
    (tmp_path / "pages").mkdir()
    pages = [json.loads(line)["text"] for line in text.open()]
    paragraphs = [part for page in pages for part in page.split("\n\n") if len(part) > 300]
    (tmp_path / "pages" / "pages.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{n}. {part}"}) + "\n" for n in range(6) for part in paragraphs
        )
    )
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in paragraphs[:60])
    )
    (tmp_path / "chat.jsonl").write_text(
        "".join(
            json.dumps({"prompt": part[:100], "completion": part[100:]}) + "\n"
            for part in paragraphs[:60]
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path


NAMES = {"MODEL": "my-teacher", "STUDENT": "my-student", "TEXT": "text.jsonl", "CHAT": "chat.jsonl"}
NAMES |= {"CACHE": "my-cache"}
SMALL = {"cache": ["--window", "64"]}  # for the tiny teacher


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [NAMES.get(word, word) for word in shlex.split(command)]
    assert words[0] == "sparselogits", command
    for name, small in SMALL.items():
        if words[1] == name and small[0] not in words:
            words += small
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None), command


def step() -> dict[str, object]:
    """What docs/loss.md has at hand: the values of one step of training."""
    hidden = torch.randn(6, 32, requires_grad=True)
    ids = torch.arange(6 * 4).reshape(6, 4)
    return {
        **{"hidden": hidden, "model": tiny_llama(), "target_ids": ids},
        **{"target_weights": torch.full((6, 4), 0.25), "shift_labels": torch.arange(6)},
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = step() if page.name == "loss.md" else {}
    for block in blocks(page):
        if block.mark == "run by":
            assert (ROOT / block.why.strip()).is_file(), block.why
        elif block.mark == "not run":
            assert block.why.startswith("needs "), block.why
            if block.language == "python":
                compile(block.code, page.name, "exec")
        elif block.language == "python":
            exec(compile(block.code, page.name, "exec"), names)
        elif block.language == "yaml":
            check_recipe(block.code)
        else:
            for command in block.code.replace("\\\n", " ").strip().splitlines():
                run_command(command, monkeypatch)
    capsys.readouterr()


def check_recipe(code: str) -> None:
    """A comparison's recipe is a valid one; so is a piece of a run's, given cache and out."""
    from sparselogits.compare.recipe import load_compare_recipe
    from sparselogits.train.recipe import parse_recipe

    if "methods:" in code:
        Path("comparison.yaml").write_text(code)
        load_compare_recipe(Path("comparison.yaml"))
        return
    given = {"cache": "my-cache", "out": "my-run"}
    parse_recipe({**given, **yaml.safe_load(code)}, source="the page")


class Loads(HTMLParser):
    """What a page loads by itself: scripts, styles, images, frames; not what one may click on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and (given.get("rel") or "") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")
        elif tag != "a":
            self.found += [given[name] or "" for name in ("src", "srcset", "data") if name in given]


def test_the_site_builds_strictly_and_loads_nothing_remote(tmp_path: Path) -> None:
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in PAGES} <= {page.stem for page in pages}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loads = Loads(html).found
        assert loads
        remote = [address for address in loads if re.match(r"(https?:)?//", address)]
        assert not remote, (page.name, remote)
        assert 'class="mermaid"' not in html, "the theme would fetch mermaid from elsewhere"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8"))
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "linear_sparse_cross_entropy" in reference


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f" {page.name}" in text, f"{page.name} is missing from mkdocs.yml"
