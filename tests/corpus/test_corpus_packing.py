"""Test packed windows: complete documents in order, and bytes independent of the processes."""

import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import files_of, write_lines
from trained_tokenizers import train_byte_level, word_pieces
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import (
    PackedCorpus,
    Packing,
    Window,
    fingerprint,
    open_source,
    pack,
    packing_for,
)
from sparselogits.corpus.pieces import document_key
from sparselogits.corpus.streams import GROUP_TOKENS
from sparselogits.errors import CorpusError, IdentityMismatchError, InvalidArgumentError

SEPARATOR, BOS, VOCAB, WINDOW = 0, 5, 600, 64


@pytest.fixture
def lines(tmp_path, stories) -> Path:
    return write_lines(tmp_path / "stories.jsonl", ({"text": text} for text in stories))


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], bos: int | None) -> list[int]:
    first = [] if bos is None else [bos]
    return [
        i
        for text in texts
        for i in [*first, *tokenizer.encode(text, add_special_tokens=False), SEPARATOR]
    ]


def flat(windows: list[Window]) -> list[int]:
    return [int(i) for window in windows for i in window.tokens]


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("part_bytes", [3000, 1 << 20])
def test_windows_are_the_documents(tokenizer, lines, stories, tmp_path, bos, part_bytes):
    packing = Packing(WINDOW, SEPARATOR, bos, holdout=0.3)
    source = open_source(lines)
    corpus = pack(
        source, tokenizer, packing, tmp_path / "out", vocab_size=VOCAB, part_bytes=part_bytes
    )
    # whole documents in the order of their keys, until they fill the windows of the share
    wanted = round(0.3 * len(stream(tokenizer, stories, bos)) / WINDOW)
    by_key = sorted(stories, key=lambda text: document_key(text.encode()))
    ends = np.cumsum([len(stream(tokenizer, [text], bos)) for text in by_key])
    chosen = by_key[: int(np.searchsorted(ends, wanted * WINDOW)) + 1]
    aside = [text for text in stories if text in chosen]
    rest = [text for text in stories if text not in chosen]
    assert 0.2 < len(aside) / len(stories) < 0.4
    assert corpus.holdout_windows == wanted
    s = corpus.summary
    assert s.dropped_tokens < WINDOW
    held = corpus.read_holdout(0, corpus.holdout_windows)
    of_held = (s.holdout_dropped_tokens, s.holdout_documents, s.holdout_characters)
    for texts, windows, dropped, documents, characters in [
        (rest, corpus.read(0, corpus.windows), s.dropped_tokens, s.documents, s.characters),
        (aside, held, *of_held),
    ]:
        expected = stream(tokenizer, texts, bos)
        assert flat(windows) == expected[: len(expected) - dropped]
        assert dropped == len(expected) - len(windows) * WINDOW
        assert (documents, characters) == (len(texts), sum(map(len, texts)))
        assert [window.index for window in windows] == list(range(len(windows)))
        starts = np.cumsum([0] + [len(stream(tokenizer, [text], bos)) for text in texts[:-1]])
        found = [
            window.index * WINDOW + int(i) for window in windows for i in window.document_starts
        ]
        assert found == [start for start in starts if start < len(windows) * WINDOW]
        assert all(window.mask is None for window in windows)
        assert all(
            window.tokens.dtype == window.document_starts.dtype == np.int32 for window in windows
        )
    counted = np.bincount(flat(corpus.read(0, corpus.windows)), minlength=VOCAB)
    assert corpus.token_frequencies.dtype == np.int64
    np.testing.assert_array_equal(corpus.token_frequencies, counted)


def test_documents_begin_with_their_first_token_wherever_it_is(tmp_path):
    """A tokenizer that makes nothing of white space, and a document with a lot of it in front."""
    words = PreTrainedTokenizerFast(tokenizer_object=word_pieces())
    texts = ["one two", " \n" * 100_000 + "three", "four"]
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(texts))
    corpus = pack(open_source(path), words, Packing(4, 2, None), tmp_path / "out", vocab_size=400)
    expected = np.cumsum([0] + [len(words.encode(text)) + 1 for text in texts[:-1]])
    windows = corpus.read(0, corpus.windows)
    found = [4 * window.index + int(i) for window in windows for i in window.document_starts]
    assert found == expected.tolist()


def test_any_range_is_read_alike(tokenizer, tmp_path, stories):
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>\n".join(stories * 5))
    packing = packing_for(tokenizer, window_length=1000)
    corpus = pack(open_source(path), tokenizer, packing, tmp_path / "out", vocab_size=VOCAB)
    assert corpus.summary.tokens > 3 * GROUP_TOKENS  # windows that straddle row groups
    everything = corpus.read(0, corpus.windows)
    copy = pickle.loads(pickle.dumps(corpus))
    for start in reversed(range(corpus.windows)):
        [window] = copy.read(start, start + 1)
        assert fingerprint([window]) == fingerprint([everything[start]])
        assert window.index == start
    assert corpus.read(3, 3) == []
    for start, stop in [(0, corpus.windows + 1), (-1, 1), (2, 1)]:
        with pytest.raises(InvalidArgumentError, match=r"give a range within 0:"):
            corpus.read(start, stop)
        with pytest.raises(InvalidArgumentError, match=r"give a range within 0:"):
            corpus.ranges(start, stop)
    with pytest.raises(InvalidArgumentError, match=r"give a range within 0:0"):
        corpus.read_holdout(0, 1)


def test_processes_do_not_change_a_byte(tokenizer, lines, tmp_path):
    packing = Packing(WINDOW, SEPARATOR, None, holdout=0.2)
    seen: dict[int, list[tuple[int, int | None]]] = {1: [], 2: []}
    for processes, calls in seen.items():
        pack(
            open_source(lines),
            tokenizer,
            packing,
            tmp_path / str(processes),
            vocab_size=VOCAB,
            processes=processes,
            part_bytes=8000,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        size = lines.stat().st_size
        assert calls[0] == (0, size)
        assert calls[-1] == (size, size)
        assert calls == sorted(calls)
    first = files_of(tmp_path / "1")
    assert first == files_of(tmp_path / "2")
    assert sum(name.startswith("training") for name in first) > 3


def test_a_complete_corpus_is_opened_at_once(tokenizer, lines, tmp_path):
    packing, out = Packing(WINDOW, SEPARATOR, None), tmp_path / "out"
    pack(open_source(lines), tokenizer, packing, out, vocab_size=VOCAB)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    moved = lines.parent / "deeper" / lines.name
    moved.parent.mkdir()
    lines.rename(moved)  # another path, the same text
    corpus = pack(open_source(moved), tokenizer, packing, out, vocab_size=VOCAB, part_bytes=1000)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert corpus.packing == PackedCorpus.open(out).packing == packing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("text", r"source\.fingerprint"),
        ("field", r"source\.text_field"),
        ("tokenizer", r"tokenizer: "),
        ("window", r"packing\.window_length: 64 there, 32 now"),
        ("holdout", r"packing\.holdout"),
        ("attention", r"packing\.reset_attention"),
        ("vocabulary", r"vocab_size: 600 there, 601 now"),
    ],
)
def test_another_corpus_in_its_place_is_refused(tokenizer, lines, tmp_path, change, named):
    out, vocab_size, field = tmp_path / "out", VOCAB, "text"
    packing = Packing(WINDOW, SEPARATOR, None)
    pack(open_source(lines), tokenizer, packing, out, vocab_size=VOCAB)
    before = files_of(out)
    if change == "text":
        lines.write_text(lines.read_text().replace("the", "The"))
    elif change == "field":
        field = "body"
    elif change == "tokenizer":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_byte_level(500))
    elif change == "vocabulary":
        vocab_size += 1
    else:
        options = {"window": {"window_length": 32}, "holdout": {"holdout": 0.5}}
        packing = Packing(**{**packing.to_json(), **options.get(change, {"reset_attention": True})})
    with pytest.raises(IdentityMismatchError, match=named):
        pack(open_source(lines, text_field=field), tokenizer, packing, out, vocab_size=vocab_size)
    assert files_of(out) == before


def test_masks_of_completions(tokenizer, tmp_path):
    rows = [
        {"prompt": f"What is {n} and {n}?", "completion": f" It is {2 * n}."} for n in range(60)
    ] + [{"prompt": "Nothing to learn.", "completion": ""}, {"prompt": "", "completion": "Bare."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(path, completion_only=True)
    corpus = pack(
        source, tokenizer, Packing(32, SEPARATOR, BOS), tmp_path / "out", vocab_size=VOCAB
    )
    tokens, learnt = [], []
    for row in rows:
        if row["completion"]:
            prompt, completion = (
                tokenizer.encode(row[key], add_special_tokens=False)
                for key in ("prompt", "completion")
            )
            tokens += [BOS, *prompt, *completion, SEPARATOR]
            learnt += [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)
    windows = corpus.read(0, corpus.windows)
    assert flat(windows) == tokens[: 32 * len(windows)]
    assert corpus.summary.blank_documents == 1
    for window in windows:
        assert window.mask is not None
        # position j carries a target exactly if token j + 1 is in the window and to be learnt
        own = learnt[32 * window.index : 32 * (window.index + 1)]
        assert window.mask.tolist() == [*own[1:], False]
    assert 0.2 < np.mean([window.mask for window in windows]) < 0.8


def test_the_fingerprint_sees_everything_but_the_index():
    tokens, starts = np.arange(4, dtype=np.int32), np.array([0], np.int32)
    mask = np.array([True, False, True, False])
    window = Window(3, tokens, starts, mask)
    same = Window(4, tokens.copy(), starts.copy(), mask.copy())
    others = [
        Window(3, tokens + 1, starts, mask),
        Window(3, tokens, np.array([1], np.int32), mask),
        Window(3, tokens, np.array([], np.int32), mask),
        Window(3, tokens, starts, ~mask),
        Window(3, tokens, starts, None),
    ]
    assert fingerprint([window]) == fingerprint([same])
    assert len({fingerprint([other]) for other in [window, *others]}) == 6
    assert fingerprint([window, same]) != fingerprint([window])
    # as documented, written out by hand: caches hold these values
    four, one = struct.pack("<q4i", 4, 0, 1, 2, 3), struct.pack("<qi", 1, 0)
    expected = hashlib.sha256(four + one + b"\0" + four + one + b"\1\xa0").hexdigest()
    assert fingerprint([Window(0, tokens, starts, None), window]) == expected


documents = st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=30)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents, st.integers(10, 400), st.sampled_from([0.0, 0.5]))
def test_whatever_the_documents_no_token_is_lost(
    tokenizer, tmp_path_factory, texts, part_bytes, holdout
):
    folder = tmp_path_factory.mktemp("packed")
    path = write_lines(folder / "lines.jsonl", ({"text": text} for text in texts))
    packing = Packing(2, SEPARATOR, None, holdout=holdout)
    source = open_source(path)
    try:
        corpus = pack(
            source, tokenizer, packing, folder / "out", vocab_size=VOCAB, part_bytes=part_bytes
        )
    except CorpusError as error:
        assert "too short" in str(error) or "contains no text" in str(error)  # noqa: PT017
        assert not (folder / "out").exists()
        return
    kept = [text for text in texts if text.strip()]
    expected = stream(tokenizer, kept, None)
    found = flat(corpus.read(0, corpus.windows))
    if not holdout:
        assert found == expected[: len(expected) // 2 * 2]
    summary = corpus.summary
    assert summary.blank_documents == len(texts) - len(kept)
    assert summary.documents + summary.holdout_documents == len(kept)
    assert summary.tokens + summary.holdout_tokens == len(expected)
    aside = flat(corpus.read_holdout(0, corpus.holdout_windows))
    left = summary.dropped_tokens + summary.holdout_dropped_tokens
    assert len(found) + len(aside) + left == len(expected)
    # which tokens are where: test_corpus_holdout
