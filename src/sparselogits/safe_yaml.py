"""Read YAML that people write by hand, from files of unknown origin.

PyYAML's safe loader runs no code, but follows YAML 1.1: `1e-3` is a text, `no` is False, `1:30` is
90, a date is a date object, a key may be anything and be given twice, and a few hundred bytes of
anchors expand to gigabytes. Here the scalars are those of YAML 1.2's core schema, keys are texts
that occur once, anchors are refused, and the size of a file is bounded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparselogits.errors import RecipeError, reason_of
from sparselogits.untrusted import printable, read_regular, shown

LARGEST = 1 << 20
"""Bytes of a file."""
DEEPEST = 32
"""Mappings and lists inside one another."""


class _Loader(yaml.SafeLoader):
    """Builds nothing but mappings, lists, texts, numbers, booleans and null."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors (&name) and aliases (*name) are not read: repeat the value",
                event.start_mark,
            )
        if self.depth >= DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"it is nested deeper than {DEEPEST} levels", event.start_mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {shown(name)} is not a text: put it in quotes",
                    key.start_mark,
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(name)} occurs twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def _integer(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 64:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"{shown(text)} has {len(text)} digits; expected 64 at most",
            node.start_mark,
        )
    return int(text)


_CORE = ("null", "bool", "int", "float", "str", "seq", "map")
_KEPT = {None, *(f"tag:yaml.org,2002:{kind}" for kind in _CORE)}
_Loader.yaml_constructors = {
    tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag in _KEPT
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a file that holds a mapping of keys to values.

    Args:
        path: a regular file of at most `LARGEST` bytes in UTF-8.
        what: its name in messages, as "the recipe".

    Raises:
        RecipeError: it cannot be read, is no YAML as the module's head describes it, or no mapping.
    """
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
    except OSError as error:
        raise RecipeError(
            f"{what} {path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{what} {path} is not YAML: byte {error.start} is no UTF-8; save it as UTF-8"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{what} {path} cannot be read: {error}") from error
    values = parse_yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise RecipeError(
            f"{what} {path} must be a mapping of keys to values, as in `cache: my-cache`; it holds "
            f"{'nothing' if values is None else shown(values)}"
        )
    return values


def parse_yaml(text: str, what: str) -> Any:
    """Parse one document, see the module's head.

    Raises:
        RecipeError: it is not such YAML; says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is not YAML: {_where(error)}") from error


def _where(error: Exception) -> str:
    """One line: what is wrong, in which line and column."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be parsed"
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        return f"{printable(problem, 200)}{place}"
    return printable(reason_of(error).splitlines()[0], 200)
