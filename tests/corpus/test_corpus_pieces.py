"""Test that pieces add up to the document, and tokenise like the document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained_tokenizers import SAMPLE

from sparselogits.corpus import open_source, pieces
from sparselogits.corpus.formats.text import document_separators
from sparselogits.corpus.pieces import Piece, cut_pieces, document_key
from sparselogits.corpus.tokenizing import Encoder

LINES = SAMPLE.splitlines()
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
blanks = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u3000", ".\n", "-- "])
prose = st.lists(st.one_of(words, blanks, st.sampled_from(LINES)), max_size=120).map("".join)
anything = st.lists(st.one_of(prose, st.integers(1, 300).map(lambda n: "=" * n))).map("".join)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """So small that a short text is cut in many places."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 256)
    monkeypatch.setattr(pieces, "MARGIN_BYTES", 96)


def cut(text: str) -> list[Piece]:
    raw = text.encode()

    def read(start: int, stop: int) -> bytes:
        return raw[start:stop]

    return list(cut_pieces(read, 0, len(raw), document=(0, len(raw)), key=1, name="text"))


def own(piece: Piece) -> str:
    return piece.text[piece.start : piece.stop]


@quick
@given(anything)
def test_pieces_are_the_document(text):
    found = cut(text)
    assert "".join(map(own, found)) == text
    assert sum(piece.size for piece in found) == len(text.encode())
    assert all(piece.size <= 256 and len(piece.text) <= 256 + 2 * 96 for piece in found)
    assert [piece.opens for piece in found] == [i == 0 for i in range(len(found))]
    assert [piece.closes for piece in found] == [i == len(found) - 1 for i in range(len(found))]


def ids_of(encoder: Encoder, pieces: list[Piece]) -> list[Any]:
    return [ids for ids, _ in encoder.encode(pieces)]


@pytest.mark.parametrize("blank", ["\n", " "], ids=["lines", "one line"])
def test_pieces_tokenise_as_the_document(any_tokenizer, blank):
    encoder = Encoder(any_tokenizer)
    for start in range(0, 900, 90):
        text = blank.join(LINES[start : start + 90])
        [whole] = ids_of(encoder, [Piece(text, 0, len(text), 1, True, True, True, 0)])
        found = cut(text)
        assert len(found) > 3
        np.testing.assert_array_equal(np.concatenate(ids_of(encoder, found)), whole)


@quick
@given(prose)
def test_byte_level_pieces_tokenise_as_the_document(tokenizer, text):
    encoder = Encoder(tokenizer)
    [whole] = ids_of(encoder, [Piece(text, 0, len(text), 1, True, True, True, 0)])
    found = cut(text)
    together = np.concatenate([np.empty(0, np.int64), *ids_of(encoder, found)])
    if any(piece.whole for piece in found) and len(found) > 1:
        # a hard cut: no promise but that no text is lost
        assert tokenizer.decode(together) == tokenizer.decode(whole)
    else:
        np.testing.assert_array_equal(together, whole)


@quick
@given(anything)
def test_no_text_is_lost_at_hard_cuts(tokenizer, text):
    ids = np.concatenate([np.empty(0, np.int64), *ids_of(Encoder(tokenizer), cut(text))])
    raw = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert raw == text


def test_the_encoder_agrees_with_the_tokenizer(any_tokenizer):
    text = "\n".join(LINES[:40])
    [ids] = ids_of(Encoder(any_tokenizer), [Piece(text, 0, len(text), 1, True, True, True, 0)])
    assert ids.tolist() == any_tokenizer.encode(text, add_special_tokens=False)


separated = st.lists(
    st.sampled_from(["<|endoftext|>\n", "<|endoftext|>\r\n", "a <|endoftext|>\n", "\n", "x\n"])
    | st.sampled_from([line + "\n" for line in LINES[:50]])
)


@quick
@given(separated, st.integers(20, 2000), st.booleans(), st.booleans())
def test_documents_do_not_depend_on_spans(tmp_path, lines, span, ends, mark):
    text = "".join(lines)
    text = text if ends else text.removesuffix("\n").removesuffix("\r")
    file = tmp_path / "text.txt"
    file.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode() or b"\n")
    expected: list[str] = [""]
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == "<|endoftext|>":
            expected.append("")
        else:
            expected[-1] += line
    assert list(_documents(file, span)) == [document for document in expected if document.strip()]


def _documents(file: Path, span_bytes: int) -> Iterator[str]:
    source, parts = open_source(file), []
    for portion in source.portions(span_bytes):
        for piece in source.pieces(portion):
            parts = [] if piece.opens else parts
            parts.append(own(piece))
            if piece.closes and "".join(parts).strip():
                yield "".join(parts)
                # also in the spans where it does not begin, a document knows its own hash
                assert piece.key == document_key("".join(parts).encode())


def test_separators_are_found_at_the_edges_of_blocks(monkeypatch):
    from sparselogits.corpus.formats import text

    raw = b"ab\n<|endoftext|>\ncd <|endoftext|>\n<|endoftext|> \n<|endoftext|>\r\n<|endoftext|>"
    expected = [(3, 17), (49, 64), (64, 77)]
    for block in range(1, len(raw) + 2):
        monkeypatch.setattr(text, "_SCAN_BYTES", block)
        found = list(document_separators(lambda a, b: raw[max(a, 0) : b], 0, len(raw) + 99))
        assert found == expected
