"""One HTML file that needs nothing else: styles, script and data inside, and no request allowed.

The content security policy allows exactly the style and the script that stand in the file, by
their hashes, and no request at all. Text is escaped here (`escape`) or reaches the page as JSON,
from which the script makes text nodes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str, *, styles: list[str], script: str, data: Any = None) -> str:
    """A self-contained page.

    Args:
        title: plain text.
        body: markup; whoever makes it escapes what is not theirs.
        styles: names of files in `static/`, joined.
        script: the same, one.
        data: JSON values that the script reads from the element `data`.
    """
    style, code = "\n".join(static(name) for name in styles), static(script)
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=policy, title=escape(title), style=style, body=body, script=code, data=_inert(data)
    )


def static(name: str) -> str:
    """A file of `static/`, as it stands there."""
    return files("sparselogits.report").joinpath("static", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _inert(data: Any) -> str:
    """JSON in which no HTML parser finds a tag or a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
