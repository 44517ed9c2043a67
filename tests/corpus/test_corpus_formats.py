"""Test that a document format of another package, declared by an entry point, is read."""

import gzip
import sys
from typing import Any

import numpy as np
import pytest
from tests.conftest import write_lines, write_package
from tests.pages import DOCS, blocks

from sparselogits.corpus import PackedCorpus, open_source, pack, packing_for
from sparselogits.corpus.formats import GROUP, known_formats
from sparselogits.errors import CorpusError, SparseLogitsWarning

PAGE = next(page for page in DOCS if page.name == "extending.md")
SOURCE = next(block.code for block in blocks(PAGE) if "class TabSeparated" in block.code)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Any:
    """Installs a package that declares formats: a module and the metadata of a wheel."""

    def install(source: str, **points: str) -> None:
        write_package(tmp_path / "site", "my_formats", source, GROUP, points)
        monkeypatch.syspath_prepend(tmp_path / "site")
        known_formats.cache_clear()

    yield install
    sys.modules.pop("my_formats", None)
    known_formats.cache_clear()


def pairs(stories: list[str]) -> list[tuple[str, str]]:
    flat = [" ".join(story.split()) for story in stories]
    return [(text[: len(text) // 2], text[len(text) // 2 :]) for text in flat]


def test_the_format_of_the_documentation_is_read_plain_and_compressed(installed, stories, tmp_path):
    installed(SOURCE, tsv="TabSeparated")
    lines = "".join(f"{a}\t{b}\n" for a, b in pairs(stories)).encode()
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.tsv").write_bytes(lines)
    (folder / "b.tsv.gz").write_bytes(gzip.compress(lines))
    (folder / "notes.md").write_text("about them")
    want = [a + b for a, b in pairs(stories)]
    source = open_source(folder)
    assert [file.name for file in source.files] == ["a.tsv", "b.tsv.gz"]
    assert list(source.documents()) == want * 2
    assert len(open_source(folder / "a.tsv").portions(5000)) > 3  # by ranges of bytes
    (folder / "a.tsv").write_text("one\ttwo\nthree\n")
    with pytest.raises(CorpusError, match=r"a\.tsv, line 2 has 1 column"):
        list(open_source(folder / "a.tsv").documents())


def test_it_packs_into_the_windows_of_json_lines_in_several_processes(
    installed, stories, tokenizer, tmp_path
):
    installed(SOURCE, tsv="TabSeparated")
    (tmp_path / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs(stories)))
    records = [{"prompt": a, "completion": b} for a, b in pairs(stories)]
    write_lines(tmp_path / "a.jsonl", records)
    packing = packing_for(tokenizer, window_length=64, holdout=0.1)
    tokens = []
    for name, processes in (("a.tsv", 2), ("a.jsonl", 1)):
        corpus: PackedCorpus = pack(
            open_source(tmp_path / name, completion_only=True),
            tokenizer,
            packing,
            tmp_path / f"packed-{name}",
            vocab_size=len(tokenizer),
            processes=processes,
            part_bytes=8000,
        )
        windows = corpus.read(0, corpus.windows)
        tokens.append(np.stack([np.stack([w.tokens, w.mask]) for w in windows]))
    assert np.array_equal(*tokens)


BROKEN = {
    "not a format": ("Other = dict\n", "declare a subclass"),
    "name of another": ("class Other(LineFormat):\n    name = 'json'\n", "has the name 'json'"),
    "suffix of another": (
        "class Other(LineFormat):\n    name = 'other'\n    suffixes = ('.jsonl',)\n",
        r"has the suffix '\.jsonl'",
    ),
    "suffix in capitals": (
        "class Other(LineFormat):\n    name = 'other'\n    suffixes = ('.TSV',)\n",
        r"has the suffix '\.TSV'",
    ),
    "suffix of a compression": (
        "class Other(LineFormat):\n    name = 'other'\n    suffixes = ('.gz',)\n",
        r"has the suffix '\.gz'",
    ),
    "no import": ("import does_not_exist_anywhere\n", "does_not_exist_anywhere"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_is_broken_is_named_and_breaks_nothing(installed, kind, tmp_path):
    source, said = BROKEN[kind]
    installed(f"from sparselogits.corpus import LineFormat\n{source}", other="Other")
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    with pytest.warns(SparseLogitsWarning, match=said):
        known_formats()
    assert list(open_source(tmp_path / "a.jsonl").documents()) == ["words"]
