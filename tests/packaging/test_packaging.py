"""Test that wheel and sdist build, install and pass tests outside of this checkout."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import sparselogits
from tests.packaging.release import ROOT, build, environment, metadata, run, unpack

HEAVY = (
    *("torch", "transformers", "datasets", "pyarrow", "pydantic", "accelerate"),
    *("rich", "typer", "fsspec", "pcodec", "tokenizers"),
)


SOURCE = str(Path(sparselogits.__file__).parents[1])


def loaded(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    script = f"import sys\nsys.path.insert(0, {SOURCE!r})\n{statement}\n"
    script += f"print(*(m for m in {HEAVY} if m in sys.modules))"
    return set(run(sys.executable, "-c", script).splitlines()[-1].split())


def test_importing_the_package_loads_nothing():
    assert loaded("import sparselogits") == set()


def test_the_loss_alone_needs_torch_alone():
    assert loaded("from sparselogits import linear_sparse_cross_entropy, SparseTargets") == {
        "torch"
    }


def test_reading_a_cache_does_not_load_transformers():
    assert not {"transformers", "datasets", "accelerate"} & loaded(
        "from sparselogits import CacheDataset"
    )


def test_packing_text_loads_no_torch():
    assert not {"torch", "transformers"} & loaded("import sparselogits.corpus.packer")


def test_a_help_page_loads_no_torch():
    program = "from sparselogits.cli import main\ntry: main()\nexcept SystemExit: pass"
    for words in (["--version"], ["cache", "--help"]):
        found = loaded(f"sys.argv = ['sparselogits', *{words}]\n{program}")
        assert not {"torch", "transformers", "pyarrow"} & found, words


def test_every_public_name_is_there():
    for name in sparselogits.__all__:
        assert getattr(sparselogits, name).__module__.startswith("sparselogits.")
    with pytest.raises(AttributeError, match="no attribute 'CacheDatset'"):
        sparselogits.CacheDatset  # noqa: B018
    assert set(sparselogits.__all__) <= set(dir(sparselogits))


def test_the_citation_names_the_paper():
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert facts["version"] == sparselogits.__version__
    (paper,) = facts["references"]
    assert paper["title"].startswith("Sparse Logit Sampling")
    assert "2503.16870" in str(paper["identifiers"])


def test_the_changelog_knows_this_version():
    assert f"## {sparselogits.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_wheel_and_sdist_work_away_from_here(tmp_path):
    wheel, sdist = build(tmp_path / "dist", "--no-isolation")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    version = sparselogits.__version__
    assert tops == {"sparselogits", f"sparselogits-{version}.dist-info"}
    assert "sparselogits/py.typed" in names
    inside = Path(SOURCE) / "sparselogits"
    # what the pages and the zero-shot tasks are made of
    for file in (*inside.rglob("static/*"), *inside.rglob("*.yaml")):
        assert f"sparselogits/{file.relative_to(inside).as_posix()}" in names
    assert f"sparselogits-{version}.dist-info/licenses/LICENSE" in names
    facts = metadata(wheel)
    assert facts["License-Expression"] == ["Apache-2.0"]
    assert facts["Requires-Python"] == [">=3.11"]

    source = unpack(sdist, tmp_path / "unpacked")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "constraints.txt", "docs"):
        assert (source / name).exists(), name
    assert not {".venv", ".git", ".hypothesis", "dist"} & {p.name for p in source.iterdir()}

    # an environment with the wheel and this one's dependencies: an editable install's path files
    # are not read through another environment's
    python = environment(tmp_path / "empty", over=Path(site.getsitepackages()[0]))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    where = run(python, "-c", "import sparselogits; print(sparselogits.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "empty")
    said = run(python.parent / "sparselogits", "--version", cwd=tmp_path)
    assert said.split() == ["sparselogits", version]
    share = ("test_targets.py", "samplers/test_contract.py", "store/test_codec.py")
    done = subprocess.run(
        [
            str(python),
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *(f"tests/{name}" for name in share),
        ],
        cwd=source,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
