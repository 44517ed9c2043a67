"""Test that the tokens of packed windows get the labels of their documents, for every packing.

Each document repeats one letter, which is also its label, so every token shows its document.
"""

import gzip
import json
from pathlib import Path
from string import ascii_letters
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import write_lines

from sparselogits.corpus import PackedCorpus, open_source, pack, packing_for
from sparselogits.corpus.labels import DocumentLabels
from sparselogits.errors import CorpusError, IdentityMismatchError, InvalidArgumentError

VOCAB, END = 700, 0
Records = list[dict[str, Any]]


def records(lengths: list[int]) -> Records:
    """Return a record per length; one of length 0 has no text and a label that must not occur."""
    return [
        {"text": letter * n if n else " \n", "meta": {"source": letter if n else "blank", "n": i}}
        for i, n in enumerate(lengths)
        for letter in [ascii_letters[i % len(ascii_letters)]]
    ]


def packed(data: Path, tokenizer: Any, out: Path, **options: Any) -> PackedCorpus:
    part_bytes = options.pop("part_bytes", 1 << 20)
    reading = {k: options.pop(k) for k in ("completion_only", "join_rows") if k in options}
    if "join_rows" in reading:
        reading["tokenized_by"] = tokenizer
    source = open_source(str(data), **reading)
    packing = packing_for(tokenizer, **options)
    return pack(source, tokenizer, packing, out, vocab_size=VOCAB, part_bytes=part_bytes)


def require_labels(corpus: PackedCorpus, labels: DocumentLabels, tokenizer: Any) -> None:
    """Validate every label by the token, and return to parts that were left."""
    for index in (*range(corpus.windows), 0, corpus.windows // 2):
        (window,) = corpus.read(index, index + 1)
        runs = labels.of_window(index)
        assert all(tokens > 0 for _, tokens in runs)
        spread = [label for label, tokens in runs for _ in range(tokens)]
        assert len(spread) == len(window.tokens)
        inside = window.tokens[: window.text_length]
        for at, (token, label) in enumerate(zip(inside.tolist(), spread, strict=False)):
            if token != END:
                assert set(tokenizer.decode([token])) == {label}
            elif at:  # a separator belongs to the document that it ends
                assert spread[at - 1] == label
        assert set(spread[len(inside) :]) <= {spread[len(inside) - 1]}  # padding


@given(
    lengths=st.lists(st.integers(0, 90), min_size=12, max_size=60),
    window=st.integers(4, 40),
    holdout=st.sampled_from([0.0, 0.1, 0.4]),
    kind=st.sampled_from(["joined", "documents"]),
    part_bytes=st.sampled_from([900, 1 << 20]),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_token_has_the_label_of_its_document(
    tokenizer, lengths, window, holdout, kind, part_bytes
):
    rows = records([200, *lengths, 200])
    with TemporaryDirectory() as folder:
        data = write_lines(Path(folder) / "rows.jsonl", rows)
        corpus = packed(
            *(data, tokenizer, Path(folder) / "packed"),
            **{"window_length": window, "holdout": holdout, "kind": kind},
            part_bytes=part_bytes,
        )
        labels = DocumentLabels(corpus, data, "meta.source", tokenizer=tokenizer)
        require_labels(corpus, labels, tokenizer)


@pytest.mark.parametrize("form", ["gz", "parquet", "saved", "long"])
def test_every_form_of_records_has_labels(form, tokenizer, tmp_path):
    rows = records([n % 37 * 6 for n in range(80)])
    data = tmp_path / f"rows.{form}"
    if form == "gz":
        data = tmp_path / "rows.jsonl.gz"
        data.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), data, row_group_size=7)
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(data))
    else:  # the first document is tokenised in several pieces
        rows[1]["text"] = "b" * 70_000
        data = write_lines(tmp_path / "rows.jsonl", rows)
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=64, part_bytes=900)
    require_labels(
        corpus, DocumentLabels(corpus, data, "meta.source", tokenizer=tokenizer), tokenizer
    )


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_rows_of_token_ids_have_labels(joined, holdout, tokenizer, tmp_path):
    """Also where a row has several documents of its trainer, which are one record here."""
    rows = []
    for i, record in enumerate(records([n % 13 + 2 for n in range(60)])):
        ids = tokenizer(record["text"])["input_ids"]
        lengths = {"seq_lengths": [1, len(ids) - 1]} if i % 2 and len(ids) > 1 else {}
        rows.append({"input_ids": ids, "meta": record["meta"], **lengths})
    data = write_lines(tmp_path / "rows.jsonl", rows)
    corpus = packed(
        *(data, tokenizer, tmp_path / "packed"),
        **{"window_length": 16, "holdout": holdout, "reset_attention": True},
        join_rows=joined,
        part_bytes=600,
    )
    labels = DocumentLabels(corpus, data, "meta.source", tokenizer=tokenizer)
    require_labels(corpus, labels, tokenizer)


def test_conversations_have_labels(tokenizer, tmp_path):
    """Records without an answer are left out, like records without text."""
    chat = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    chat.chat_template = CHATML
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q" * 9},
                *([] if i % 5 == 4 else [{"role": "assistant", "content": letter * (i + 3)}]),
            ],
            "source": letter,
        }
        for i, letter in enumerate(ascii_letters)
    ]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    corpus = packed(data, chat, tmp_path / "packed", window_length=16, completion_only=True)
    labels = DocumentLabels(corpus, data, "source", tokenizer=chat)
    for window in corpus.read(0, corpus.windows):
        spread = [label for label, n in labels.of_window(window.index) for _ in range(n)]
        for token, label, learnt in zip(
            window.tokens.tolist(), spread, window.learnt.tolist(), strict=True
        ):
            text = chat.decode([token])
            if learnt and token != END and len(set(text)) == 1 and text[0] in ascii_letters:
                assert set(text) <= {label, *"<|imend|>\n"}
    with pytest.raises(IdentityMismatchError, match="chat template"):
        DocumentLabels(corpus, data, "source", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("web", "web"),
        ("", ""),
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        (None, None),
        (float("nan"), None),
        ("\x1b[2J\n", "\x1b[2J\n"),
    ],
)
def test_a_label_is_text_or_missing(value, label, tokenizer, tmp_path):
    rows = [{"text": "words " * 30, "source": value}, {"text": "words " * 30}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=8)
    labels = DocumentLabels(corpus, data, "source", tokenizer=tokenizer)
    assert labels.of_window(0) == [(label, 8)]
    assert labels.of_window(corpus.windows - 1)[-1].label is None
    # a column of another name, and a path into a value that is not an object
    for field in ("other", "source.name", "text.length"):
        missing = DocumentLabels(corpus, data, field, tokenizer=tokenizer)
        assert missing.of_window(0) == [(None, 8)]


def test_a_name_with_a_dot_is_a_field_before_it_is_a_path(tokenizer, tmp_path):
    rows = [{"text": "words " * 30, "a.b": "x", "a": {"b": "y"}}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    for number, each in enumerate((data, table)):
        corpus = packed(each, tokenizer, tmp_path / f"packed-{number}", window_length=8)
        labels = DocumentLabels(corpus, each, "a.b", tokenizer=tokenizer)
        assert labels.of_window(0) == [("x", 8)]


@pytest.mark.parametrize(
    ("value", "found"),
    [(["web"], "list"), ({"a": 1}, "dict"), ("t" * 300, "text of 300 characters")],
)
def test_a_value_that_is_no_label_is_an_error(value, found, tokenizer, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": "words " * 30, "source": value}])
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=8)
    labels = DocumentLabels(corpus, data, "source", tokenizer=tokenizer)
    with pytest.raises(CorpusError, match=rf"line 1: the field `source` contains {found}; expecte"):
        labels.of_window(0)


def test_other_text_is_an_error(tokenizer, tmp_path):
    rows = [{"text": "words " * 30, "source": "a"}] * 3
    data = write_lines(tmp_path / "rows.jsonl", rows)
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=8)
    (tmp_path / "other").mkdir()
    other = write_lines(tmp_path / "other" / data.name, rows[:2])
    with pytest.raises(IdentityMismatchError, match="is not the text of"):
        DocumentLabels(corpus, other, "source", tokenizer=tokenizer)
    plain = tmp_path / "text.txt"
    plain.write_text("words " * 100)
    corpus = packed(plain, tokenizer, tmp_path / "plain", window_length=8)
    with pytest.raises(InvalidArgumentError, match="contains no records"):
        DocumentLabels(corpus, plain, "source", tokenizer=tokenizer)


def test_a_text_that_does_not_state_how_it_was_read(tokenizer, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": "words " * 30, "source": "a"}] * 3)
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=8)
    path = corpus.folder / "corpus.json"
    made_from = json.loads(path.read_text())
    # as in a retokenized cache
    made_from["source"] = {key: made_from["source"][key] for key in ("name", "fingerprint")}
    path.write_text(json.dumps(made_from))
    with pytest.raises(CorpusError, match=r"does not state how its text was read.* retokenized"):
        DocumentLabels(corpus, data, "source", tokenizer=tokenizer)


def test_a_change_that_the_fingerprint_misses_is_an_error(tokenizer, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": "words " * 30, "source": "a"}] * 3)
    corpus = packed(data, tokenizer, tmp_path / "packed", window_length=8)
    labels = DocumentLabels(corpus, data, "source", tokenizer=tokenizer)
    write_lines(data, [{"text": "words " * 30, "source": "a"}] * 2)
    with pytest.raises(CorpusError, match=r"has 3 documents and .* but its text has 2 documents"):
        labels.of_window(0)


def test_a_corpus_that_an_old_version_divided_is_an_error(tokenizer, tmp_path):
    """Held-out documents were not in its stream, so its documents are not those of the text."""
    golden = Path(__file__).parents[1] / "golden/corpus"
    data = tmp_path / "lines.jsonl"
    data.write_bytes((golden / "format-1.jsonl").read_bytes())
    corpus = PackedCorpus.open(golden / "format-1")
    labels = DocumentLabels(corpus, data, "source", tokenizer=tokenizer)
    with pytest.raises(CorpusError, match="or an old version of sparselogits packed it"):
        labels.of_window(0)
