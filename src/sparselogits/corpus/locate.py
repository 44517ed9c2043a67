"""From what the user names to the files that hold the text."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparselogits.corpus.compressed import COMPRESSION
from sparselogits.corpus.splits import find_splits
from sparselogits.errors import CorpusError

Kind = Literal["text", "json", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
_NAMED_KINDS: dict[str, Kind] = {".json": "json", ".arrow": "arrow"}
_RECORDS = tuple(suffix for suffix, kind in _KINDS.items() if kind != "text")
_HIDDEN = (".", "__")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC = {
    b"\x1f\x8b\x08": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\0": ".xz",
    b"BZh91AY&SY": ".bz2",
    b"PK\x03\x04": ".zip",
    b"PAR1\x15": ".parquet",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Relative to what the user named, with forward slashes: stable when the corpus is moved."""
    kind: Kind


@dataclass(frozen=True)
class LeftOut:
    """Files that are there and not read, for one reason."""

    reason: str
    names: tuple[str, ...]

    def in_words(self, one: str = "", several: str = "") -> str:
        """Say how many they are, why, and which; with a clause behind the number, if given."""
        few = ", ".join(self.names[:3]) + ", ..." * (len(self.names) > 3)
        files = f"1 file{one}" if len(self.names) == 1 else f"{len(self.names):,} files{several}"
        return f"{files} ({self.reason}: {few})"


@dataclass(frozen=True)
class Located:
    """The files that a name stands for, and those beside them that are not read."""

    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    shared: tuple[LeftOut, ...] = ()
    """Files that are read although their names say another split as well."""


def locate(data: str, split: str) -> Located:
    """Find the files that `data` names, in a stable order.

    Raises:
        CorpusError: nothing is there, or nothing that could be read as text.
    """
    path = Path(data).expanduser()
    base, _, configuration = data.rpartition(":")
    left_out: list[LeftOut] = []
    shared: list[LeftOut] = []
    if path.is_file():
        _require_train(data, split)
        files = [SourceFile(path, path.name, _kind_of_named(path))]
    elif path.is_dir():
        if _is_saved_dataset(path):
            files = _saved_dataset(path, split)
        else:
            files, left_out, shared = _folder(path, split, None)
    elif path.exists():
        raise CorpusError(
            f"{data} is {_what_it_is(path)}; only regular files are read, because packing reads a "
            "text in several places and again after an interruption. Write its content to a file "
            "and name that"
        )
    elif any(sign in data for sign in "*?["):
        _require_train(data, split)
        files = _matching(data)
    elif base and Path(base).expanduser().is_dir():
        files, left_out, shared = _folder(Path(base).expanduser(), split, configuration)
    elif _HUB_NAME.fullmatch(data) and not _looks_like_file(path):
        files = _hub_dataset(data, split)
    elif "://" in data:
        raise CorpusError(
            f"{data} is a URL; text is read from this machine or by a dataset's name on the hub: "
            "download it first"
        )
    elif path.is_symlink():
        raise CorpusError(f"{data} is a link to {path.readlink()}, which does not exist")
    else:
        raise CorpusError(f"{data} does not exist; check the path (working folder: {Path.cwd()})")
    if all(file.path.stat().st_size == 0 for file in files):
        raise CorpusError(f"{data} is empty: no file in it holds a single byte; name other text")
    for file in files:
        _refuse_disguised(file)
    ordered = tuple(sorted(files, key=lambda file: file.name))
    return Located(ordered, tuple(left_out), tuple(shared))


def _require_train(data: str, split: str) -> None:
    """Refuse a split of files that are named one by one: all of them are read."""
    if split != "train":
        raise CorpusError(
            f"{data} names files, which have no split `{split}`; leave out --split, name the files "
            "of that split, or name their folder"
        )


def _refuse_disguised(file: SourceFile) -> None:
    """Refuse files that are something else than their names say.

    What Git leaves in a file's place where LFS is not installed reads as text; a download may be
    compressed although its name does not say so.
    """
    try:
        with file.path.open("rb") as handle:
            head = handle.read(len(_POINTER))
    except OSError:
        return  # reading says what is wrong
    if head == _POINTER:
        raise CorpusError(
            f"{file.name} is a Git LFS pointer, not the file itself; fetch the files with "
            "`git lfs pull` in the folder of the repository"
        )
    if file.kind not in ("text", "json") or file.path.suffix.lower() in COMPRESSION:
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


def _kind(path: Path) -> Kind | None:
    """What a file holds by its name.

    A plain `.json` says too little: beside text it is more often a description than data.
    """
    if path.suffix.lower() in COMPRESSION:
        inner = path.with_suffix("").suffix.lower()
        return "json" if inner in (".jsonl", ".ndjson", ".json") else None
    return _KINDS.get(path.suffix.lower())


def _kind_of_named(path: Path) -> Kind:
    """A file named by itself is text unless its name says otherwise."""
    kind = _kind(path)
    if kind is None and path.suffix.lower() in COMPRESSION:
        raise CorpusError(
            f"{path} is compressed text; only JSON lines are read compressed (.jsonl"
            f"{path.suffix}). Decompress it first, or rename it if it holds JSON lines"
        )
    return kind or _NAMED_KINDS.get(path.suffix.lower(), "text")


def _folder(
    folder: Path, split: str, configuration: str | None
) -> tuple[list[SourceFile], list[LeftOut], list[LeftOut]]:
    """The files of a folder that are read (of one split, of one kind), left out, and shared."""
    there, passed_over = _walk(folder)
    kinds = {name: _kind(Path(name)) for name in there}
    names, reasons = there, passed_over
    splits = None
    if _is_dataset(there):
        splits = find_splits(folder, there, configuration)
    if splits is not None:
        names = splits.get(split, [])
        for name in names:  # a file that is of a split by its name is data, and no description
            if kinds[name] is None and name.lower().endswith(".json"):
                kinds[name] = "json"
        for other, own in splits.items():
            if other != split:
                reasons |= {name: f"of the split `{other}`" for name in own if name not in names}
        reasons |= {
            name: "of no split" for name in there if name not in names and name not in reasons
        }
        if not any(kinds[name] for name in names):
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
    if not any(kinds[name] for name in names) and all(
        Path(name).suffix.lower() != ".json" for name in names
    ):
        raise CorpusError(
            f"{folder} holds no text that is read from folders ({', '.join(sorted(_KINDS))}, "
            f"compressed .jsonl); it holds {_suffixes(map(Path, there))}. To read other files as "
            f"text, name them by a pattern, such as '{folder}/**/*.py'"
        )
    if not any(kinds[name] for name in names):  # nothing but .json
        kinds |= dict.fromkeys((n for n in names if n.lower().endswith(".json")), "json")
    chosen = _of_one_kind([name for name in names if kinds[name]], kinds)
    for name in names:
        if kinds[name] is None:
            reasons.setdefault(name, "no text by name")
        elif name not in chosen:
            reasons.setdefault(name, f"of another format than {_extension(chosen[0])}")
    files = [SourceFile(folder / name, name, kinds[name]) for name in chosen]  # type: ignore[arg-type]
    both = {
        name: f"also of the split `{other}`"
        for other, own in (splits or {}).items()
        if other != split
        for name in own
        if name in chosen
    }
    return files, _by_reason(reasons), _by_reason(both)


def _by_reason(reasons: Mapping[str, str]) -> list[LeftOut]:
    found: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        found.setdefault(reason, []).append(name)
    return [LeftOut(reason, tuple(names)) for reason, names in found.items()]


def _walk(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the regular files below a folder, and of what is passed over, with the reason.

    Links are followed, but no folder is entered twice. Hidden files and folders, and folders that
    begin with two underscores, are not looked at, as in `datasets`.
    """
    found: list[str] = []
    passed_over: dict[str, str] = {}
    entered = {_identity(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise CorpusError(f"cannot read {here}: {error.strerror or error}") from error
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name.startswith(_HIDDEN):
                    continue
                if (identity := _identity(path)) in entered:
                    passed_over[name] = "link to a folder that is read already"
                    continue
                entered.add(identity)
                waiting.append(path)
            elif entry.is_file():
                found.append(name)
            elif entry.is_symlink() and not path.exists():
                passed_over[name] = "link to nothing"
            else:
                passed_over[name] = "no regular file"
    return sorted(found), passed_over


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_dataset(names: Sequence[str]) -> bool:
    """Whether files are such as `datasets` reads: records, or for the most part .txt files.

    Pages of documentation (.md, .rst) are no splits because one of them is called testing.md.
    """
    extensions = Counter(_extension(name) for name in names)
    records = sum(extensions[e] for e in (*_RECORDS, ".json"))
    pages = sum(extensions[e] for e, kind in _KINDS.items() if kind == "text" and e != ".txt")
    return records > 0 or extensions[".txt"] > pages


def _of_one_kind(names: list[str], kinds: Mapping[str, Kind | None]) -> list[str]:
    """Records where there are any, of the commonest format, as `datasets` chooses it; else text."""
    # beside records, text files describe them (a dataset's README.md)
    records = [name for name in names if kinds[name] != "text"]
    if not records:
        return names
    counts = Counter(_extension(name) for name in records)
    order = (".parquet", ".jsonl", ".json")
    first = max(counts, key=lambda e: (counts[e], -order.index(e) if e in order else -9, e))
    kind = kinds[next(name for name in records if _extension(name) == first)]
    return [name for name in records if kinds[name] == kind]


def _extension(name: str) -> str:
    """The suffix that says what a file holds: that before a suffix of compression."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSION else path).suffix.lower()


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
    return [
        SourceFile(path, path.relative_to(root).as_posix(), _kind_of_named(path)) for path in found
    ]


def _suffixes(paths: Iterable[Path]) -> str:
    counts = Counter(path.suffix or "files without a suffix" for path in paths)
    return ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) or "no files"


def _looks_like_file(path: Path) -> bool:
    return path.is_absolute() or _kind(path) is not None or path.suffix in (".json", *COMPRESSION)


# datasets: on disk they are folders of Arrow files


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


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
    return [SourceFile(folder / name, name, "arrow") for name in names]


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
    """The Arrow files behind a `datasets.Dataset` as it was loaded.

    Raises:
        CorpusError: for a dataset that is a selection of its files, or held in memory.
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
    return [SourceFile(path, path.name, "arrow") for path in paths]
