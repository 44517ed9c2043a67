"""Read hand-written YAML from untrusted files.

PyYAML's safe loader runs no code, but implements YAML 1.1: `1e-3` is a string, `no` is False,
`1:30` is 90, a date is a date object, a key may be of any type and occur twice, and a few hundred
bytes of anchors expand to gigabytes. This loader uses the scalars of YAML 1.2's core schema except
octal and hexadecimal integers, which are strings; requires unique string keys; rejects anchors; and
limits the size of a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparselogits.errors import RecipeError, reason_of
from sparselogits.untrusted import printable, read_regular, shown

LARGEST = 1 << 20
"""Maximum size of a file, in bytes."""
DEEPEST = 32
"""Maximum depth of nested values; a scalar is one level, too."""


class _Loader(yaml.SafeLoader):
    """Loader that creates only mappings, lists, strings, numbers, booleans and null."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            problem = "anchors (&name) and aliases (*name) are not supported: repeat the value"
            raise _error(problem, event)
        if self.depth >= DEEPEST:
            raise _error(f"values are nested deeper than {DEEPEST} levels: use fewer levels", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (LookupError, ArithmeticError, ValueError) as error:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"{shown(node.value)} does not match its tag {tag}: remove the tag"
            raise _error(problem, node) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = key.value
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                raise _error(f"the key {shown(name)} is not a string: put it in quotes", key)
            if name in seen:
                raise _error(f"the key {shown(name)} occurs twice: remove one", key)
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


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """Return an error that contains the line and column of a YAML node or event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _integer(loader: _Loader, node: Any) -> int:
    """Convert a scalar to an integer; more than 64 characters are an error, to bound the time."""
    text = loader.construct_scalar(node)
    if len(text) > 64:
        raise _error(f"{shown(text)} has {len(text)} digits; expected at most 64", node)
    return int(text)


_CORE = ("null", "bool", "int", "float", "str", "seq", "map")
_CORE_TAGS = {None, *(f"tag:yaml.org,2002:{kind}" for kind in _CORE)}
_Loader.yaml_constructors = {
    tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag in _CORE_TAGS
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping of keys to values in a YAML file.

    Args:
        path: path of the file.
        what: name of the kind of file in error messages, such as "the recipe".

    Raises:
        RecipeError: the file cannot be read, is larger than `LARGEST` bytes, is not YAML as
            described in this module's docstring, or does not contain a mapping.
    """
    try:
        text = read_regular(path, LARGEST).decode("utf-8")
    except OSError as error:
        raise RecipeError(
            f"{what} {path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{what} {path} is not YAML: byte {error.start} is not valid UTF-8; save it as UTF-8"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{what} {path} cannot be read: {error}; give a smaller file") from error
    values = parse_yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise RecipeError(
            f"{what} {path} must be a mapping of keys to values, found "
            f"{'nothing' if values is None else shown(values)}; write it as in `cache: my-cache`"
        )
    return values


def parse_yaml(text: str, what: str) -> Any:
    """Return the value of a YAML document; `what` names the document in error messages.

    Raises:
        RecipeError: the text is not YAML as described in this module's docstring; the message
            contains the line and column, if they are known.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is not YAML: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Return a description of an error with its line and column, on one line of text."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be parsed"
        position = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        return f"{printable(problem, 200)}{position}"
    return printable(reason_of(error).splitlines()[0], 200)
