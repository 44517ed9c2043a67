"""Test that no two classes or type aliases of the package share a name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import sparselogits

ROOT = Path(sparselogits.__file__).parent


def classes_and_aliases(module: ast.Module) -> Iterator[str]:
    """Names that a module defines: classes, and CapWords that are bound to a type."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[:1].isupper() and not name.isupper():
                yield name


def test_no_two_classes_or_aliases_share_a_name():
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for name in classes_and_aliases(ast.parse(path.read_text(encoding="utf-8"))):
            found[name].append(path.relative_to(ROOT).as_posix())
    assert len(found) > 200
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
