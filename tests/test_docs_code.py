"""Test every code block of docs/, page by page, and that the site loads nothing remote.

pages.py defines the marks above blocks. An unmarked block that cannot run, a wrong mark, and an
unknown command outside of blocks are failures.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import typer
import yaml

from sparselogits.cli import app, main
from sparselogits.losses import DIVERGENCES
from sparselogits.methods import METHODS
from tests.conftest import tiny_llama, write_lines
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert
from tests.pages import DOCS, PAGES, ROOT, RUN, Block, blocks, blocks_of, outside_blocks
from tests.stand_ins import stand_in_for_named_models
from tests.store.s3 import S3

PROGRAM = typer.main.get_command(app)
CONTEXT = PROGRAM.make_context("sparselogits", ["info", "CACHE"])


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the folder of a tiny masked language model."""
    folder = tmp_path_factory.mktemp("masked")
    tiny_bert(vocab_size=VOCABULARY, initializer_range=0.1).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def desk(
    tmp_path: Path,
    teacher_folder: Path,
    masked_folder: Path,
    cache: Path,
    text: Path,
    tokenizer: object,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the pages take for granted: a teacher, a student, text, a cache; in short form."""
    shutil.copytree(cache, tmp_path / "my-cache")
    shutil.copytree(teacher_folder, tmp_path / "my-teacher")
    tiny_llama(seed=3).save_pretrained(tmp_path / "my-student")
    shutil.copytree(tmp_path / "my-student", tmp_path / "my-run" / "model")
    shutil.copytree(masked_folder, tmp_path / "my-masked-teacher")
    shutil.copytree(teacher_folder, tmp_path / "other-teacher")
    tiny_llama(seed=4).save_pretrained(tmp_path / "other-teacher")
    (tmp_path / "pages").mkdir()
    pages = [json.loads(line)["text"] for line in text.open()]
    paragraphs = [part for page in pages for part in page.split("\n\n") if len(part) > 300]
    write_lines(
        tmp_path / "pages" / "pages.jsonl",
        ({"text": f"{n}. {part}"} for n in range(6) for part in paragraphs),
    )
    write_lines(tmp_path / "text.jsonl", ({"text": part} for part in paragraphs[:60]))
    write_lines(
        tmp_path / "chat.jsonl",
        ({"prompt": part[:100], "completion": part[100:]} for part in paragraphs[:60]),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("\n\n".join(paragraphs))
    stand_in_for_named_models(tmp_path / "home", tokenizer, monkeypatch)
    return tmp_path


NAMES = {
    "MODEL": "my-teacher",
    "OTHER": "other-teacher",
    "MASKED": "my-masked-teacher",
    "STUDENT": "my-student",
    "TEXT": "text.jsonl",
    "CHAT": "chat.jsonl",
}
NAMES |= {"CACHE": "my-cache"}
SMALL = {"cache": ["--window", "64"]}  # for the tiny teacher
SHELL = {"&&", "||", "|", ";", ">"}


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [NAMES.get(word, word) for word in words]
    assert words[0] == "sparselogits", words
    for name, small in SMALL.items():
        if words[1] == name and small[0] not in words:
            words += small
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None), words


def run_shell(line: str) -> None:
    """A line that needs a shell, with the command where an installation has it."""
    command = Path("bin") / "sparselogits"
    if not command.exists():
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m sparselogits "$@"\n')
        command.chmod(0o755)
    path = f"{command.parent.resolve()}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", line], check=True, env={**os.environ, "PATH": path})


def step() -> dict[str, object]:
    """What docs/loss.md has at hand: the values of one step of training."""
    hidden = torch.randn(6, 32, requires_grad=True)
    ids = torch.arange(6 * 4).reshape(6, 4)
    return {
        **{"hidden": hidden, "model": tiny_llama(), "target_ids": ids},
        **{"target_weights": torch.full((6, 4), 0.25), "shift_labels": torch.arange(6)},
    }


@pytest.mark.parametrize("page", [p for p in DOCS if blocks(p)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, desk, monkeypatch, request, capsys):
    names = step() if page.name == "loss.md" else {}
    for block in blocks(page):
        if block.mark:
            continue
        if block.language == "python":
            with patch.dict(METHODS), patch.dict(DIVERGENCES):  # a page may register its own
                exec(compile(block.code, page.name, "exec"), names)
        elif block.language == "yaml":
            check_recipe(block.code)
        else:
            run_bash(block, monkeypatch, request)
    capsys.readouterr()


def run_bash(block: Block, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for words in block.commands:
        if SHELL & set(words):
            run_shell(" ".join(words))
            continue
        if any(word.startswith("s3://") for word in words):
            own: S3 = request.getfixturevalue("s3")
            words = [word.replace("s3://bucket", f"s3://{own.bucket}") for word in words]
        run_command(words, monkeypatch)


def check_recipe(code: str) -> None:
    """A comparison's recipe is a valid one, and so is a run's that sets its learning rate.

    Any other block is a piece of a run's recipe, valid once cache, out and student are given.
    """
    from sparselogits.lab.compare.recipe import load_compare_recipe
    from sparselogits.train.recipe import parse_recipe

    if "methods:" in code:
        Path("comparison.yaml").write_text(code)
        load_compare_recipe(Path("comparison.yaml"))
        return
    values = yaml.safe_load(code)
    if "learning_rate" not in values:
        values = {"cache": "my-cache", "out": "my-run", "student": {"size": "tiny"}, **values}
    parse_recipe(values, source="the page")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_a_block_runs_or_says_why_not(page):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if not block.mark:
            assert block.language in RUN, (
                f"{where}: mark it (tests/pages.py), or make it one of {RUN}"
            )
            assert page in DOCS or page.name == "README.md", f"{where}: nothing runs this page"
        elif block.mark == "run by":
            assert_run_by(block, ROOT / block.why, where)
        else:
            assert block.why.startswith("needs "), where
            assert_well_formed(block, where)


SOURCE = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
DEFINED = set(re.findall(r"(?m)^(?:def|class) (\w+)", SOURCE))


def assert_run_by(block: Block, test: Path, where: str) -> None:
    """The test runs blocks of the page, or names what the block imports or calls, to the option."""
    text = test.read_text(encoding="utf-8")
    told = re.findall(r"(?m)^from sparselogits[\w.]* import (.+)$", block.code)
    names = {name.strip() for line in told for name in line.split(",")}
    if block.language == "python":
        names |= set(re.findall(r"\b(\w+)\(", block.code)) & DEFINED
    if block.language == "bash":
        for words in block.commands:
            assert_command(words, where)
            names |= {w.split("=")[0] for w in words if w.startswith("--")}
            names |= {Path(w).name for w in words if w.endswith((".py", ".yaml")) and "/" in w}
            names |= {w for w in words[1:2] if words[0] in ("sparselogits", "make")}
    missing = {name for name in names if name not in text}
    reads_it = where.split(":")[0] in text and "blocks(" in text
    assert reads_it or not missing, f"{where}: {test.name} does not run {sorted(missing)}"
    assert names or block.language in ("text", "toml"), where


def assert_well_formed(block: Block, where: str) -> None:
    """As much of a block that is not run as can be checked."""
    if block.language == "python":
        compile(block.code, where, "exec")
    elif block.language == "bash":
        done = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
        assert done.returncode == 0, f"{where}: {done.stderr}"
        for words in block.commands:
            assert_command(words, where)


def assert_command(words: list[str], where: str) -> None:
    """What a command names exists: subcommand and options, make's target, a script."""
    if "sparselogits" in words:
        own = words[words.index("sparselogits") + 1 :]
        if not own or own[0].startswith("-"):
            return
        assert own[0] in PROGRAM.commands, f"{where}: no command {own[0]}"
        known = {
            name
            for p in PROGRAM.commands[own[0]].get_params(CONTEXT)
            for name in p.opts + p.secondary_opts
        }
        asked = {w.split("=")[0].rstrip(".,") for w in own if w.startswith("--")}
        assert asked <= known | {"--help", "--debug"}, f"{where}: {asked - known} in {words}"
    if words[0] == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
        asked = {word for word in words[1:] if "=" not in word}
        assert asked <= set(targets), f"{where}: no target {asked - set(targets)}"
    for word in words:
        if re.fullmatch(r"(tests|benchmarks|experiments|examples)/[\w./-]+\.\w+", word):
            assert (ROOT / word).exists(), f"{where}: no {word}"


INLINE = re.compile(r"(?<!`)`((?:sparselogits|make) [^`]+)`(?!`)")
HIDDEN = re.compile(
    r"(?m)^(?: {4}|\t)(?:\$ )?(?:make|pip|sparselogits|python|torchrun|hf|ray|#!)\b.*"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    text = outside_blocks(page)
    assert not HIDDEN.findall(text), "commands that no test sees: put them into a fenced block"
    for code in INLINE.findall(text):
        assert_command(code.replace("\n", " ").split(), f"{page.name}: `{code}`")


def test_no_block_is_overlooked():
    """What the pages' tests rest on: a block is seen however it is written."""
    found = blocks_of(
        "```bash\nls\n```\n- x\n\n    ~~~\n    a\n    ~~~\n<!-- not run: needs y -->\n````text\n"
        "```\n````\n"
    )
    assert [(b.mark, b.why, b.language, b.code) for b in found] == [
        ("", "", "bash", "ls\n"),
        ("", "", "", "    a\n"),
        ("not run", "needs y", "text", "```\n"),
    ]
    with pytest.raises(AssertionError, match="line 1 does not end"):
        blocks_of("```python\nx\n")


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


def test_the_site_builds_strictly_and_loads_nothing_remote(site):
    pages = list(site.glob("*.html"))
    assert {page.stem for page in DOCS} <= {page.stem for page in pages}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loads = Loads(html).found
        assert loads
        remote = [address for address in loads if re.match(r"(https?:)?//", address)]
        assert not remote, (page.name, remote)
        assert 'class="mermaid"' not in html, "the theme would fetch mermaid from elsewhere"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8"))
    reference = (site / "reference.html").read_text(encoding="utf-8")
    assert "linear_sparse_cross_entropy" in reference


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS:
        assert f" {page.name}" in text, f"{page.name} is missing from mkdocs.yml"
