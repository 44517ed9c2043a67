"""Rehearse a release: build, check, install into an empty environment, run the installed package.

    make release            (or: python -m tests.packaging.release [--python PYTHON])

Nothing is uploaded. `dist/` contains the wheel and the sdist afterwards; environments are created
in a temporary folder and removed. Needs a package index and some minutes, mostly for torch.
`test_packaging.py` does the same without an index, with the installed dependencies.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "flask", "flask-cors", "moto[s3]")
SMOKE = (
    "tests/test_targets.py",
    "tests/cli/test_commands.py::test_info_as_json",
    "tests/cli/test_commands.py::test_train_and_eval",
)
WITHOUT_EXTRA = {"dev", "release"}  # for work on the project itself


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return its output; exit if it fails."""
    shown = " ".join(str(word) for word in words)
    print(f"$ {shown}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{shown}\n{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def build(out: Path, *options: str) -> tuple[Path, Path]:
    """Build the sdist of the working tree, and the wheel from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", out, *options)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def metadata(wheel: Path) -> dict[str, list[str]]:
    """Return the metadata of a wheel, as a list of values per name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(name).decode())
    return {key: message.get_all(key, []) for key in set(message.keys())}


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a sdist and return its folder."""
    folder.mkdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def environment(folder: Path, *, python: str = sys.executable, over: Path | None = None) -> Path:
    """Create an environment and return its python; packages of `over` are visible in it."""
    run(python, "-m", "venv", folder)
    if over is not None:
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "lent.pth").write_text(f"{over}\n")
    return folder / "bin" / "python"


def install(python: Path, *words: str | Path) -> None:
    """Install with the pinned versions of constraints.txt."""
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(python, *pip, "--constraint", CONSTRAINTS, *words)


def import_names(python: Path, requirements: list[str]) -> list[str]:
    """Return the import names of the modules that requirements install."""
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]
    script = (
        "import importlib.metadata as m, sys\n"
        "wanted = {n.lower().replace('_', '-') for n in sys.argv[1:]}\n"
        "for module, owners in m.packages_distributions().items():\n"
        "    if module.isidentifier() and not module.startswith('_'):\n"
        "        if wanted & {o.lower().replace('_', '-') for o in owners}: print(module)\n"
    )
    return run(python, "-c", script, *names).split()


def check_extras(wheel: Path, folder: Path, base: Path) -> None:
    """Install each extra into an environment that has the base requirements and nothing else."""
    facts = metadata(wheel)
    for extra in sorted(set(facts["Provides-Extra"]) - WITHOUT_EXTRA):
        python = environment(folder / extra, over=base)
        install(python, f"{wheel}[{extra}]")
        asked = [r for r in facts["Requires-Dist"] if re.search(rf"extra == '{extra}'", r)]
        modules = import_names(python, asked)
        assert modules, f"the extra {extra} brings nothing that can be imported: {asked}"
        run(python, "-c", "; ".join(f"import {module}" for module in modules), cwd=folder)
        print(f"extra {extra}: {', '.join(modules)}")


def main() -> None:
    """Run the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="to install and run with")
    python_name = parser.parse_args().python
    dist = ROOT / "dist"
    for old in (*dist.glob("*.whl"), *dist.glob("*.tar.gz")):
        old.unlink()
    wheel, sdist = build(dist)
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        folder = Path(name)
        python = environment(folder / "base", python=python_name)
        torch = re.findall(r"(?m)^torch==.*$", CONSTRAINTS.read_text())
        install(python, *torch)
        install(python, wheel)
        print(run(python.parent / "sparselogits", "--version", cwd=folder), end="")
        (site,) = (folder / "base").glob("lib/python3*/site-packages")
        check_extras(wheel, folder, site)
        tested = environment(folder / "tested", python=python_name, over=site)
        install(tested, *TOOLS)
        source = unpack(sdist, folder / "source")
        print(run(tested, "-m", "pytest", *SMOKE, cwd=source), end="")
    print(f"ready: {wheel.name}, {sdist.name}; nothing was uploaded")


if __name__ == "__main__":
    main()
