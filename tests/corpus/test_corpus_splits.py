"""Test that a folder is divided into splits as by `datasets`, which is the oracle."""

import bz2
import gzip
import json
import lzma
import os
import random
import socket
from pathlib import Path

import datasets
import pytest
import zstandard

from sparselogits.corpus import Packing, open_source, pack
from sparselogits.errors import CorpusError

ROW = json.dumps({"text": "words"}) + "\n"


def lay_out(folder: Path, names: list[str], card: str = "") -> Path:
    """A folder of records whose text is the name of their file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = name if name.endswith((".txt", ".md")) else json.dumps({"text": name})
        path.write_text("{}" if name.endswith("info.json") else text)
    if card:
        (folder / "README.md").write_text(card)
    return folder


def expected(folder: Path, configuration: str | None = None) -> dict[str, list[str]]:
    """What `datasets` would read, by split."""
    builder = datasets.load_dataset_builder(str(folder), configuration)
    found = {}
    for split, paths in builder.config.data_files.items():
        # it reads a file twice that two patterns of its split match; here it is read once
        found[str(split)] = sorted({Path(path).relative_to(folder).as_posix() for path in paths})
    return found


def read(folder: Path | str, splits: list[str]) -> dict[str, list[str]]:
    found = {}
    for split in splits:
        try:
            found[split] = [file.name for file in open_source(folder, split=split).files]
        except CorpusError as error:
            assert f"no split `{split}`" in str(error) or "of the split" in str(error)  # noqa: PT017
    return found


ALL = ["train", "validation", "test", "random"]
LAYOUTS = [
    [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ],
    ["data/random-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"],
    ["data/train-00000-of-00001-abcdef.jsonl", "data/validation-00000-of-00001-abcdef.jsonl"],
    ["train.jsonl", "test.jsonl", "validation.jsonl"],
    ["train.jsonl", "dev.jsonl", "extra.jsonl"],
    ["train_0.jsonl", "train_1.jsonl", "valid_0.jsonl"],
    ["my-train-file.jsonl", "my-eval-file.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
    ["train/test.jsonl", "train/other.jsonl"],
    ["test/train.jsonl", "train/x.jsonl"],
    ["data/training/a.jsonl", "data/val/a.jsonl", "data/evaluation/b.jsonl"],
    ["a.jsonl", "b.jsonl"],
    ["www_farodevigo_es.jsonl", "latest.jsonl", "trainer.jsonl"],  # keywords within words
    ["Train.jsonl", "Test.jsonl"],
    ["train.v1.jsonl", "test.v1.jsonl", "notes.txt"],
    ["split=train/a.jsonl", "split=test/a.jsonl"],
    ["train2.jsonl", "test 2.jsonl"],
    ["train.jsonl", "__MACOSX/train.jsonl", ".git/test.jsonl", "test.jsonl"],
    ["train.json", "test.json"],
    ["only.json"],
    ["train.txt", "test.txt", "other.txt"],
    ["test.jsonl"],
    ["cfg/train.jsonl", "cfg/test.jsonl", "dataset_info.json"],
    ["eval.jsonl", "a.jsonl"],
    ["one.jsonl", "two.jsonl", "three.json"][:2],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=", ".join)
def test_folders_are_divided_as_datasets_divides_them(names, tmp_path):
    folder = lay_out(tmp_path / "pages", names)
    assert read(folder, ALL) == expected(folder)


def test_random_folders_are_divided_alike(tmp_path):
    rng = random.Random(5)
    words = ["train", "test", "val", "dev", "data", "x", "trained", "evaluation", "2", "part"]
    for trial in range(25):
        names = set()
        for _ in range(rng.randint(1, 6)):
            parts = [
                rng.choice(["", "-", "_", "."]).join(rng.choices(words, k=rng.randint(1, 2)))
                for _ in range(rng.randint(1, 3))
            ]
            name = "/".join(part.strip("._") or "x" for part in parts)
            names.add(name + ".jsonl")
        folder = lay_out(tmp_path / str(trial) / "pages", sorted(names))
        assert read(folder, ALL) == expected(folder), names


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: [part1/*.jsonl, part2/*]
  - split: held
    path: "part3/**"
- config_name: small
  data_dir: part3
- config_name: bad
  data_files: ["../secret.jsonl", "/etc/hosts", "part1/a.jsonl"]
---
# Pages
"""


def test_the_card_of_a_dataset_names_files(tmp_path):
    names = ["part1/a.jsonl", "part1/b.jsonl", "part2/a.jsonl", "part3/deep/x.jsonl", "y.jsonl"]
    folder = lay_out(tmp_path / "pages", names, CARD)
    lay_out(tmp_path, ["secret.jsonl"])
    assert read(folder, ["train", "held"]) == expected(folder)
    assert read(f"{folder}:small", ["train"]) == expected(folder, "small")
    # no pattern leads out of the folder
    assert read(f"{folder}:bad", ["train"]) == {"train": ["part1/a.jsonl"]}
    source = open_source(folder)
    assert "1 file (of the split `held`: part3/deep/x.jsonl)" in source.in_words()
    assert "(of no split: README.md, y.jsonl)" in source.in_words()
    with pytest.raises(CorpusError, match=r"no configuration 'large'; README.md names default, sm"):
        open_source(f"{folder}:large")
    folder.joinpath("README.md").write_text(CARD.replace("name: default", "name: other"))
    with pytest.raises(CorpusError, match=r"several configurations \(other, small, bad\) and no"):
        open_source(folder)
    folder.joinpath("README.md").write_text("---\na: &a [x]\nb: *a\n---\n")  # not a card of ours
    assert len(open_source(folder).files) == 5


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("5", "cannot be divided into splits"),
        ("{train: 5}", "cannot be divided into splits: `data_files` in README.md contains a pat"),
        ("[a.jsonl, null]", "cannot be divided into splits: `data_files` in README.md contains a"),
        ("[{split: [1], path: a.jsonl}]", "cannot be divided into splits"),
        ("missing.jsonl", r"its splits \(with numbers of files\) are none\. Give"),
    ],
)
def test_a_card_with_other_values_than_patterns(patterns, message, tmp_path):
    card = f"---\nconfigs: [{{config_name: default, data_files: {patterns}}}]\n---\n"
    folder = lay_out(tmp_path / "pages", ["a.jsonl"], card)
    with pytest.raises(CorpusError, match=message):
        open_source(folder)


@pytest.mark.parametrize("names", [["a.md", "testing.md", "train.rst"], ["a.txt", "b.txt"]])
def test_pages_of_text_are_all_read(names, tmp_path):
    """Documentation is not divided because a page of it is called testing.md."""
    folder = lay_out(tmp_path / "pages", names)
    assert [file.name for file in open_source(folder).files] == sorted(names)
    with pytest.raises(CorpusError, match="no split `test`: the names"):
        open_source(folder, split="test")


def test_a_split_that_is_not_there(tmp_path):
    folder = lay_out(tmp_path / "pages", ["test.jsonl", "valid.jsonl", "z.jsonl"])
    with pytest.raises(CorpusError, match=r"no files of the split `train`.*validation \(1\), test"):
        open_source(folder)
    by_pattern = open_source(f"{folder}/*.jsonl")
    assert len(by_pattern.files) == 3
    for named in (f"{folder}/*.jsonl", f"{folder}/test.jsonl"):
        with pytest.raises(CorpusError, match=r"names files, which have no split `test`; remove"):
            open_source(named, split="test")


def test_a_file_of_two_splits_is_named(tmp_path):
    folder = lay_out(tmp_path / "pages", ["train/eval.jsonl", "train/test/a.jsonl", "test/a.jsonl"])
    source = open_source(folder)
    assert [file.name for file in source.files] == ["train/eval.jsonl", "train/test/a.jsonl"]
    assert "1 file that is read (also of the split `test`: train/test/a.jsonl)" in source.in_words()


def test_one_format_is_read_and_the_rest_is_named(tmp_path):
    folder = lay_out(tmp_path / "pages", ["a.jsonl", "b.jsonl", "notes.md", "picture.png"])
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(folder / "a.parquet")
    source = open_source(folder)
    assert [file.name for file in source.files] == ["a.jsonl", "b.jsonl"]
    assert {own.names: own.reason for own in source.left_out} == {
        ("a.parquet", "notes.md"): "of another format than .jsonl",
        ("picture.png",): "no known text format",
    }


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    shards = lay_out(tmp_path / "elsewhere", ["a.jsonl", "deep/b.jsonl"])
    folder = lay_out(tmp_path / "pages", ["c.jsonl"])
    (folder / "linked").symlink_to(shards)
    (folder / "again").symlink_to(shards)
    (shards / "deep" / "loop").symlink_to(shards)
    (shards / "up").symlink_to(folder)
    (folder / "d.jsonl").symlink_to(shards / "a.jsonl")  # as the hub's cache stands
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    source = open_source(folder)
    names = [file.name for file in source.files]
    assert len(names) == 4
    assert {"c.jsonl", "d.jsonl"} < set(names)
    assert sorted(source.documents()) == ["a.jsonl", "a.jsonl", "c.jsonl", "deep/b.jsonl"]
    said = source.in_words()
    assert "files (link to a folder that is also read elsewhere: " in said
    assert "1 file (broken link: gone.jsonl)" in said
    with pytest.raises(CorpusError, match=r"is a link to .*/nothing, which does not exist"):
        open_source(folder / "gone.jsonl")


def test_only_regular_files_are_read(tmp_path):
    """A pipe in a folder is named and not opened; alone it is refused, and nothing hangs."""
    folder = lay_out(tmp_path / "pages", ["a.jsonl"])
    os.mkfifo(folder / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "s.jsonl"))
        source = open_source(folder)
        assert [file.name for file in source.files] == ["a.jsonl"]
        assert "2 files (not a regular file: pipe.jsonl, s.jsonl)" in source.in_words()
        with pytest.raises(CorpusError, match=r"is a socket; only regular files"):
            open_source(folder / "s.jsonl")
    with pytest.raises(
        CorpusError, match=r"is a named pipe; only regular files.*Write its content"
    ):
        open_source(folder / "pipe.jsonl")
    with pytest.raises(CorpusError, match="is a device"):
        open_source("/dev/zero")


def test_names_of_any_bytes(tokenizer, tmp_path):
    """Latin-1, markup, line breaks and escapes in names do no harm."""
    folder = os.fsencode(tmp_path) + b"/p\xe4ges"
    Path(os.fsdecode(folder)).mkdir()
    for name in (b"caf\xe9.jsonl", b"[bold]x[red].jsonl", b"a\nb.jsonl", b"\x1b]0;t\x07.jsonl"):
        Path(os.fsdecode(folder + b"/" + name)).write_text(ROW * 20)
    source = open_source(os.fsdecode(folder))
    assert len(source.files) == 4
    packing = Packing(8, 0, None, holdout=0.2)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=600)
    assert corpus.summary.documents + corpus.summary.holdout_documents == 80
    assert corpus.source_name == "p?ges"
    again = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=600)
    assert again.source_fingerprint == corpus.source_fingerprint
    bad = Path(os.fsdecode(folder + b"/caf\xe9.jsonl"))
    bad.write_text("{")
    with pytest.raises(CorpusError) as raised:
        pack(open_source(bad), tokenizer, packing, tmp_path / "bad", vocab_size=600)
    str(raised.value).encode()  # can be printed


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    folder = lay_out(tmp_path / "pages", ["a.txt"])
    (folder / "a.txt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    )
    with pytest.raises(CorpusError, match=r"a.txt is a Git LFS pointer.*git lfs pull"):
        open_source(folder)


def test_fingerprints_of_plain_names_are_as_before(tmp_path):
    (tmp_path / "a.txt").write_text("One text.")
    assert open_source(tmp_path / "a.txt").fingerprint == (
        "874c8100895fe2614c7e68fa106b7336cd8832dd772448bbc746e6e12eec76be"
    )


def test_patterns_pass_over_hidden_copies(tmp_path):
    """Jupyter and Git keep copies of files in hidden folders."""
    names = ["a.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/a.jsonl", "deep/b.jsonl"]
    folder = lay_out(tmp_path / ".cache" / "pages", names)  # hidden folders above it do not count
    assert len(open_source(f"{folder}/**/*.jsonl").files) == 2
    assert len(open_source(f"{folder}/../pages/*.jsonl").files) == 1
    assert len(open_source(f"{folder}/../../.cache/pages").files) == 2
    assert len(open_source(f"{folder}/.ipynb_checkpoints/*.jsonl").files) == 1


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.txt", "pages"])
@pytest.mark.parametrize(
    ("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma), (".zst", zstandard)]
)
def test_a_download_whose_name_lost_its_suffix(name, suffix, module, tmp_path):
    (tmp_path / name).write_bytes(module.compress(ROW.encode() * 9))
    with pytest.raises(CorpusError, match=rf"contains \{suffix} data .* to {name}\{suffix} if"):
        open_source(tmp_path / name)


def test_a_fourth_split_folder_and_shards_of_spark(tmp_path):
    folder = lay_out(tmp_path / "pages", [f"{s}/a.jsonl" for s in ("train", "test", "custom")])
    (folder / "train" / "_SUCCESS").write_text("")
    (folder / "train" / ".a.jsonl.crc").write_bytes(b"crc\0")
    source = open_source(folder)
    assert [file.name for file in source.files] == ["train/a.jsonl"]
    said = source.in_words()
    assert "1 file (of no split: custom/a.jsonl)" in said
    assert "1 file (of the split `test`: test/a.jsonl)" in said
    assert "1 file (no known text format: train/_SUCCESS)" in said
