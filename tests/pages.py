"""Read the code blocks of the documentation, and the marks above them.

test_docs_code.py and test_readme.py run each block unchanged, unless a line above it states why it
cannot run, or which test runs it:

    <!-- not run: needs a bucket -->
    <!-- run by: tests/caching/test_executors.py -->
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")), *DOCS]
RUN = {"python", "bash", "yaml"}
"""Languages whose blocks are run; a block in another language needs a mark."""

_FENCE = re.compile(r" *(`{3,}|~{3,})(.*)")
_MARK = re.compile(r" *<!-- (not run|run by): (.+) -->")


class Block(NamedTuple):
    """Fenced block: the mark above it (or empty strings), its language, code and first line."""

    mark: str
    why: str
    language: str
    code: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        """Return the arguments of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page, in any language and at any indentation."""
    return blocks_of(page.read_text(encoding="utf-8"))


def blocks_of(text: str) -> list[Block]:
    """Return all fenced blocks of a Markdown text."""
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
    """Return the text of a page without its fenced blocks."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.fullmatch(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)
