"""Test invalid input: one error that names the location and a remedy, without side effects."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import PackedCorpus, Packing, open_source, pack
from sparselogits.errors import CorpusError, StorageError

TEXT = "There is nothing like a good sentence. " * 50


def packed(tokenizer: PreTrainedTokenizerFast, data: Path, **options: object) -> PackedCorpus:
    packing = Packing(options.pop("window", 32), 0, None, holdout=options.pop("holdout", 0.0))
    vocab_size = options.pop("vocab_size", 600)
    source = open_source(data, **options)
    out = data.parent / "out"
    return pack(source, tokenizer, packing, out, vocab_size=vocab_size)


def lines(*rows: object) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


GOOD = {"text": TEXT}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n \n", r"every document is empty or white space"),
        ("a.txt", b"good\n" * 30_000 + b"caf\xe9 \n", r"UTF-8 text: byte 0xe9 at offset 150003"),
        ("a.txt", "é".encode("utf-16"), r"zero byte at offset 3. If it is UTF-16, convert it"),
        ("a.dat", b"MZ\x00\x01 binary", r"a\.dat is not a text file: it has a zero byte at"),
        ("a.txt.gz", b"\x1f\x8b", r"Decompress the file first"),
        ("a.jsonl", lines(GOOD, b"{'no'}"), r"a\.jsonl, line 2 is not JSON .*\"\{'no'\}\""),
        ("a.jsonl", lines(GOOD, b"", b"\xff{}"), r"line 3 is not UTF-8 text: byte 0xff .*iconv"),
        ("a.json", lines([GOOD]), r"line 1 is not an object.*jq -c"),
        ("a.json", b'[\n{"text": "a"}\n]', r"line 1 is not JSON.*jq -c"),
        ("a.jsonl", lines(GOOD, {"a": "", "n": 1}), r"line 2 has no field `text`, nor `prompt` an"),
        ("a.jsonl", lines(GOOD, {"a": "", "n": 1}), r"fields are `a`, `n`. Give the .*text_field"),
        ("a.jsonl", lines(GOOD, {"text": ["b"]}), r"the field `text` contains list, not text"),
        ("a.jsonl", lines(b'{"text": "a\\ud800"}'), r"line 1: .* surrogate pair at character 1"),
        ("a.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be decompressed"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be decompressed"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.arrow", b"no arrow at all", r"a\.arrow cannot be read as Arrow"),
    ],
)  # fmt: skip
def test_files_that_hold_no_text(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        packed(tokenizer, tmp_path / name)


def test_missing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for data in (f"{tmp_path}/none", "none.txt", "a/b/none.jsonl.gz"):
        with pytest.raises(CorpusError, match="does not exist; check the path"):
            open_source(data)
    with pytest.raises(CorpusError, match=r"'There is .*' is no path .*File name too long"):
        open_source(TEXT)
    with pytest.raises(CorpusError, match="no file matches"):
        open_source(f"{tmp_path}/*.txt")
    with pytest.raises(CorpusError, match=r"neither a file nor a folder here.*`no-such/thing`"):
        open_source("no-such/thing:config")


def _link_outside(folder: Path) -> None:
    """Replace the data file by a link to a file outside of the folder."""
    (folder / "data-00000-of-00001.arrow").rename(folder.parent / "secret.arrow")
    (folder / "data-00000-of-00001.arrow").symlink_to("../secret.arrow")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ([], "does not contain a JSON object"),
        ({"_data_files": 7}, "has no list of data files"),
        ({"_data_files": ["a"]}, "has no list of data files"),
        ({"_data_files": [{}]}, "has no list of data files"),
        ({"_data_files": [{"filename": None}]}, "names None, which is no file"),
        ({"_data_files": [{"filename": "../secret.txt"}]}, r"names '../secret.txt'.* no file"),
        ({"_data_files": [{"filename": "/etc/hostname"}]}, r"names '/etc/hostname'.* no file"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"names 'gone.arrow'.* no file"),
        ({"_data_files": [{"filename": "a" * 300}]}, r"names 'aaa.* no file"),
        (_link_outside, "data-00000-of-00001.arrow is a link to a file outside"),
    ],
)
def test_saved_datasets_with_a_damaged_state(tmp_path, damage, message):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([GOOD]).save_to_disk(folder)
    (tmp_path / "secret.txt").write_text("secret")
    if callable(damage):
        damage(folder)
    else:
        (folder / "state.json").write_text(json.dumps(damage))
    with pytest.raises(CorpusError, match=message):
        open_source(folder)


@pytest.mark.parametrize("content", ["[]", '{"splits": 7}', "[" * 9_999])
def test_saved_splits_with_a_damaged_list(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(CorpusError, match=r"dataset_dict\.json .*save the dataset again"):
        open_source(tmp_path)


def test_folders_without_text(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CorpusError, match="contains no files"):
        open_source(folder)
    for name in ("a.py", "b.py", "c.png"):
        (folder / name).write_text("x")
    with pytest.raises(CorpusError, match=r"it contains 2 \.py, 1 \.png.*/\*\*/\*\.py"):
        open_source(folder)


def test_columns_that_are_not_there(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(CorpusError, match=r"no field `text`.*its fields are `body`, `n`"):
        packed(tokenizer, path)
    with pytest.raises(CorpusError, match=r"the column `n` contains int64, not text"):
        packed(tokenizer, path, text_field="n")
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError, match=r"no field `text`.*its fields are `body`"):
        packed(tokenizer, tmp_path / "saved")


def test_completions_where_there_are_none(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CorpusError, match="plain text, which has no completions"):
        open_source(tmp_path / "a.txt", completion_only=True)
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(CorpusError, match="line 1 has no field `prompt` and `completion`"):
        packed(tokenizer, tmp_path / "a.jsonl", completion_only=True)


def test_too_little_text_leaves_nothing_in_the_way(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    tokens = len(tokenizer.encode(TEXT)) + 1
    with pytest.raises(
        CorpusError, match=rf"too short: it has {tokens} tokens, but one window needs 9999"
    ):
        packed(tokenizer, path, window=9999)
    assert packed(tokenizer, path, window=tokens).windows == 1


def test_a_tokenizer_of_another_teacher(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    with pytest.raises(CorpusError, match=r"vocabulary has 300 ids: the tokenizer does not belong"):
        packed(tokenizer, path, vocab_size=300)
    packing = Packing(32, 700, None)
    with pytest.raises(CorpusError, match=r"separator_id=700 lies outside"):
        pack(open_source(path), tokenizer, packing, tmp_path / "other", vocab_size=600)


def test_an_output_that_is_a_file(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        StorageError, match=r"cannot write .*/out(/lock)?: (Not a directory|File exists)"
    ):
        packed(tokenizer, path)


def test_an_output_folder_in_use(tokenizer, tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(TEXT)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="not empty and contains no packed corpus"):
        packed(tokenizer, path)
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "index.json").unlink(), "not finished; pack the text again to resume"),
        (lambda out: (out / "index.json").write_text("{"), "cannot be read"),
        (lambda out: (out / "corpus.json").unlink(), "contains no packed corpus"),
        (lambda out: edit(out / "corpus.json", format=99), "has format 99"),
        (lambda out: edit(out / "corpus.json", vocab_size="x"), "vocab_size is 'x', expected an"),
        (lambda out: edit(out / "corpus.json", vocab_size=2**60), "vocab_size is 115"),
        (lambda out: flip(out / "training/part-00000000.parquet"), "part-00000000.parquet is dam"),
        (lambda out: (out / "training/part-00000000.parquet").unlink(), "parquet is damaged"),
        (lambda out: (out / "training/part-00000000.parquet").write_bytes(b""), "is damaged"),
        (lambda out: (out / "training/part-00000000.parquet").write_bytes(bytes(99)), "b'PAR1'"),
        (lambda out: write_part(out, [1], [1]), "are int32, int32, expected int32, bool"),
        (lambda out: write_part(out, [1], [True], [1]), "are int32, bool, int32, expected"),
        (lambda out: write_part(out, [1], [True], [None]), "are int32, bool, object, expected"),
        (lambda out: claim_compressed(out), r"claims 1 bytes \(16777216 compressed\) and 1 value"),
        (lambda out: flip(out / "frequencies.parquet"), "frequencies.parquet is damaged"),
        (lambda out: write_frequencies(out, [1, 2]), r"found int64 \[2\], expected int64 \["),
        (lambda out: write_frequencies(out, ["a"]), r"found object \[1\], expected int64 \["),
        (
            lambda out: write_frequencies(out, [0] * 10**6),
            "has 1000000 rows of 1 columns, expected",
        ),
        (lambda out: claim_bytes(out / "frequencies.parquet"), "a page claims 268435456 bytes"),
    ],
)
def test_damage_on_disk(tokenizer, tmp_path, damage, message):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    packed(tokenizer, path)
    damage(tmp_path / "out")
    with pytest.raises(CorpusError, match=message):  # noqa: PT012
        corpus = PackedCorpus.open(tmp_path / "out")
        corpus.read(0, corpus.windows)
        corpus.token_frequencies.sum()


def write_part(out: Path, *columns: list[int | bool | None]) -> None:
    """Replace a part by one with other columns, whose numbers are int32."""
    kinds = [pa.int32() if type(column[0]) is int else pa.bool_() for column in columns]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    table = pa.table(arrays, names=["token", "document_start", "learnt"][: len(arrays)])
    path = out / "training" / "part-00000000.parquet"
    pq.write_table(table, path, store_schema=False, use_dictionary=False)


def write_frequencies(out: Path, counts: list[int] | list[str]) -> None:
    pq.write_table(pa.table({"count": counts}), out / "frequencies.parquet")


def edit(path: Path, **values: object) -> None:
    """Replace values of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def claim_bytes(path: Path) -> None:
    """Insert before the first page a header of a dictionary that claims 2**28 bytes for one."""
    header = b"\x15\x04\x15\x80\x80\x80\x80\x02\x15\x02\x4c\x15\x02\x15\x00\x00\x00"
    content = path.read_bytes()
    path.write_bytes(content[:4] + header + content[4:])


def claim_compressed(out: Path) -> None:
    """Insert before the first page a header that claims 2**24 compressed bytes for one of text."""
    path = out / "training" / "part-00000000.parquet"
    header = b"\x15\x00\x15\x02\x15\x80\x80\x80\x10\x2c\x15\x02\x15\x00\x00\x00"
    content = path.read_bytes()
    path.write_bytes(content[:4] + header + content[4:])


def flip(path: Path) -> None:
    """Change one byte of the first page."""
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
