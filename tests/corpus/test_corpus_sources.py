"""Test that a source gives the same documents in every file format."""

import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import write_lines

from sparselogits.corpus import Source, open_source, pieces
from sparselogits.corpus.locate import arrow_files
from sparselogits.errors import CorpusError


def in_portions(source: Source, portion_bytes: int) -> list[str]:
    """Documents as put together from portions, each read by itself and in reverse order."""
    portions = source.portions(portion_bytes)
    found = {i: list(source.pieces(portions[i])) for i in reversed(range(len(portions)))}
    documents: list[str] = []
    for portion in range(len(portions)):
        for piece in found[portion]:
            if piece.opens:
                documents.append("")
            documents[-1] += piece.text[piece.start : piece.stop]
    assert len(portions) > 1
    return documents


def write_jsonl(path: Path, texts: list[str]) -> Path:
    write_lines(path, ({"text": text} for text in texts))
    return path


def write_separated(path: Path, texts: list[str]) -> Path:
    path.write_text("<|endoftext|>\n".join(texts))
    return path


def write_folder(path: Path, texts: list[str]) -> Path:
    for number, text in enumerate(texts):
        (path / f"part {number // 50}").mkdir(parents=True, exist_ok=True)
        (path / f"part {number // 50}" / f"{number:03d}.txt").write_text(text)
    (path / "part 0" / "LICENSE").write_text("not a document")
    (path / ".hidden.txt").write_text("not a document")
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, row_group_size=17)
    return path


def write_dictionary(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), path, row_group_size=17)
    return path


def write_gzip(path: Path, texts: list[str]) -> Path:
    half = len(texts) // 2  # two members, as when compressed files are concatenated
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    path.mkdir()
    first = gzip.compress(b"".join(lines[:half])) + gzip.compress(b"".join(lines[half:-1]))
    (path / "a.jsonl.gz").write_bytes(first)
    (path / "b.json.gz").write_bytes(gzip.compress(lines[-1]))
    return path


def write_zstd(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    path.mkdir()
    half = len(lines) // 2  # two frames, likewise
    for name, parts in (("a", (lines[:half], lines[half:-1])), ("b", (lines[-1:],))):
        frames = [pa.compress(b"".join(part), codec="zstd", asbytes=True) for part in parts]
        (path / f"{name}.jsonl.zst").write_bytes(b"".join(frames))
    return path


def write_dataset(path: Path, texts: list[str]) -> Path:
    rows = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    rows.save_to_disk(path, num_shards=2)
    return path


WRITERS = {
    "separated.txt": write_separated,
    "folder": write_folder,
    "lines.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "table.parquet": write_parquet,
    "dictionary.parquet": write_dictionary,
    "gzip": write_gzip,
    "zstd": write_zstd,
    "dataset": write_dataset,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, stories, kind, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)  # texts are divided between pieces only
    source = open_source(WRITERS[kind](tmp_path / kind, stories))
    assert list(source.documents()) == stories
    assert in_portions(source, 5000) == stories


def test_a_pattern_reads_files_of_any_suffix(tmp_path):
    for name in ("b/x.py", "a.py", "c.c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = open_source(f"{tmp_path}/**/*.py")
    assert list(source.documents()) == ["a.py", "b/x.py"]
    assert [file.name for file in source.files] == ["a.py", "b/x.py"]


def test_beside_records_text_files_are_not_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["record"])
    write_jsonl(tmp_path / "b.ndjson", ["row"])
    (tmp_path / "README.md").write_text("about them")
    (tmp_path / "notes.txt").write_text("more about them")
    source = open_source(tmp_path)
    assert list(source.documents()) == ["record", "row"]
    assert [own.names for own in source.left_out] == [("README.md", "notes.txt")]


def test_splits_of_a_dataset(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert list(open_source(tmp_path / "d", split="test").documents()) == ["test"]
    with pytest.raises(CorpusError, match=r"no split `valid`; its splits are train, test"):
        open_source(tmp_path / "d", split="valid")


def test_files_behind_a_loaded_dataset(tmp_path, stories):
    data = write_jsonl(tmp_path / "lines.jsonl", stories)
    loaded = datasets.load_dataset(
        "json", data_files=str(data), split="train", cache_dir=str(tmp_path / "cache")
    )
    [file] = arrow_files(loaded, "lines")
    assert list(open_source(file.path).documents()) == stories
    with pytest.raises(CorpusError, match="has 100 rows, but its Arrow files have 200"):
        arrow_files(loaded.select(range(100)), "lines")
    with pytest.raises(CorpusError, match="has 1 rows, but its Arrow files have 0"):
        arrow_files(datasets.Dataset.from_list([{"text": "a"}]), "lines")


def test_other_columns_and_nulls(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"body": ["one", None, " ", "two"], "n": [1, 2, 3, 4]}), path)
    assert list(open_source(path, text_field="body").documents()) == ["one", "two"]


def test_prompts_and_completions(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": "Q: 1?", "completion": " A."}, {"prompt": "", "completion": "B"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    plain = open_source(path)
    [portion] = plain.portions(1 << 20)
    assert [piece.carries_target for piece in plain.pieces(portion)] == [True] * 3
    masked = open_source(path, completion_only=True)
    found = [(p.text, p.opens, p.closes, p.carries_target) for p in masked.pieces(portion)]
    parts = [("Q: 1?", True, False, False), (" A.", False, True, True), ("B", True, True, True)]
    assert found == parts
    assert (plain.masked, masked.masked) == (False, True)


def test_fingerprints_follow_the_content_and_nothing_else(tmp_path):
    folder = write_folder(tmp_path / "a", [f"{n} " * 40_000 for n in range(4)])
    original = open_source(folder).fingerprint
    moved = tmp_path / "elsewhere" / "b"
    shutil.copytree(folder, moved, copy_function=shutil.copyfile)
    os.utime(moved / "part 0" / "000.txt", (1, 1))
    assert open_source(moved).fingerprint == original
    file = moved / "part 0" / "003.txt"
    content = bytearray(file.read_bytes())
    for change in ("edge", "longer", "name"):
        if change == "edge":
            file.write_bytes(content[:-2] + b"7 ")
        elif change == "longer":
            file.write_bytes(content + b" ")
        else:
            file.write_bytes(content)
            file.rename(file.with_name("004.txt"))
        assert open_source(moved).fingerprint != original, change
