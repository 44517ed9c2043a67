"""Find the files that hold the text which the user names."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Files that were found and are not read, for one reason."""

    reason: str
    names: tuple[str, ...]

    def in_words(self, one: str = "", several: str = "") -> str:
        """Return the number of files, the reason and some names; with a clause after the number."""
        few = ", ".join(self.names[:3]) + ", ..." * (len(self.names) > 3)
        files = f"1 file{one}" if len(self.names) == 1 else f"{len(self.names):,} files{several}"
        return f"{files} ({self.reason}: {few})"


@dataclass(frozen=True)
class Located:
    """The files that a name stands for, and those found with them that are not read."""

    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    shared: tuple[LeftOut, ...] = ()
    """Files that are read although their names name another split as well."""


def locate(data: str, split: str) -> Located:
    """Find the files that `data` names, in a stable order.

    Raises:
        CorpusError: nothing is found, or nothing that can be read as text.
    """
    path = Path(data).expanduser()
    base, _, configuration = data.rpartition(":")
    located = None
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
            f"{data} is {_what_it_is(path)}; only regular files are read, because packing reads a "
            "text at several positions and again after an interruption. Write its content to a "
            "file and name that"
        )
    elif any(sign in data for sign in "*?["):
        _require_train(data, split)
        files = _matching(data)
    elif base and Path(base).expanduser().is_dir():
        located = _folder(Path(base).expanduser(), split, configuration)
    elif _HUB_NAME.fullmatch(data) and not _looks_like_file(path):
        files = _hub_dataset(data, split)
    elif "://" in data:
        raise CorpusError(
            f"{data} is a URL; text is read from this machine or by a dataset's name on the hub: "
            "download it first"
        )
    elif path.is_symlink():
        raise CorpusError(
            f"{data} is a link to {path.readlink()}, which does not exist; name a file that does"
        )
    else:
        raise CorpusError(f"{data} does not exist; check the path (working folder: {Path.cwd()})")
    if located is None:
        located = Located(tuple(sorted(files, key=lambda file: file.name)))
    if all(file.path.stat().st_size == 0 for file in located.files):
        raise CorpusError(f"{data} is empty: no file in it holds a single byte; name other text")
    for file in located.files:
        _refuse_disguised(file)
    return located


def _require_train(data: str, split: str) -> None:
    """Refuse a split of files that are named one by one: all of them are read."""
    if split != "train":
        raise CorpusError(
            f"{data} names files, which have no split `{split}`; leave out --split, name the files "
            "of that split, or name their folder"
        )


def _format_of(path: Path) -> Format:
    """Return the format of a file that the user names."""
    found = format_of_named_file(path)
    if found is None:
        known = ", ".join(own.suffixes[0] for own in known_formats() if own.compressible)
        raise CorpusError(
            f"{path} is compressed text; only records in lines are read compressed ({known} before "
            f"{path.suffix}). Decompress it first, or rename it if it holds such records"
        )
    return found


def _refuse_disguised(file: SourceFile) -> None:
    """Refuse a file that holds something other than its name says.

    Without Git LFS, a file is a small text that points to its content. A download may be compressed
    although its name does not say so.
    """
    try:
        with file.path.open("rb") as handle:
            head = handle.read(len(_POINTER))
    except OSError:
        return  # reading reports what is wrong
    if head == _POINTER:
        raise CorpusError(
            f"{file.name} is a Git LFS pointer, not the file itself; fetch the files with "
            "`git lfs pull` in the folder of the repository"
        )
    if file.format.binary or is_compressed(file.path):
        return
    for magic, suffix in _MAGIC.items():
        if head.startswith(magic):
            raise CorpusError(
                f"{file.name} holds {suffix} data, which its name does not say; name it "
                f"{Path(file.name).name}{suffix} if it is JSON lines, or unpack it"
            )


def _what_it_is(path: Path) -> str:
    kinds = {"is_fifo": "a named pipe", "is_socket": "a socket", "is_char_device": "a device"}
    kinds["is_block_device"] = "a device"
    return next((what for name, what in kinds.items() if getattr(path, name)()), "no file")


def _folder(folder: Path, split: str, configuration: str | None) -> Located:
    """Find the files of a folder that are of one split and one format."""
    found, reasons = _walk(folder)
    formats = {name: format_in_folder(Path(name)) for name in found}
    weak = {name: own for name in found if (own := format_with_weak_suffix(Path(name))) is not None}
    names = found
    splits = find_splits(folder, found, configuration) if _is_dataset(found) else None
    if splits is not None:
        names = splits.get(split, [])
        # a file that is of a split by its name is data, not a description of data
        formats |= {name: weak[name] for name in names if name in weak}
        others = {name: f"of the split `{own}`" for own in splits for name in splits[own]}
        unread = set(found).difference(names)
        reasons |= {name: others.get(name, "of no split") for name in unread}
        if not any(formats[name] for name in names):
            counts = [f"{key} ({len(own)})" for key, own in splits.items() if own]
            raise CorpusError(
                f"{folder} has no files of the split `{split}`; by their names its splits are "
                f"{', '.join(counts)} (files each). Name one of them (--split), or name the files "
                f"by a pattern, such as '{folder}/**/*.jsonl', to read all of them"
            )
    elif split != "train":
        raise CorpusError(
            f"{folder} has no split `{split}`: nothing in the names of its files divides them, so "
            "all of them are `train`. Leave out --split, or name the files by a pattern"
        )
    if not any(formats[name] for name in names):
        formats |= weak
    chosen = _of_one_format([name for name in names if formats[name]], formats)
    if not chosen:
        known = sorted(suffix for own in known_formats() for suffix in own.suffixes)
        raise CorpusError(
            f"{folder} holds no text that is read from folders ({', '.join(known)}, "
            f"compressed .jsonl); it holds {_suffixes(map(Path, found))}. To read other files as "
            f"text, name them by a pattern, such as '{folder}/**/*.py'"
        )
    suffix = content_suffix(Path(next(iter(chosen))))
    for name in names:
        if formats[name] is None:
            reasons.setdefault(name, "no text by name")
        elif name not in chosen:
            reasons.setdefault(name, f"of another format than {suffix}")
    both = {
        name: f"also of the split `{other}`"
        for other, own in (splits or {}).items()
        if other != split
        for name in own
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
    """Return the names of the regular files below a folder, and what is skipped, with the reason.

    Links are followed, but no folder is entered twice. Hidden files and folders, and folders that
    begin with two underscores, are not looked at, as in `datasets`.
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
                    skipped[name] = "link to a folder that is read already"
                    continue
                entered.add(identity)
                waiting.append(path)
            elif entry.is_file():
                found.append(name)
            elif entry.is_symlink() and not path.exists():
                skipped[name] = "link to nothing"
            else:
                skipped[name] = "no regular file"
    return sorted(found), skipped


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_dataset(names: Sequence[str]) -> bool:
    """Return whether files are such as `datasets` reads: records, or for the most part .txt files.

    Folders of documentation (.md, .rst) have no splits because a page is called testing.md.
    """
    counts = Counter(content_suffix(Path(name)) for name in names)
    records = pages = 0
    for own in known_formats():
        if own.holds_records:
            records += sum(counts[suffix] for suffix in (*own.suffixes, *own.weak_suffixes))
        else:
            pages += sum(counts[suffix] for suffix in own.suffixes if suffix != ".txt")
    return records > 0 or counts[".txt"] > pages


def _of_one_format(names: Sequence[str], formats: Mapping[str, Format | None]) -> dict[str, Format]:
    """Return the records of the commonest format, as `datasets` chooses it; without any, text."""
    known = {name: own for name in names if (own := formats[name]) is not None}
    # beside records, text files describe them (a dataset's README.md)
    records = {name: own for name, own in known.items() if own.holds_records}
    if not records:
        return known
    suffixes = {name: content_suffix(Path(name)) for name in records}
    counts = Counter(suffixes.values())
    order = (".parquet", ".jsonl", ".json")
    first = max(counts, key=lambda s: (counts[s], -order.index(s) if s in order else -9, s))
    chosen = next(records[name] for name in records if suffixes[name] == first)
    return {name: own for name, own in records.items() if own == chosen}


def _matching(pattern: str) -> list[SourceFile]:
    parts = Path(pattern).expanduser().parts
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    root = Path(*parts[:fixed])
    # hidden files only where the pattern names them, as in `datasets` (.ipynb_checkpoints, .git)
    named = sum(part.startswith(_HIDDEN) for part in parts[fixed:])
    found = [
        path
        for path in root.glob(str(Path(*parts[fixed:])))
        if path.is_file()
        and sum(part.startswith(_HIDDEN) for part in path.relative_to(root).parts) == named
    ]
    if not found:
        raise CorpusError(f"no file matches {pattern}; quote the pattern, and check the path")
    return [SourceFile(path, path.relative_to(root).as_posix(), _format_of(path)) for path in found]


def _suffixes(paths: Iterable[Path]) -> str:
    counts = Counter(path.suffix or "files without a suffix" for path in paths)
    return ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) or "no files"


def _looks_like_file(path: Path) -> bool:
    known = format_in_folder(path) or format_with_weak_suffix(path)
    return path.is_absolute() or known is not None or is_compressed(path)


# datasets: on disk they are folders of Arrow files


def _arrow(path: Path, name: str) -> SourceFile:
    return SourceFile(path, name, Arrow())


def _saved_dataset(folder: Path, split: str) -> list[SourceFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise CorpusError(
                f"the dataset {folder} has no split `{split}`; its splits are {', '.join(splits)}"
            )
        folder = folder / split
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise CorpusError(
            f"the dataset {folder} was saved with an index mapping; load it with `datasets`, call "
            "flatten_indices(), and save it again"
        )
    names = [entry["filename"] for entry in state.get("_data_files", [])]
    return [_arrow(folder / name, name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); save the dataset anew") from error
    return value


def _hub_dataset(data: str, split: str) -> list[SourceFile]:
    import datasets  # slow to import, and needed for names on the hub only

    name, _, configuration = data.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises a dozen kinds
        raise CorpusError(
            f"{data} is neither a file nor a folder here, and could not be loaded as the dataset "
            f"`{name}` (split `{split}`) from the Hugging Face hub: {error}"
        ) from error
    return arrow_files(dataset, data)


def arrow_files(dataset: Any, name: str) -> list[SourceFile]:
    """Return the Arrow files of a `datasets.Dataset` that was loaded.

    Raises:
        CorpusError: the dataset is a selection of its files, or exists in memory only.
    """
    import pyarrow as pa

    paths = [Path(entry["filename"]) for entry in dataset.cache_files]
    rows = 0
    for path in paths:
        with pa.memory_map(str(path)) as source:
            rows += sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    if not paths or rows != dataset.num_rows:
        raise CorpusError(
            f"{name} is part of a dataset ({dataset.num_rows} of {rows} rows); load it with "
            "`datasets`, save it with save_to_disk, and name the folder instead"
        )
    return [_arrow(path, path.name) for path in paths]
