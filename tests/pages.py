"""The blocks of code in the pages people read, and what stands above each of them.

A block runs as it stands there (test_docs_code.py, test_readme.py), unless a line above it says why
not, or where it does:

    <!-- not run: needs a bucket -->
    <!-- run by: tests/caching/test_executors.py -->
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")), *DOCS]
RUN = {"python", "bash", "yaml"}
"""Languages that are run; a block in another one is marked."""

_FENCE = re.compile(r" *(`{3,}|~{3,})(.*)")
_MARK = re.compile(r" *<!-- (not run|run by): (.+) -->")


class Block(NamedTuple):
    """A fenced block: the mark above it, if there is one, its language and its lines."""

    mark: str
    why: str
    language: str
    code: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, whatever its language and however far it is indented."""
    return blocks_of(page.read_text(encoding="utf-8"))


def blocks_of(text: str) -> list[Block]:
    found, fence, before = [], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        edge = _FENCE.fullmatch(line)
        if fence is None and edge is not None:
            mark = _MARK.fullmatch(before)
            fence, started = edge, number
            marked, lines = (mark.groups() if mark else ("", "")), []
        elif fence is not None and edge is not None and edge[1] == fence[1] and not edge[2].strip():
            language = fence[2].strip()
            found.append(Block(*marked, language, "".join(f"{x}\n" for x in lines), started))
            fence = None
        elif fence is not None:
            lines.append(line)
        before = line
    assert fence is None, f"the block that begins in line {started} does not end"
    return found


def outside_blocks(page: Path) -> str:
    """A page without its fenced blocks."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.fullmatch(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)
