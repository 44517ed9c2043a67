"""Test that rows of token ids become the windows that their trainer reads."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import write_lines
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import PackedCorpus, fingerprint, open_source, pack, packing_for
from sparselogits.corpus.formats import tokens as token_formats
from sparselogits.corpus.windows import PackingKind
from sparselogits.errors import (
    CorpusError,
    IdentityMismatchError,
    InvalidArgumentError,
    SparseLogitsWarning,
)

VOCAB, LENGTH, END = 300, 8, 0
Rows = list[dict[str, Any]]
Expected = list[tuple[list[int], list[bool], list[int]]]
"""Tokens, mask and document starts of each window."""


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def packed(tokenizer, tmp_path) -> Callable[..., PackedCorpus]:
    numbers = iter(range(1000))

    def packed(
        data: Any,
        *,
        window: int = LENGTH,
        reset: bool = False,
        holdout: float = 0.0,
        kind: PackingKind = "joined",
        part_bytes: int = 1 << 20,
        **options: Any,
    ) -> PackedCorpus:
        given = data if not isinstance(data, Path) else str(data)
        source = open_source(given, tokenized_by=tokenizer, **options)
        packing = packing_for(
            tokenizer, window_length=window, reset_attention=reset, holdout=holdout, kind=kind
        )
        folder = tmp_path / f"packed-{next(numbers)}"
        return pack(source, tokenizer, packing, folder, vocab_size=VOCAB, part_bytes=part_bytes)

    return packed


def windows_of(corpus: PackedCorpus) -> Expected:
    found = []
    for window in corpus.read(0, corpus.windows):
        assert window.mask is not None
        starts = window.document_starts.tolist()
        found.append((window.tokens.tolist(), window.mask.tolist(), starts))
    return found


def expected_window(
    ids: list[int],
    learnt: list[bool] | None = None,
    starts: tuple[int, ...] = (),
    length: int = LENGTH,
) -> tuple[list[int], list[bool], list[int]]:
    """By hand: a row at the window's beginning, and padding that is not learnt after it."""
    learnt = [True] * len(ids) if learnt is None else learnt
    more = length - len(ids)
    flags = learnt + [False] * more
    pad = [len(ids)] if more else []
    return ids + [END] * more, [*flags[1:], False], [0, *starts, *pad]


def random_rows(seed: int) -> tuple[Rows, Expected]:
    """Rows as trainers prepare them, with every column, and the windows they should become."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    expected: Expected = []
    for _ in range(40):
        count = int(rng.integers(1, LENGTH + 1))
        ids = rng.integers(1, VOCAB, count).tolist()
        learnt = (rng.random(count) < 0.6).tolist()
        pads = int(rng.integers(0, LENGTH + 1 - count))
        cuts = sorted(rng.choice(np.arange(1, count), min(2, count - 1), replace=False).tolist())
        ends = [*cuts, count]
        lengths = np.diff([0, *ends]).tolist()
        rows.append(
            {
                "input_ids": ids + [7] * pads,
                "labels": [i if own else -100 for i, own in zip(ids, learnt, strict=True)]
                + [-100] * pads,
                "attention_mask": [1] * count + [0] * pads,
                "position_ids": [p for n in lengths for p in range(n)] + [0] * pads,
                "seq_lengths": lengths,
                "source": "ignored",
            }
        )
        expected.append(expected_window(ids, learnt, tuple(cuts)))
    return rows, expected


def as_json(folder: Path, rows: Rows) -> Path:
    return write_lines(folder / "rows.jsonl", rows)


def as_parquet(folder: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(rows)
    kinds = {"input_ids": pa.uint16(), "labels": pa.int32(), "attention_mask": pa.int8()}
    for name, kind in kinds.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, table[name].cast(pa.large_list(kind)))
    pq.write_table(table, folder / "rows.parquet", row_group_size=7)
    return folder / "rows.parquet"


def as_saved(folder: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


FORMS: dict[str, Callable[[Path, Rows], Any]] = {
    "json": as_json,
    "parquet": as_parquet,
    "saved": as_saved,
    "dataset": lambda _, rows: datasets.Dataset.from_list(rows),
    "torch": lambda _, rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "dicts": lambda _, rows: [
        {
            name: value if isinstance(value, str) else torch.tensor(value)
            for name, value in row.items()
        }
        for row in rows
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_one_window_in_every_format(form, packed, tmp_path):
    rows, expected = random_rows(3)
    corpus = packed(FORMS[form](tmp_path, rows), reset=True)
    assert windows_of(corpus) == expected
    assert corpus.summary.dropped_tokens == 0
    assert corpus.summary.documents == len(rows)


def test_parts_and_restarts_do_not_change_windows(packed, tmp_path):
    rows, expected = random_rows(4)
    path = as_json(tmp_path, rows)
    corpus = packed(path, reset=True, part_bytes=500)
    assert len(list((corpus.folder / "training").iterdir())) > 5
    assert windows_of(corpus) == expected


def test_a_hold_out_takes_whole_rows(packed, tmp_path):
    rows, expected = random_rows(5)
    corpus = packed(as_json(tmp_path, rows), reset=True, holdout=0.25)
    held = corpus.read_holdout(0, corpus.holdout_windows)
    assert corpus.holdout_windows == 10
    assert corpus.summary.holdout_rule == "documents"
    found = [window.tokens.tolist() for window in (*corpus.read(0, corpus.windows), *held)]
    assert sorted(found) == sorted(tokens for tokens, _, _ in expected)


def test_joined_rows_are_cut_without_gaps(packed, tmp_path):
    rows = [{"input_ids": list(range(1, 1 + n)), "attention_mask": [1] * n} for n in (3, 20, 5, 1)]
    rows[2]["attention_mask"][-2:] = [0, 0]  # padding is left out
    flat = [*range(1, 4), *range(1, 21), *range(1, 4), 1]
    corpus = packed(as_json(tmp_path, rows), join_rows=True)
    found = windows_of(corpus)
    assert [tokens for tokens, _, _ in found] == [flat[:8], flat[8:16], flat[16:24]]
    assert [starts for _, _, starts in found] == [[0, 3], [], [7]]
    assert corpus.summary.dropped_tokens == len(flat) - 24


def test_rows_of_numbered_documents_and_masks_of_trl(packed, tmp_path):
    """Axolotl numbers the packed documents in attention_mask; TRL has masks instead of labels."""
    ids = [5, 6, 7, 8, 9, 10]
    rows = [
        {"input_ids": ids, "attention_mask": [1, 1, 2, 2, 2, 0]},
        {"input_ids": ids, "completion_mask": [0, 0, 1, 1, 1, 1], "labels": None},
        {"input_ids": ids, "assistant_masks": [0, 1, 1, 0, 0, 1]},
    ]
    expected = [
        expected_window(ids[:5], starts=(2,)),
        expected_window(ids, [False, False, True, True, True, True]),
        expected_window(ids, [False, True, True, False, False, True]),
    ]
    assert windows_of(packed(as_json(tmp_path, rows), reset=True)) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longer than a window": ({"input_ids": [1] * 9}, r"9 tokens, more than a window of 8"),
    "outside the vocabulary": ({"input_ids": [1, VOCAB]}, r"token id 300, but the teacher's"),
    "negative id": ({"input_ids": [1, -100]}, r"token id -100"),
    "huge id": ({"input_ids": [2**63, 2**63]}, r"number 9223372036854775808 in `input_ids`"),
    "beyond 64 bits": ({"input_ids": [1, 2**70]}, r"other values than integers"),
    "not tokenized": ({"text": "abc"}, r"no column `input_ids`; its columns are `text`"),
    "text in place of ids": ({"input_ids": "abc"}, r"has str in `input_ids`"),
    "a batch": ({"input_ids": [[1, 2]]}, r"has lists in `input_ids`"),
    "ragged": ({"input_ids": [[1], [1, 2]]}, r"other values than integers|has lists"),
    "floats": ({"input_ids": [1.0, 2.0]}, r"other values than integers"),
    "nulls": ({"input_ids": [1, None]}, r"other values than integers"),
    "fewer labels": ({"input_ids": [1, 2, 3], "labels": [1, 2]}, r"3 ids and 2 values of `labels`"),
    "shifted labels": (
        {"input_ids": [1, 2, 3, 4], "labels": [2, 3, 4, -100]},
        r"label 2 for the id 1 at position 0; the labels are shifted by one",
    ),
    "other labels": (
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 9, 4]},
        r"label 9 for the id 3 at position 2; give the id or -100",
    ),
    "padding on the left": (
        {"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1]},
        r"attention_mask of 0 at position 0, before tokens",
    ),
    "documents without reset": (
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]},
        r"contains 2 documents .* reset attention",
    ),
    "positions that skip": (
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 5]},
        r"position id 5 at position 2; give 0",
    ),
    "positions that begin late": (
        {"input_ids": [1, 2, 3], "position_ids": [3, 4, 5]},
        r"position id 3 at position 0",
    ),
    "lengths of another row": (
        {"input_ids": [1, 2, 3], "seq_lengths": [2, 2]},
        r"seq_lengths that sum to 4; give .* the row's 3",
    ),
    "lengths that overflow": (
        {"input_ids": [1, 2, 3], "seq_lengths": [2**62, 2**62, 2**62, 2**62, 3]},
        r"seq_lengths that are not positive",
    ),
    "documents that differ": (
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0], "seq_lengths": [1, 2]},
        r"document at position 1 according to only one of position_ids and seq_lengths",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_a_window_is_refused(case, packed, tmp_path):
    row, message = REFUSED[case]
    rows = [{"input_ids": [1, 2, 3]}, row]
    with pytest.raises(CorpusError, match=rf"rows\.jsonl, line 2 .*{message}"):
        packed(as_json(tmp_path, rows))


def test_a_row_without_tokens_is_left_out_and_counted(packed, tmp_path):
    rows: Rows = [
        {"input_ids": []},
        {"input_ids": [1, 2]},
        {"input_ids": [3], "attention_mask": [0]},
        {"input_ids": None},
    ]
    columns = pa.table({"input_ids": pa.array([r["input_ids"] for r in rows[:2] + rows[3:]])})
    pq.write_table(columns, tmp_path / "rows.parquet")
    for data, blank in ((as_json(tmp_path, rows), 3), (rows, 3), (tmp_path / "rows.parquet", 2)):
        corpus = packed(data)
        assert windows_of(corpus) == [expected_window([1, 2])]
        assert corpus.summary.blank_documents == blank


def test_the_tokenizer_has_to_be_named_and_to_be_the_teachers(packed, tokenizer, tmp_path):
    from trained_tokenizers import FAMILIES

    path = as_json(tmp_path, [{"input_ids": [1, 2, 3]}])
    packing = packing_for(tokenizer, window_length=LENGTH)
    with pytest.raises(CorpusError, match=r"give their tokenizer \(tokenized_by\)"):
        pack(open_source(path), tokenizer, packing, tmp_path / "a", vocab_size=VOCAB)
    words = FAMILIES["word pieces"]()
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    source = open_source(path, tokenized_by=other)
    with pytest.raises(IdentityMismatchError, match=r"is not the tokenizer of rows\.jsonl"):
        pack(source, tokenizer, packing, tmp_path / "b", vocab_size=VOCAB)
    with pytest.raises(InvalidArgumentError, match="labels determine the targets"):
        packed(path, completion_only=True)
    with pytest.raises(InvalidArgumentError, match="found join_rows with text"):
        open_source(path, join_rows=True)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(CorpusError, match=r"a\.txt is read as text, but tokenized_by is given"):
        packed(tmp_path / "a.txt")
    (tmp_path / "x.ds").write_bytes(b"\0\0")
    with pytest.raises(CorpusError, match=r"x\.ds contains token ids; give their tokenizer"):
        open_source(tmp_path / "x.ds")


# .ds of datatrove


def write_ds(
    path: Path,
    documents: list[list[int]],
    *,
    width: int = 2,
    metadata: bool = True,
    index: bool = True,
    loss: list[bool] | None = None,
) -> Path:
    flat = [i for document in documents for i in document]
    path.write_bytes(struct.pack(f"<{len(flat)}{'H' if width == 2 else 'I'}", *flat))
    if metadata:
        Path(f"{path}.metadata").write_text(f"some/name|{width}\n{len(flat)}\n1 T")
    if index:
        ends = np.cumsum([len(document) for document in documents]).tolist()
        Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if loss is not None:
        Path(f"{path}.loss").write_bytes(struct.pack(f"<{len(loss)}?", *loss))
    return path


def random_documents(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, VOCAB, rng.integers(0, 15)).tolist(), END] for _ in range(30)]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("known", [{"metadata": False}, {"index": False}, {}], ids=str)
def test_datatrove_windows_begin_anew_in_each_file(width, known, packed, tmp_path):
    """As datatrove's DatatroveFileDataset reads them: item i is ids i * n to (i + 1) * n."""
    folder = tmp_path / "ds"
    folder.mkdir()
    expected: Expected = []
    for number in (1, 2):
        documents = random_documents(number)
        flat = [i for document in documents for i in document]
        ends = np.cumsum([len(document) for document in documents]).tolist()
        write_ds(folder / f"0000{number}_shuffled.ds", documents, width=width, **known)
        assert len(flat) % LENGTH  # the rest of a file is dropped
        for at in range(0, len(flat) - LENGTH + 1, LENGTH):
            inside = tuple(e - at for e in ends if at < e < at + LENGTH)
            starts = inside if known.get("index", True) else ()
            expected.append(expected_window(flat[at : at + LENGTH], starts=starts))
    for part_bytes in (1 << 20, 100):
        assert windows_of(packed(folder, part_bytes=part_bytes)) == expected
        assert windows_of(packed(str(folder / "*.ds"), part_bytes=part_bytes)) == expected


def test_datatrove_loss_masks_are_read(packed, tmp_path):
    documents = random_documents(3)
    flat = [i for document in documents for i in document]
    loss = (np.random.default_rng(0).random(len(flat)) < 0.5).tolist()
    path = write_ds(tmp_path / "a.ds", documents, index=False, loss=loss)
    expected = [
        expected_window(flat[at : at + LENGTH], loss[at : at + LENGTH])
        for at in range(0, len(flat) - LENGTH + 1, LENGTH)
    ]
    assert windows_of(packed(path)) == expected


def test_metadata_with_line_ends_of_windows_are_read(packed, tmp_path):
    path = write_ds(tmp_path / "a.ds", [list(range(1, 9))], index=False)
    Path(f"{path}.metadata").write_bytes(b"some/name|2\r\n8\r\n8 T")
    assert windows_of(packed(path)) == [expected_window(list(range(1, 9)))]


def test_another_index_is_another_text(tmp_path, tokenizer):
    path = write_ds(tmp_path / "a.ds", [[1, 2], [3, 4]])
    before = open_source(path, tokenized_by=tokenizer).fingerprint
    Path(f"{path}.index").write_bytes(struct.pack("<2Q", 1, 4))
    assert open_source(path, tokenized_by=tokenizer).fingerprint != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: Path(f"{p}.index").unlink() or Path(f"{p}.metadata").unlink(), "are unknown"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "expected 17 ids of 2 bytes"),
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), "expected 17 ids of 2 bytes"),
        (lambda p: Path(f"{p}.metadata").write_text("name|3"), "are unknown"),
        (lambda p: Path(f"{p}.metadata").write_text("n|" + "9" * 5000), "34 bytes|^$"),
        (lambda p: Path(f"{p}.index").write_bytes(b"\0" * 9), "9 bytes, expected 8 per document"),
        (lambda p: Path(f"{p}.index").write_bytes(b""), "has 0 bytes, expected 8 per document"),
        (lambda p: Path(f"{p}.index").write_bytes(struct.pack("<4Q", 5, 3, 4, 17)), "not ascend"),
        (lambda p: Path(f"{p}.loss").write_bytes(b"\0" * 3), "has 3 bytes, expected one per id"),
    ],
)
def test_damaged_datatrove_files_are_refused(damage, message, packed, tmp_path):
    path = write_ds(tmp_path / "a.ds", [[1] * 4, [2] * 5, [3] * 8])
    damage(path)
    if message.endswith("|^$"):  # an absurd width falls back on the index
        assert packed(path).windows == 2
        return
    with pytest.raises(CorpusError, match=message):
        packed(path)


# .bin of llm.c and modded-nanogpt


def write_shard(
    path: Path,
    ids: list[int],
    magic: int = 20240520,
    claimed: int | None = None,
    version: int | None = None,
    width: int = 0,
) -> Path:
    version = version or {20240801: 7}.get(magic, 1)
    header = [magic, version, len(ids) if claimed is None else claimed, width, *([0] * 252)]
    kind = "I" if magic == 20240801 or width == 4 else "H"
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{kind}", *ids))
    return path


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_token_shards_begin_documents_at_separators(magic, packed, tmp_path):
    """As modded-nanogpt's masks: a document is a separator and what follows it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    expected: Expected = []
    for number in (1, 2):
        ids = [i for document in random_documents(number) for i in [END, *document[:-1]]]
        write_shard(folder / f"fineweb_train_{number:06d}.bin", ids, magic)
        for at in range(0, len(ids) - LENGTH + 1, LENGTH):
            window = ids[at : at + LENGTH]
            starts = tuple(j for j, i in enumerate(window) if i == END and j)
            expected.append(expected_window(window, starts=starts))
    write_shard(folder / "fineweb_val_000000.bin", [5] * 40, magic)  # of another split
    assert windows_of(packed(folder, reset=True)) == expected
    assert packed(folder, split="validation").windows == 5


@pytest.mark.parametrize("width", [2, 4])
def test_shards_of_nemo_automodel_state_their_bytes_per_id(width, packed, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    ids = list(range(1, 2 * LENGTH + 1))
    write_shard(folder / "train.bin", ids, 278895051, width=width)
    (folder / "train.bos.idx").write_bytes(struct.pack("<i", 1024))  # positions of its BOS tokens
    expected = [expected_window(ids[at : at + LENGTH]) for at in (0, LENGTH)]
    assert windows_of(packed(folder)) == expected


def test_a_separator_at_the_beginning_of_a_window_is_no_second_document(packed, tmp_path):
    path = write_shard(tmp_path / "a.bin", [END, 1, 2, 3, 4, 5, 6, 7] * 2)
    assert packed(path, kind="documents").windows == 2
    write_shard(path, [END, 1, 2, 3, END, 4, 5, 6])
    with pytest.raises(CorpusError, match="window 0 contains 2 documents, but each window was"):
        packed(path, kind="documents")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: write_shard(p, [1] * 20, claimed=21), r"claims 21 ids .* 1,066 bytes, but has"),
        (lambda p: write_shard(p, [1] * 20, claimed=2**31 - 1), r"claims 2,147,483,647 ids"),
        (lambda p: write_shard(p, [1] * 20, claimed=-1), r"claims -1 ids"),
        (lambda p: write_shard(p, [1] * 20, magic=7), r"begins with 7, so it is not a token shard"),
        (lambda p: write_shard(p, [1] * 20, version=2), r"\(20240520\) of version 2 .* version 1"),
        (lambda p: write_shard(p, [1] * 20, 20240801, version=2), r"\(20240801\) of version 2"),
        (lambda p: write_shard(p, [1] * 20, 278895051, width=3), r"whose fourth number is 3"),
        (lambda p: p.write_bytes(b"\1\2"), r"begins with b'\\x01\\x02', so it is not"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), r"is incomplete"),
        (lambda p: write_shard(p, [VOCAB] * 8), r"a\.bin, window 0 contains the token id 300"),
        (lambda p: write_shard(p, [1] * 7), r"no file of token ids fills a window"),
    ],
)
def test_damaged_shards_are_refused(damage, message, packed, tmp_path):
    path = write_shard(tmp_path / "a.bin", list(range(1, 30)))
    damage(path)
    with pytest.raises(CorpusError, match=message):
        packed(path)


# .bin and .idx of Megatron-LM

CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}


def write_indexed(
    path: Path,
    sequences: list[list[int]],
    *,
    code: int = 8,
    lengths: list[int] | None = None,
    begins: list[int] | None = None,
    counts: tuple[int, int] | None = None,
    more: bytes = b"",
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
) -> Path:
    """Write PATH.bin and PATH.idx, and return the latter."""
    kind = np.dtype("<" + CODES.get(code, "f4"))
    data = [np.array(sequence, kind).tobytes() for sequence in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(data))
    lengths = [len(sequence) for sequence in sequences] if lengths is None else lengths
    if begins is None:
        begins = np.cumsum([0, *(len(part) for part in data)]).tolist()[:-1]
    ends = list(range(len(sequences) + 1))
    with path.with_suffix(".idx").open("wb") as handle:
        handle.write(magic + struct.pack("<QB", version, code))
        handle.write(struct.pack("<QQ", *(counts or (len(sequences), len(ends)))))
        handle.write(struct.pack(f"<{len(lengths)}i", *lengths))
        handle.write(struct.pack(f"<{len(begins)}q", *begins))
        handle.write(struct.pack(f"<{len(ends)}q", *ends) + more)
    return path.with_suffix(".idx")


def random_sequences(seed: int, largest: int = LENGTH, below: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, below, rng.integers(1, largest + 1)).tolist() for _ in range(50)]


@pytest.mark.parametrize("code", CODES)
def test_each_sequence_of_an_indexed_dataset_is_a_window(code, packed, tmp_path):
    folder = tmp_path / "indexed"
    folder.mkdir()
    sequences = random_sequences(code)
    path = write_indexed(folder / "data_text_document", sequences, code=code)
    expected = [expected_window(sequence) for sequence in sequences]
    for part_bytes in (1 << 20, 40):
        assert windows_of(packed(path, part_bytes=part_bytes)) == expected
    assert windows_of(packed(folder)) == expected


def test_joined_sequences_are_read_in_blocks(packed, tmp_path, monkeypatch):
    """The trainer concatenates documents; long ones are not held in memory whole."""
    monkeypatch.setattr(token_formats, "_BLOCK", 13)
    sequences = random_sequences(1, largest=60)
    flat = [i for sequence in sequences for i in sequence]
    begins = set(np.cumsum([0, *map(len, sequences)]).tolist())
    path = write_indexed(tmp_path / "a", sequences)
    corpus = packed(path, join_rows=True, part_bytes=100)
    for number, (tokens, _, starts) in enumerate(windows_of(corpus)):
        at = number * LENGTH
        assert tokens == flat[at : at + LENGTH]
        assert starts == [j for j in range(LENGTH) if at + j in begins]
    assert corpus.windows == len(flat) // LENGTH
    assert corpus.summary.documents == len(sequences)
    with pytest.raises(CorpusError, match=r"a\.idx, sequence \d+ has \d+ tokens, more than"):
        packed(path)


def test_a_row_longer_than_a_block_is_one_window(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(token_formats, "_BLOCK", 3)
    sequences = random_sequences(2)
    corpus = packed(write_indexed(tmp_path / "a", sequences))
    assert windows_of(corpus) == [expected_window(sequence) for sequence in sequences]


THREE: list[list[int]] = [[1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lengths": [3, 2, 4]}, r"2 claims 4 ids of 2 bytes from byte 10 on, .* has 16 bytes"),
        ({"begins": [0, 6, -(2**62)]}, r"sequence 2 claims 3 ids of 2 bytes from byte -4,611"),
        ({"begins": [0, 6, 2**63 - 1]}, r"sequence 2 claims 3 ids of 2 bytes from byte 9,223"),
        ({"begins": [0, 0, 0]}, r"sequence 1 claims .* the sequence before it ends at byte 6"),
        ({"begins": [0, 6, 12]}, r"sequence 2 claims .* the sequence before it ends at byte 10"),
        ({"lengths": [3, -2, 3]}, r"sequence 1 claims -2 ids"),
        ({"lengths": [2**31 - 1, 2, 3]}, r"sequence 0 claims 2,147,483,647 ids"),
        ({"counts": (2**60, 4)}, r"claims 1,152,921,504,606,846,976 sequences"),
        ({"counts": (2, 4)}, r"claims 2 sequences and 4 documents, 90 bytes, but has 102"),
        ({"code": 7}, r"version 1 and dtype code 7; expected index version 1 and an integer"),
        ({"code": 99}, r"dtype code 99"),
        ({"version": 2}, r"has index version 2"),
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"not an index of Megatron-LM: it begins with b'TNTIDX"),
        ({"more": b"\0\0\0"}, r"is a multimodal dataset"),
        ({"more": b"\0"}, r"is incomplete"),
    ],
    ids=str,
)
def test_damaged_indexed_datasets_are_refused(damage, message, packed, tmp_path):
    with pytest.raises(CorpusError, match=message):
        packed(write_indexed(tmp_path / "a", THREE, **damage))


@pytest.mark.parametrize("sequences", [[[1, 2, 3], [4, 5]], [[1, 2, 3]]], ids=str)
def test_dtype_codes_of_deepspeed_are_not_read_as_those_of_megatron(sequences, packed, tmp_path):
    """DeepSpeed's code 8 is uint64, Megatron-LM's is uint16; both have the same magic."""
    path = write_indexed(tmp_path / "a", sequences, code=5)
    index = bytearray(path.read_bytes())
    assert index[17] == 5
    index[17] = 8
    path.write_bytes(bytes(index))
    with pytest.raises(CorpusError, match=r"write both again"):
        packed(path)


def test_an_index_that_was_cut_to_its_first_sequences_is_read(packed, tmp_path):
    """Megatron-LM reads what its index lists, and compares no sizes."""
    path = write_indexed(tmp_path / "a", THREE)
    whole = (tmp_path / "a.bin").read_bytes()
    write_indexed(tmp_path / "a", THREE[:2])
    (tmp_path / "a.bin").write_bytes(whole)
    with pytest.warns(
        SparseLogitsWarning, match=r"ends at byte 10, but a\.bin has 16 bytes. Only "
    ):
        corpus = packed(path)
    assert windows_of(corpus) == [expected_window(sequence) for sequence in THREE[:2]]


def test_files_that_do_not_belong_together_are_refused(packed, tmp_path):
    path = write_indexed(tmp_path / "a", THREE)
    with pytest.raises(CorpusError, match=r"a\.bin begins with .*it belongs to a\.idx"):
        packed(tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="is incomplete"):
        packed(path)
    write_indexed(tmp_path / "a", THREE)
    (tmp_path / "a.bin").write_bytes(b"\1\0" * 7)
    with pytest.raises(CorpusError, match=r"a\.bin has 14 bytes"):
        packed(path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CorpusError, match=r"a\.bin, is missing next to it"):
        packed(path)


def test_ids_stored_in_too_few_bits_are_found(packed, tmp_path):
    """An id above 127 in int8 comes back negative; in uint8 it would be another id, unnoticed."""
    ids: NDArray[Any] = np.array([100, 200], np.int64)
    path = write_indexed(tmp_path / "a", [ids.astype(np.int8).tolist()], code=2)
    with pytest.raises(CorpusError, match=r"token id -56, .* stored in too few bits"):
        packed(path)


def test_every_format_gives_the_windows_of_json_lines(packed, tmp_path):
    sequences = [row for row in random_sequences(9) if len(row) == LENGTH]
    flat = [i for sequence in sequences for i in sequence]
    corpora = [
        packed(as_json(tmp_path, [{"input_ids": row} for row in sequences])),
        packed(write_ds(tmp_path / "a.ds", [flat])),
        packed(write_shard(tmp_path / "a.bin", flat)),
        packed(write_indexed(tmp_path / "b", sequences)),
    ]
    found = {fingerprint(corpus.read(0, corpus.windows)) for corpus in corpora}
    assert len(sequences) > 3
    assert len(found) == 1
