"""From what the user names to the files that hold the text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparselogits.errors import CorpusError

Kind = Literal["text", "json", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
_NAMED_KINDS: dict[str, Kind] = {".json": "json", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Relative to what the user named, with forward slashes: stable when the corpus is moved."""
    kind: Kind


def locate(data: str, split: str) -> list[SourceFile]:
    """The files that `data` names, in a stable order.

    Raises:
        CorpusError: nothing is there, or nothing that could be read as text.
    """
    path = Path(data).expanduser()
    if path.is_file():
        files = [SourceFile(path, path.name, _kind_of_named(path))]
    elif path.is_dir():
        files = _saved_dataset(path, split) if _is_saved_dataset(path) else _folder(path)
    elif any(sign in data for sign in "*?["):
        files = _matching(data)
    elif _HUB_NAME.fullmatch(data) and not _looks_like_file(path):
        files = _hub_dataset(data, split)
    elif "://" in data:
        raise CorpusError(
            f"{data} is a URL; text is read from this machine or by a dataset's name on the hub: "
            "download it first"
        )
    else:
        raise CorpusError(f"{data} does not exist; check the path (working folder: {Path.cwd()})")
    if all(file.path.stat().st_size == 0 for file in files):
        raise CorpusError(f"{data} is empty: no file in it holds a single byte; name other text")
    return sorted(files, key=lambda file: file.name)


def _kind(path: Path) -> Kind | None:
    """What a file holds by its name.

    A plain `.json` says too little: beside text it is more often a description than data.
    """
    if path.suffix in _COMPRESSED:
        inner = path.with_suffix("").suffix.lower()
        return "json" if inner in (".jsonl", ".ndjson", ".json") else None
    return _KINDS.get(path.suffix.lower())


def _kind_of_named(path: Path) -> Kind:
    """A file named by itself is text unless its name says otherwise."""
    kind = _kind(path)
    if kind is None and path.suffix in _COMPRESSED:
        raise CorpusError(f"{path} is compressed text: decompress it first (gunzip, unzstd)")
    return kind or _NAMED_KINDS.get(path.suffix.lower(), "text")


def _folder(folder: Path) -> list[SourceFile]:
    there = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    files = [
        SourceFile(path, path.relative_to(folder).as_posix(), kind)
        for path in there
        if (kind := _kind(path)) is not None
    ]
    if not files:
        raise CorpusError(
            f"{folder} holds no text that is read from folders ({', '.join(sorted(_KINDS))}, "
            f"compressed .jsonl); it holds {_suffixes(there)}. To read other files as text, name "
            f"them by a pattern, such as '{folder}/**/*.py'"
        )
    # beside records, text files describe them (a dataset's README.md)
    return [file for file in files if file.kind != "text"] or files


def _matching(pattern: str) -> list[SourceFile]:
    parts = Path(pattern).expanduser().parts
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    root = Path(*parts[:fixed])
    found = [path for path in root.glob(str(Path(*parts[fixed:]))) if path.is_file()]
    if not found:
        raise CorpusError(f"no file matches {pattern}; quote the pattern, and check the path")
    return [
        SourceFile(path, path.relative_to(root).as_posix(), _kind_of_named(path)) for path in found
    ]


def _suffixes(paths: Iterable[Path]) -> str:
    counts = Counter(path.suffix or "files without a suffix" for path in paths)
    return ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) or "no files"


def _looks_like_file(path: Path) -> bool:
    return path.is_absolute() or _kind(path) is not None or path.suffix in (".json", *_COMPRESSED)


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
