"""Test that the held-out fraction is met, by whole documents or by windows, for any text."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.conftest import write_lines
from trained_tokenizers import SAMPLE

from sparselogits.corpus import PackedCorpus, Packing, Window, fingerprint, open_source, pack
from sparselogits.corpus.holdout import writing_table
from sparselogits.corpus.packed import Paths, write_index
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.streams import part_name, writing_part
from sparselogits.errors import CorpusError

GOLDEN = Path(__file__).parents[1] / "golden" / "corpus"


@dataclass(frozen=True)
class Document:
    """Tokens of a document (each one is the document's number), and the key of its content."""

    number: int
    tokens: int
    key: int


def write_corpus(
    folder: Path, documents: list[Document], part_tokens: int, packing: Packing
) -> PackedCorpus:
    """Pack documents that are given as numbers of tokens; a document may reach over parts."""
    paths, vocab = Paths(folder), len(documents) + 1
    flat = [(d, i) for d in documents for i in range(d.tokens)]
    parts = [flat[n : n + part_tokens] for n in range(0, len(flat), part_tokens)]
    for number, part in enumerate(parts):
        with (
            writing_part(paths.training / part_name(number), vocab, masked=False) as writer,
            writing_table(paths.holdout / part_name(number)) as table,
        ):
            for document, i in part:
                piece = Piece("x", 0, 1, document.key, i == 0, i == document.tokens - 1, True, 1)
                if i == 0:
                    writer.begin_document()
                writer.append(np.array([document.number]), learnt=True)
                writer.counts.characters += 1
                table.add(piece, 1)
    made_from = {
        "format": 2,
        "source": {"name": "x", "fingerprint": ""},
        "tokenizer": "",
        "vocab_size": vocab,
        "packing": packing.to_json(),
    }
    paths.made_from.write_text(json.dumps(made_from))
    write_index(paths, len(parts), packing, vocab)
    return PackedCorpus.open(folder)


def numbers(windows: list[Window]) -> list[int]:
    return [int(i) for window in windows for i in window.tokens]


lengths = st.one_of(
    st.lists(st.integers(1, 9), min_size=20, max_size=120),  # many short ones
    st.lists(st.integers(1, 150), min_size=1, max_size=12),  # few, of unequal lengths
    st.lists(st.integers(30, 600), min_size=1, max_size=2),  # one file or two
)


@settings(max_examples=60)
@given(lengths, st.floats(0.01, 0.9), st.integers(2, 20), st.integers(40, 400), st.data())
def test_the_share_is_met_within_a_window(
    tmp_path_factory, lengths, share, window, part_tokens, data
):
    keys = data.draw(
        st.lists(st.integers(0, 2**64 - 1), min_size=len(lengths), max_size=len(lengths))
    )
    if len(keys) > 3:
        keys[-1] = keys[0]  # copies of a document
    documents = [Document(n, *of) for n, of in enumerate(zip(lengths, keys, strict=True), start=1)]
    total = sum(lengths)
    # a few windows on either side
    assume(total >= 4 * window and (1 - share) * total >= 2 * window)
    packing = Packing(window, 0, None, holdout=share)
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), documents, part_tokens, packing)
    summary = corpus.summary

    trained = numbers(corpus.read(0, corpus.windows))
    aside = numbers(corpus.read_holdout(0, corpus.holdout_windows))
    assert abs(len(aside) - share * total) <= window
    assert len(trained) == corpus.windows * window > 0
    # every token is trained on, held out, or counted as dropped
    assert summary.tokens + summary.holdout_tokens == total
    assert summary.tokens - summary.dropped_tokens == len(trained)
    assert summary.holdout_tokens - summary.holdout_dropped_tokens == len(aside)
    assert summary.documents + summary.holdout_documents == len(documents)
    assert summary.characters + summary.holdout_characters == total
    # little is dropped: a partial window a side, and the gap or the rest of the last document
    dropped = summary.dropped_tokens + summary.holdout_dropped_tokens
    assert dropped < 2 * window + max(window, 0.02 * total)

    of_key = {document.number: document.key for document in documents}
    on_both = set(trained) & set(aside)
    if summary.holdout_rule == "documents":
        assert not on_both
        assert not {of_key[n] for n in trained} & {of_key[n] for n in aside}  # nor a copy
        # independently: in the order of keys until the windows are full
        wanted, chosen = corpus.holdout_windows * window, set()
        for document in sorted(documents, key=lambda document: document.key):
            if sum(d.tokens for d in documents if d.key in chosen) < wanted:
                chosen.add(document.key)
        expected = [d.number for d in documents if d.key in chosen for _ in range(d.tokens)]
        assert aside == expected[:wanted]
        rest = [d.number for d in documents if d.key not in chosen for _ in range(d.tokens)]
        assert trained == rest[: len(rest) // window * window]
    else:
        assert summary.holdout_rule == "windows"
        everything = [d.number for d in documents for _ in range(d.tokens)]
        whole = total // window * window
        assert aside == everything[whole - len(aside) : whole]
        assert trained == everything[: len(trained)]
        gap = whole - len(aside) - len(trained)
        assert gap in (0, window)
        assert gap or whole // window < 10 or corpus.windows == 1
        assert summary.split_documents == len(on_both) <= 1
    counted = np.bincount(trained, minlength=len(documents) + 1)
    np.testing.assert_array_equal(corpus.token_frequencies, counted)
    # any range is read alike
    for start in range(corpus.holdout_windows):
        [one] = corpus.read_holdout(start, start + 1)
        assert one.tokens.tolist() == aside[start * window : (start + 1) * window]


def text_file(folder: Path) -> Path:
    path = folder / "one.txt"
    path.write_text(SAMPLE[:40_000])
    return path


def test_one_text_file_is_held_out_by_windows(tokenizer, tmp_path):
    """A file is one document; its last windows are held out, and the summary says so."""
    path = text_file(tmp_path)
    plain = pack(
        open_source(path), tokenizer, Packing(64, 0, None), tmp_path / "all", vocab_size=600
    )
    everything = plain.read(0, plain.windows)
    for share in (0.01, 0.05, 0.2, 0.5, 0.9):
        out = tmp_path / str(share)
        packing = Packing(64, 0, None, holdout=share)
        # two parts and more, so that the hold-out reaches over parts
        corpus = pack(open_source(path), tokenizer, packing, out, vocab_size=600, part_bytes=9000)
        held = corpus.holdout_windows
        assert abs(held * 64 - share * plain.summary.tokens) <= 64
        assert corpus.windows == plain.windows - held - 1  # a gap of one window
        assert fingerprint(corpus.read(0, corpus.windows)) == fingerprint(
            everything[: corpus.windows]
        )
        assert fingerprint(corpus.read_holdout(0, held)) == fingerprint(everything[-held:])
        assert (corpus.summary.holdout_rule, corpus.summary.split_documents) == ("windows", 1)


def test_too_little_text_to_hold_some_out(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SAMPLE[:300])
    tokens = len(tokenizer.encode(SAMPLE[:300])) + 1
    source, out = open_source(path), tmp_path / "out"
    with pytest.raises(CorpusError, match=rf"need {2 * tokens}. Use more text, a window of at mo"):
        pack(source, tokenizer, Packing(tokens, 0, None, holdout=0.5), out, vocab_size=600)
    advised = Packing(tokens // 2, 0, None, holdout=0.5)
    corpus = pack(source, tokenizer, advised, out, vocab_size=600)
    assert (corpus.windows, corpus.holdout_windows) == (1, 1)


def test_masks_stay_with_their_tokens(tokenizer, tmp_path):
    rows = [{"prompt": f"Question {n} " * 3, "completion": f"Answer {n}. " * 2} for n in range(200)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    source = open_source(path, completion_only=True)
    packing = Packing(32, 0, None, holdout=0.2)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=600, part_bytes=4000)
    assert corpus.summary.holdout_rule == "documents"
    assert corpus.summary.holdout_documents > 30
    for windows in (corpus.read_holdout(0, corpus.holdout_windows), corpus.read(0, corpus.windows)):
        learnt = rest = ""
        for window in windows:
            assert window.mask is not None
            learnt += tokenizer.decode(window.tokens[1:][window.mask[:-1]])
            rest += tokenizer.decode(window.tokens[1:][~window.mask[:-1]])
        assert "Quest" not in learnt
        assert learnt.count("Answer") > len(windows)
        assert rest.count("Question") > len(windows) > 0 == rest.count("Answer")


def test_corpora_of_the_first_format_are_read(tmp_path):
    """Documents by hash alone, each side in a stream of its own."""
    corpus = PackedCorpus.open(GOLDEN / "format-1")
    assert (corpus.windows, corpus.holdout_windows) == (72, 22)
    assert fingerprint(corpus.read(0, 72)).startswith("5d173cd9b95c615a")
    assert fingerprint(corpus.read_holdout(0, 22)).startswith("ebe9b2cfa32e1215")
    assert corpus.summary.holdout_documents == 14


def test_a_finished_corpus_of_the_first_format_is_gone_on_with(tokenizer, tmp_path):
    shutil.copytree(GOLDEN / "format-1", tmp_path / "out")
    source, packing = open_source(GOLDEN / "format-1.jsonl"), Packing(64, 0, None, holdout=0.2)
    new = pack(source, tokenizer, packing, tmp_path / "new", vocab_size=600, part_bytes=6000)
    made_from = json.loads((tmp_path / "new/corpus.json").read_text())
    assert new.format == made_from["format"] == 2
    # the tokenizer is trained on the language reference of whichever Python this is
    (tmp_path / "out/corpus.json").write_text(json.dumps({**made_from, "format": 1}))
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=600)
    assert (corpus.format, corpus.windows, corpus.holdout_windows) == (1, 72, 22)


def swap_table(out: Path) -> None:
    path = out / "holdout/part-00000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


def omit_tokens(out: Path) -> None:
    """Replace the numbers of tokens in a document table by null."""
    path = out / "holdout/part-00000000.parquet"
    table = pq.read_table(path)
    nulls = pa.nulls(len(table), pa.int64())
    table = table.set_column(1, "tokens", nulls)
    pq.write_table(table, path, store_schema=False, use_dictionary=False)


def claim_bytes(out: Path) -> None:
    """Insert before a table's first page a header that claims 2**28 bytes for one."""
    path = out / "holdout/part-00000000.parquet"
    header = b"\x15\x00\x15\x80\x80\x80\x80\x02\x15\x02\x2c\x15\x02\x15\x00\x00\x00"
    content = path.read_bytes()
    path.write_bytes(content[:4] + header + content[4:])


def forge(out: Path, **changes: object) -> None:
    index = json.loads((out / "index.json").read_text())
    index["holdout"].update(changes)
    (out / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "holdout/part-00000000.parquet").unlink(),
        lambda out: (out / "holdout/part-00000000.parquet").write_bytes(b"PAR1"),
        lambda out: pq.write_table(pa.table({"key": [1]}), out / "holdout/part-00000000.parquet"),
        swap_table,
        omit_tokens,
        lambda out: forge(out, rule="guess"),
        lambda out: forge(out, held=[1]),
        lambda out: forge(out, held=None),
        lambda out: forge(out, up_to="0"),
        lambda out: forge(out, up_to="f" * 40),
        lambda out: (out / "index.json").write_text("[]"),
        lambda out: (out / "index.json").write_text('{"summary": 3}'),
        lambda out: (out / "corpus.json").write_text('{"format": 2, "packing": {}}'),
        lambda out: (out / "corpus.json").write_text("[1]"),
    ],
)
def test_damage_is_named(tokenizer, tmp_path, stories, damage):
    path = write_lines(tmp_path / "a.jsonl", ({"text": text} for text in stories))
    out = tmp_path / "out"
    packing = Packing(64, 0, None, holdout=0.2)
    made = pack(open_source(path), tokenizer, packing, out, vocab_size=600, part_bytes=20_000)
    assert made.summary.holdout_rule == "documents"
    damage(out)
    with pytest.raises(CorpusError, match=r"damaged|cannot be read"):  # noqa: PT012
        corpus = PackedCorpus.open(out)
        corpus.read(0, corpus.windows)


def test_sizes_that_a_document_table_claims_are_limited(tokenizer, tmp_path, stories):
    path = write_lines(tmp_path / "a.jsonl", ({"text": text} for text in stories))
    made = pack(
        open_source(path),
        tokenizer,
        Packing(64, 0, None, holdout=0.2),
        tmp_path / "out",
        vocab_size=600,
    )
    claim_bytes(tmp_path / "out")
    with pytest.raises(CorpusError, match="a page claims 268435456 bytes"):
        made.read(0, made.windows)
