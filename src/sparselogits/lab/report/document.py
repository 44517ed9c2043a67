"""One HTML file that needs nothing else: styles, scripts and data inside, and no request allowed.

Pages are Jinja templates with escaping on. The content security policy allows exactly the style
and the scripts that stand in the file, by their hashes, and no request at all. Data reach a page as
JSON, from which its script makes text nodes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparselogits.untrusted import printable


def render(
    template: str,
    *,
    title: str,
    styles: list[str],
    scripts: list[str],
    data: Any = None,
    **values: Any,
) -> str:
    """Render a self-contained page.

    Args:
        template: file in `static/` that extends `base.html`.
        title: plain text.
        styles: files in `static/`, joined.
        scripts: sources of the page's scripts, in order.
        data: JSON values that a script reads from the element `data`.
        values: what the template shows; text is escaped there.
    """
    style = "\n".join(static(name) for name in styles)
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = (
        _environment()
        .get_template(template)
        .render(
            **values, policy=policy, title=title, style=style, scripts=scripts, data=_inert(data)
        )
    )
    # half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark
    return page.encode("utf-8", "replace").decode()


def static(name: str) -> str:
    """Return the text of a file of `static/`."""
    return files("sparselogits.lab.report").joinpath("static", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("sparselogits.lab.report", "static"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    """Escape control and bidirectional characters; markup made by this package stays."""
    return printable(value) if type(value) is str else value


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _inert(data: Any) -> str:
    """Return JSON in which no HTML parser finds a tag or a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
