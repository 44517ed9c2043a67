"""Find the text files that a path, a pattern or the name of a dataset refers to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparselogits.corpus.formats import (
    COMPRESSIONS,
    Arrow,
    Format,
    SourceFile,
    content_suffix,
    format_in_folder,
    format_of_named_file,
    format_with_weak_suffix,
    is_compressed,
    known_formats,
)
from sparselogits.corpus.splits import find_splits
from sparselogits.errors import CorpusError
from sparselogits.files import expanded
from sparselogits.untrusted import leads_outside, read_json, shown

_HIDDEN = (".", "__")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC = {
    **{compression.magic: suffix for suffix, compression in COMPRESSIONS.items()},
    b"PK\x03\x04": ".zip",
    b"PAR1\x15": ".parquet",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class LeftOut:
    """Group of found files that share a remark, such as the reason why they are not read."""

    reason: str
    """Remark about the files, as a phrase such as "no known text format"."""
    names: tuple[str, ...]
    """Relative names of the files."""

    def in_words(self, one: str = "", several: str = "") -> str:
        """Return a phrase with the number of files, the reason and up to three names, for display.

        The clause `one` follows "1 file", and the clause `several` any other number of files.
        """
        few = ", ".join(self.names[:3]) + ", ..." * (len(self.names) > 3)
        files = f"1 file{one}" if len(self.names) == 1 else f"{len(self.names):,} files{several}"
        return f"{files} ({self.reason}: {few})"


@dataclass(frozen=True)
class Located:
    """Files that `locate` found: those to read, and those that are left out."""

    files: tuple[SourceFile, ...]
    """Files to read, in order."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that were found but are not read."""
    shared: tuple[LeftOut, ...] = ()
    """Files that are read although their names match another split too."""


def locate(data: str, split: str) -> Located:
    """Return the files that a user names, in a stable order.

    Args:
        data: path of a file, folder or saved dataset, pattern of paths, or name of a dataset on the
            hub; `:CONFIGURATION` may follow a folder or a name.
        split: split to read, if the dataset has several.

    Raises:
        CorpusError: no file is found or can be read, no file has a known format, all files are
            empty, or the split does not exist.
        InvalidArgumentError: the path begins with the home folder of an unknown user.
    """
    path = expanded(data)
    base, _, configuration = data.rpartition(":")
    located = None
    try:
        path.exists()
    except OSError as error:  # for example, if `data` is text
        raise CorpusError(
            f"{shown(data)} is no path that can be read ({error.strerror}); give the path of a "
            "file or folder. Write text to a file first"
        ) from error
    if path.is_file():
        _require_train(data, split)
        files = [SourceFile(path, path.name, _format_of(path))]
    elif path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            files = _saved_dataset(path, split)
        else:
            located = _folder(path, split, None)
    elif path.exists():
        raise CorpusError(
            f"{data} is {_kind_of(path)}; only regular files are read, because packing reads a "
            "text at several positions and again after an interruption. Write its content to a "
            "file and give that file"
        )
    elif any(sign in data for sign in "*?["):
        _require_train(data, split)
        files = _matching(data)
    elif base and expanded(base).is_dir():
        located = _folder(expanded(base), split, configuration)
    elif _HUB_NAME.fullmatch(data) and not _looks_like_file(path):
        files = _hub_dataset(data, split)
    elif "://" in data:
        raise CorpusError(
            f"{data} is a URL; expected local files or the name of a dataset on the hub. Download "
            "the files first"
        )
    elif path.is_symlink():
        raise CorpusError(
            f"{data} is a link to {path.readlink()}, which does not exist; give a file that exists"
        )
    else:
        raise CorpusError(f"{data} does not exist; check the path (working folder: {Path.cwd()})")
    if located is None:
        located = Located(tuple(sorted(files, key=lambda file: file.name)))
    if all(file.path.stat().st_size == 0 for file in located.files):
        raise CorpusError(f"{data} is empty: all of its files have 0 bytes; give other text")
    for file in located.files:
        _require_honest_name(file)
    return located


def _require_train(data: str, split: str) -> None:
    """Reject a split other than "train" for a file or pattern, which is always read completely."""
    if split != "train":
        raise CorpusError(
            f"{data} names files, which have no split `{split}`; remove --split, name the files "
            "of that split, or name their folder"
        )


def _format_of(path: Path) -> Format:
    """Return the format of a file that the user names."""
    found = format_of_named_file(path)
    if found is None:
        known = " or ".join(
            f"{own.suffixes[0]}{path.suffix}" for own in known_formats() if own.compressible
        )
        raise CorpusError(
            f"{path} is compressed text; only formats with one record per line are read "
            f"compressed, from files whose names end in {known}. Decompress the file first, or "
            "rename it if it has one record per line"
        )
    return found


def _require_honest_name(file: SourceFile) -> None:
    """Reject a Git LFS pointer, and compressed, zip or Parquet data in a file named as text.

    Without Git LFS, a downloaded file contains only a pointer to its content; and a downloaded file
    may be compressed without the suffix of its compression.
    """
    try:
        with file.path.open("rb") as handle:
            head = handle.read(len(_POINTER))
    except OSError:
        return  # packing reports the error
    if head == _POINTER:
        raise CorpusError(
            f"{file.name} is a Git LFS pointer, not the file itself; download the files with "
            "`git lfs pull` in the folder of the repository"
        )
    if file.format.binary or is_compressed(file.path):
        return
    for magic, suffix in _MAGIC.items():
        if head.startswith(magic):
            raise CorpusError(
                f"{file.name} contains {suffix} data without that suffix; rename it to "
                f"{Path(file.name).name}{suffix} if it is JSON lines, or unpack it"
            )


def _kind_of(path: Path) -> str:
    if path.is_fifo():
        return "a named pipe"
    return "a socket" if path.is_socket() else "a device"


def _folder(folder: Path, split: str, configuration: str | None) -> Located:
    """Return the files in a folder that belong to one split: records of one format, or text."""
    found, reasons = _walk(folder)
    formats = {name: format_in_folder(Path(name)) for name in found}
    weak = {n: f for n in found if (f := format_with_weak_suffix(Path(n))) is not None}
    names = found
    splits = find_splits(folder, found, configuration) if _is_dataset(found) else None
    if splits is not None:
        names = splits.get(split, [])
        # a file that belongs to a split by its name is data, not a description of data
        formats |= {name: weak[name] for name in names if name in weak}
        others = {name: f"of the split `{other}`" for other in splits for name in splits[other]}
        unread = set(found).difference(names)
        reasons |= {name: others.get(name, "of no split") for name in unread}
        if not any(formats[name] for name in names):
            counts = [f"{other} ({len(files)})" for other, files in splits.items() if files]
            raise CorpusError(
                f"{folder} has no files of the split `{split}`; by their names its splits (with "
                f"numbers of files) are {', '.join(counts) or 'none'}. Give one of them (--split), "
                "or name the files by a pattern, such as "
                f"'{folder}/**/*.jsonl', to read all of them"
            )
    elif split != "train":
        raise CorpusError(
            f"{folder} has no split `{split}`: the names of its files do not divide them, so all "
            "of them are `train`. Remove --split, or name the files by a pattern"
        )
    if not any(formats[name] for name in names):
        formats |= weak
    chosen = _of_one_format([name for name in names if formats[name]], formats)
    if not chosen:
        known = sorted(suffix for each in known_formats() for suffix in each.suffixes)
        kinds = Counter(Path(name).suffix or "files without a suffix" for name in found)
        present = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "no files"
        advice = f"To read other files as text, name them by a pattern, such as '{folder}/**/*.py'"
        if found and all(is_compressed(Path(name)) for name in found):
            advice = "Decompress the files first"
        raise CorpusError(
            f"{folder} contains no text that is read from folders ({', '.join(known)}, "
            f"compressed .jsonl); it contains {present}. {advice}"
        )
    suffix = content_suffix(Path(next(iter(chosen))))
    for name in names:
        if formats[name] is None:
            reasons.setdefault(name, "no known text format")
        elif name not in chosen:
            reasons.setdefault(name, f"of another format than {suffix}")
    both = {
        name: f"also of the split `{other}`"
        for other, files_of_other in (splits or {}).items()
        if other != split
        for name in files_of_other
        if name in chosen
    }
    files = tuple(SourceFile(folder / name, name, chosen[name]) for name in sorted(chosen))
    return Located(files, _by_reason(reasons), _by_reason(both))


def _by_reason(reasons: Mapping[str, str]) -> tuple[LeftOut, ...]:
    found: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        found.setdefault(reason, []).append(name)
    return tuple(LeftOut(reason, tuple(names)) for reason, names in found.items())


def _walk(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of regular files below a folder, and reasons for skipped entries by name.

    Links are followed, but no folder is entered twice. Hidden files and folders, and folders whose
    names begin with two underscores, are ignored, as in `datasets`.
    """
    found: list[str] = []
    skipped: dict[str, str] = {}
    entered = {_identity(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise CorpusError(
                f"cannot read {here}: {error.strerror or error}; check the folder's permissions"
            ) from error
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name.startswith(_HIDDEN):
                    continue
                if (identity := _identity(path)) in entered:
                    skipped[name] = "link to a folder that is also read elsewhere"
                    continue
                entered.add(identity)
                waiting.append(path)
            elif entry.is_file():
                found.append(name)
            elif entry.is_symlink() and not path.exists():
                skipped[name] = "broken link"
            else:
                skipped[name] = "not a regular file"
    return sorted(found), skipped


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_dataset(names: Sequence[str]) -> bool:
    """Return whether suffixes suggest a dataset: some of records, or more .txt than other text.

    Only files of a dataset are assigned to splits by name; a documentation page `testing.md` is not
    a split.
    """
    counts = Counter(content_suffix(Path(name)) for name in names)
    records = pages = 0
    for each in known_formats():
        if each.holds_records:
            records += sum(counts[suffix] for suffix in (*each.suffixes, *each.weak_suffixes))
        else:
            pages += sum(counts[suffix] for suffix in each.suffixes if suffix != ".txt")
    return records > 0 or counts[".txt"] > pages


def _of_one_format(names: Sequence[str], formats: Mapping[str, Format | None]) -> dict[str, Format]:
    """Return the files of one format of records, or all text files if there are no records.

    The format is that of the most common suffix, as in `datasets`.
    """
    known = {name: found for name in names if (found := formats[name]) is not None}
    # text files next to records describe them (a dataset's README.md)
    records = {name: each for name, each in known.items() if each.holds_records}
    if not records:
        return known
    suffixes = {name: content_suffix(Path(name)) for name in records}
    counts = Counter(suffixes.values())
    order = (".parquet", ".jsonl", ".json")
    first = max(counts, key=lambda s: (counts[s], -order.index(s) if s in order else -9, s))
    chosen = next(records[name] for name in records if suffixes[name] == first)
    return {name: each for name, each in records.items() if each == chosen}


def _matching(pattern: str) -> list[SourceFile]:
    parts = expanded(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    root = Path(*parts[:fixed])
    # hidden files (.ipynb_checkpoints, .git) match only explicit patterns, as in `datasets`
    named = sum(part.startswith(_HIDDEN) for part in parts[fixed:])
    found = [
        path
        for path in root.glob(str(Path(*parts[fixed:])))
        if path.is_file()
        and sum(part.startswith(_HIDDEN) for part in path.relative_to(root).parts) == named
    ]
    if not found:
        raise CorpusError(f"no file matches {pattern}; check the path, and quote the pattern")
    return [SourceFile(path, path.relative_to(root).as_posix(), _format_of(path)) for path in found]


def _looks_like_file(path: Path) -> bool:
    known = format_in_folder(path) or format_with_weak_suffix(path)
    return path.is_absolute() or known is not None or is_compressed(path)


# --- datasets saved as folders of Arrow files ---


def _saved_dataset(root: Path, split: str) -> list[SourceFile]:
    folder = root
    if (listed := root / "dataset_dict.json").is_file():
        splits = _json(listed).get("splits")
        if not isinstance(splits, list):
            raise CorpusError(f"{listed} has no list of splits; save the dataset again")
        if split not in splits:
            raise CorpusError(
                f"the dataset {root} has no split `{split}`; its splits are "
                f"{', '.join(map(str, splits))}. Give one of them (--split)"
            )
        folder = root / split
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise CorpusError(
            f"the dataset {folder} was saved with an index mapping; load it with `datasets`, call "
            "flatten_indices(), and save it again"
        )
    present = {path.name for path in folder.iterdir() if path.is_file()}
    try:
        names = [entry["filename"] for entry in state.get("_data_files", [])]
        absent = [name for name in names if name not in present]
    except (KeyError, TypeError) as error:
        raise CorpusError(
            f"{folder / 'state.json'} has no list of data files; save the dataset again"
        ) from error
    if absent:
        raise CorpusError(
            f"{folder / 'state.json'} names {shown(absent[0])}, which is no file in its folder; "
            "copy the dataset again with all of its files"
        )
    for name in names:
        if leads_outside(folder / name, root):
            raise CorpusError(
                f"{folder / name} is a link to a file outside of the dataset {root}; copy the file "
                "into the dataset instead"
            )
    return [SourceFile(folder / name, name, Arrow()) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); save the dataset again") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{path} does not contain a JSON object; save the dataset again")
    return value


def _hub_dataset(data: str, split: str) -> list[SourceFile]:
    import datasets  # slow to import, and needed only for the hub

    name, _, configuration = data.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises errors of many types
        raise CorpusError(
            f"{data} is neither a file nor a folder here, and could not be loaded as the dataset "
            f"`{name}` (split `{split}`) from the Hugging Face hub: {error}. Check the path, or "
            "the name and the network"
        ) from error
    return arrow_files(dataset, data)


def arrow_files(dataset: Any, name: str) -> list[SourceFile]:
    """Return the Arrow files of a loaded `datasets.Dataset`; `name` is used in errors.

    Raises:
        CorpusError: the dataset and its files have different numbers of rows, or it exists only in
            memory.
    """
    paths = [Path(entry["filename"]) for entry in dataset.cache_files]
    rows = 0
    for path in paths:
        with pa.memory_map(str(path)) as source:
            rows += sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    if not paths or rows != dataset.num_rows:
        raise CorpusError(
            f"{name} has {dataset.num_rows} rows, but its Arrow files have {rows}; load it with "
            "`datasets`, save it with save_to_disk, and name the folder instead"
        )
    return [SourceFile(path, path.name, Arrow()) for path in paths]
