"""Divide the files of a folder into splits, by the rules of `datasets`.

The rules (keywords in names and folders, `data/SPLIT-00000-of-00001`, `configs` in README.md) are
those of `datasets.load_dataset`, and the functions of `datasets` apply them to the file names.
Patterns are compared with the names only, so no pattern can select a file outside the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sparselogits.errors import CorpusError
from sparselogits.untrusted import printable

_KEYWORD = re.compile(
    r"(^|[-._ 0-9/])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
    r"[-._ 0-9/]"
    r"|(^|/)data/[^/]+-\d{5}-of-\d{5}"
)
_CARD = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_LARGEST_CARD = 1 << 20

Splits = dict[str, list[str]]
"""File names by split name."""


def find_splits(folder: Path, names: Sequence[str], configuration: str | None) -> Splits | None:
    """Divide the files of a folder into splits.

    Args:
        folder: the folder.
        names: relative names of the folder's files, with forward slashes, without hidden files.
        configuration: name of a configuration in README.md; None for the default one.

    Returns:
        The splits; None if neither README.md nor the names divide the files.

    Raises:
        CorpusError: README.md does not contain the configuration, has several without exactly one
            default, or the patterns of the configuration are invalid.
    """
    configurations = _configurations(folder)
    if configuration is None and not configurations and not any(map(_KEYWORD.search, names)):
        return None
    from datasets import data_files  # slow to import

    chosen = _chosen(folder, configurations, configuration)
    below, everything = str(chosen.get("data_dir") or "").strip("/"), set(names)
    if below:
        names = [name for name in names if PurePosixPath(name).is_relative_to(below)]
    at = len(below) + 1 if below else 0

    def resolve(pattern: str) -> list[str]:
        return [
            below + "/" * bool(below) + name for name in _matching([n[at:] for n in names], pattern)
        ]

    try:
        if chosen.get("data_files") is not None:
            patterns = data_files.sanitize_patterns(chosen["data_files"])
            if not all(isinstance(each, str) for own in patterns.values() for each in own):
                raise ValueError("`data_files` in README.md contains a pattern that is not text")
        else:
            patterns = data_files._get_data_files_patterns(resolve)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:  # `data_files` of another form is a TypeError
        raise CorpusError(
            f"the files of {folder} cannot be divided into splits: {printable(str(error), 300)}. "
            "Name the files by a pattern"
        ) from error
    found: Splits = {}
    for split, own in patterns.items():
        matched: dict[str, None] = {}
        for pattern in own:
            with suppress(FileNotFoundError):
                matched |= dict.fromkeys(resolve(pattern))
        found[str(split)] = list(matched)
    return None if set(patterns) == {"train"} and set(found["train"]) == everything else found


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that match a pattern, or raise FileNotFoundError if there are none."""
    from datasets.data_files import FILES_TO_IGNORE
    from fsspec.utils import glob_translate

    pattern = re.sub(r"^(\./)+", "", pattern)
    last = PurePosixPath(pattern).name
    matches = re.compile(glob_translate(pattern)).match
    found = [
        name
        for name in names
        if matches(name)
        and ((base := PurePosixPath(name).name) not in FILES_TO_IGNORE or base == last)
    ]
    if not found:
        raise FileNotFoundError(pattern)
    return found


def _configurations(folder: Path) -> list[Mapping[str, Any]]:
    """Return the `configs` of the dataset card; an empty list if there are none."""
    try:
        with (folder / "README.md").open("rb") as file:
            head = file.read(_LARGEST_CARD).decode(errors="replace")
    except OSError:
        return []
    block = _CARD.match(head)
    if block is None:
        return []
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block[1])):
            return []  # aliases can expand without bound, and dataset cards do not use them
        values = yaml.safe_load(block[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return []  # a README.md that is not a dataset card
    configs = values.get("configs") if isinstance(values, dict) else None
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, dict) and "config_name" in config]


def _chosen(
    folder: Path, configurations: Sequence[Mapping[str, Any]], name: str | None
) -> Mapping[str, Any]:
    if not configurations and name is None:
        return {}
    by_name = {str(config["config_name"]): config for config in configurations}
    known = printable(", ".join(by_name) or "none", 300)
    if name is not None:
        if name not in by_name:
            raise CorpusError(
                f"{folder} has no configuration {printable(name)!r}; README.md names "
                f"{known}; name one of those"
            )
        return by_name[name]
    default = [own for key, own in by_name.items() if key == "default" or own.get("default")]
    default = list(by_name.values()) if len(by_name) == 1 else default
    if len(default) != 1:
        raise CorpusError(
            f"{folder} has several configurations ({known}) and {len(default) or 'no'} default; "
            f"name one of them, as in --data {folder}:{next(iter(by_name))}"
        )
    return default[0]
