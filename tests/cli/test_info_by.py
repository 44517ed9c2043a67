"""Test `sparselogits info --by`: the targets of a mixed corpus by a field of its records."""

import json

import pytest

from sparselogits.cli.info import MOST_LABELS
from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.samplers import TopK
from sparselogits.teacher.loading import keep_tokenizer
from tests.conftest import build_cache, documents, write_lines

HOSTILE = "red\x1b[31m\nfake row\u202e"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, teacher_folder, tokenizer):
    """A cache of Top-12 targets and its text: prose, one document per line, and the same text
    in capitals, whose teacher's probabilities differ."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for number, text in enumerate(documents()):
        rows.append({"text": text[:900], "source": HOSTILE, "meta": {"n": number}})
        rows.append({"text": text[:400].upper(), "source": [3, None][number % 2]})
        rows.append({"text": " ", "source": "blank"})
    data = write_lines(folder / "mixed.jsonl", rows)
    packing = packing_for(tokenizer, window_length=32)
    corpus = pack(open_source(data), tokenizer, packing, folder / "cache/corpus", vocab_size=520)
    build_cache(teacher_folder, corpus, folder / "cache", TopK(12), tokenizer, windows_per_shard=64)
    keep_tokenizer(tokenizer, folder / "cache")
    return folder / "cache", data


def test_the_table_has_a_row_per_value(mixed, line):
    cache, data = mixed
    done = line("info", cache, "--by", "source", "--data", data, "--sample", 1000)
    assert done.code == 0, done.err
    assert not set(done.out) & {"\x1b", "\u202e"}
    rows = [row.split() for row in done.out.splitlines()]
    (red,) = (row for row in rows if row[:1] == [r"red\x1b[31m\nfake"])
    assert red[1] == r"row\u202e"
    tokens, entries, mass, windows, loss, entropy = red[2:]
    assert int(tokens.replace(",", "")) > 1000
    assert float(entries) == 12
    assert 0 < float(mass) < 1
    assert int(windows) > 0
    assert float(loss) > 0 < float(entropy)
    assert any(row[:2] == ["(no", "value)"] for row in rows)
    assert any(row[:1] == ["3"] for row in rows)
    assert "blank" not in done.out


def test_the_values_add_up_to_the_cache(mixed, line):
    cache, data = mixed
    given = ("info", cache, "--data", data, "--sample", 1000, "--json")
    told = json.loads(line(*given, "--by", "source").out)
    rows, whole = told["by"], told["statistics"]
    assert {row["value"] for row in rows} == {HOSTILE, "3", None}
    for name in ("tokens", "positions"):
        assert sum(row[name] for row in rows) == whole[name]
    entries = sum(row["positions"] * row["entries_per_position"] for row in rows)
    assert entries == pytest.approx(whole["entries"])
    assert [row["tokens"] for row in rows] == sorted((r["tokens"] for r in rows), reverse=True)
    assert sum(row["windows"] for row in rows) < whole["windows"]  # the others are mixed
    assert "by_other" not in told
    plain = json.loads(line(*given[:2], "--json").out)
    assert plain["fingerprint"] == told["fingerprint"]
    assert "by" not in plain


def test_only_the_largest_values_are_shown(mixed, line, tokenizer, teacher_folder, tmp_path):
    rows = [
        {"text": text[start : start + 90], "source": f"s{i}-{start}"}
        for i, text in enumerate(documents())
        for start in range(0, 450, 90)
    ]
    data = write_lines(tmp_path / "many.jsonl", rows)
    packing = packing_for(tokenizer, window_length=32)
    corpus = pack(open_source(data), tokenizer, packing, tmp_path / "c/corpus", vocab_size=520)
    build_cache(teacher_folder, corpus, tmp_path / "c", TopK(4), tokenizer, windows_per_shard=64)
    given = ("info", tmp_path / "c", "--by", "source", "--data", data, "--sample", 1000)
    assert "contains no tokenizer" in line(*given).err
    given = (*given, "--tokenizer", teacher_folder)
    told = json.loads(line(*given, "--json").out)
    assert len(told["by"]) == MOST_LABELS
    other = told["by_other"]
    assert other["values"] + MOST_LABELS <= len(rows)
    shown = sum(row["tokens"] for row in told["by"])
    assert shown + other["tokens"] == told["statistics"]["tokens"]
    printed = line(*given).out
    assert f"({other['values']:,} other values)" in printed
    assert printed.count("\n") < MOST_LABELS + 40


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--by", "source"), "expected --by FIELD, --data TEXT and a --sample above 0 together"),
        (("--data", "DATA"), "expected --by FIELD, --data TEXT and a --sample above 0 together"),
        (("--by", "source", "--data", "DATA", "--sample", 0), "and a --sample above 0 together"),
        (("--by", "origin", "--data", "DATA"), "has a value in the field 'origin'; check its name"),
        (("--by", "meta", "--data", "DATA"), "the field `meta` contains dict; expected text"),
        (("--by", "text", "--data", "DATA"), "contains text of 900 characters; expected text of"),
        (("--by", "source", "--data", "OTHER"), "is not the text of"),
        (("--by", "source", "--data", "/nowhere"), "/nowhere does not exist"),
        (
            ("--by", "source", "--data", "DATA", "--tokenizer", "/none"),
            "there is no model folder at",
        ),
    ],
)
def test_what_cannot_be_grouped_is_an_error(words, found, mixed, line, tmp_path):
    cache, data = mixed
    other = write_lines(tmp_path / data.name, [{"text": "words " * 100}])
    told = line("info", cache, *({"DATA": data, "OTHER": other}.get(word, word) for word in words))
    assert told.code != 0
    assert found in " ".join(told.err.split())


def test_an_appended_text_is_found(mixed, line, tokenizer, teacher_folder, tmp_path):
    """Each text is grouped by itself: windows of the other texts are left out."""
    paths = []
    for name, source in (("one", "first"), ("two", "second")):
        rows = [{"text": f"{name} {t[:300]}", "source": source} for t in documents()[:9]]
        paths.append(write_lines(tmp_path / f"{name}.jsonl", rows))
    common = ("cache", "--teacher", teacher_folder, "--out", tmp_path / "c", "--window", 32)
    assert line(*common, "--data", paths[0], "--device", "cpu").code == 0
    assert line(*common, "--data", paths[1], "--device", "cpu", "--append").code == 0
    for path, source in zip(paths, ("first", "second"), strict=True):
        given = ("info", tmp_path / "c", "--by", "source", "--data", path, "--sample", 1000)
        told = json.loads(line(*given, "--json").out)
        assert [row["value"] for row in told["by"]] == [source]
        one = [own for name, own in told["texts"].items() if path.name in name]
        assert told["by"][0]["tokens"] == one[0]["tokens"]


def test_a_cache_without_its_text_is_an_error(mixed, line, tmp_path):
    cache, data = mixed
    merged = line("merge", cache, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    told = line("info", tmp_path / "merged", "--by", "source", "--data", data)
    assert told.code != 0
    assert "has no packed text" in told.err
