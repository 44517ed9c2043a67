"""Test caches that are rewritten for another tokenizer, from the command line and from Python.

.venv/bin/pytest tests/caching/test_retokenize.py
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, TrainingArguments

import sparselogits
from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.caching import CacheRequest, build_caches, retokenize
from sparselogits.caching.pushforward import Retokenizer
from sparselogits.caching.retokenized import _record, conversion
from sparselogits.caching.text import text_of_windows, windows_of_texts
from sparselogits.cli import main
from sparselogits.corpus import (
    PackedCorpus,
    Packing,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.corpus.token_bytes import TokenBytes
from sparselogits.errors import (
    CacheError,
    IdentityMismatchError,
    InvalidArgumentError,
    SparseLogitsError,
)
from sparselogits.samplers import Systematic, Threshold, TopK
from sparselogits.store import Cache, WindowRecord, verify
from sparselogits.targets import SparseTargets
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.train.run import require_same_teacher
from tests.conftest import make_tokenizer, tiny_llama
from tests.corpus.test_token_bytes import (
    HARD,
    byte_level,
    llama,
    sentencepiece_bpe,
    smollm2,
    trained,
    unigram,
    word_piece,
)


@remembered
def student() -> PreTrainedTokenizerFast:
    return byte_level(300)


@pytest.fixture(scope="module")
def made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "cache"
    retokenize(cache, student(), out)
    return out


# -- the cache -------------------------------------------------------------------------------------


def test_the_result_is_a_sound_cache_of_the_same_windows(cache: Path, made: Path) -> None:
    old, new = Cache.open(cache), Cache.open(made)
    assert new.ranges == old.ranges
    report = verify(new, stop=windows_of_texts(made), text_of=text_of_windows(made))
    assert not report.missing
    assert all(shard.error is None for shard in report.shards)
    assert new.identity.sampler == old.identity.sampler
    assert new.identity.codec == old.identity.codec
    assert new.identity.vocab_size == 300
    assert new.identity.tokenizer == str(tokenizer_fingerprint(student()))
    described = new.identity.teacher["retokenized"]
    assert described["cache"] == old.identity.fingerprint
    theirs, ours = CacheDataset(cache), CacheDataset(made)
    for i in range(0, len(new), 5):
        record = new.read(i)
        assert record.targets.rounds == 12
        present = torch.from_numpy(record.present())
        assert torch.equal(record.targets.entries_per_position > 0, present)
        before = theirs.cache.read(i)
        assert_same_text(before, record)
        # the teacher's loss on the window, per token of the student
        labelled = int((ours[i]["shift_labels"] >= 0).sum())
        assert record.teacher_loss * labelled == pytest.approx(before.teacher_loss * 31, rel=1e-4)


def assert_same_text(old: Any, new: Any) -> None:
    """The student's window spells the teacher's, without a cut character or word at its edges."""
    theirs, ours = token_bytes_of(teachers_tokenizer()), token_bytes_of(student())
    padding = np.flatnonzero(new.mask)[-1] + 2  # the last position with a label predicts a token
    text, made = (
        b"".join(b"\0" if t == end else own.bytes_of[t] for t in tokens.tolist())
        for own, end, tokens in ((theirs, 0, old.tokens), (ours, 2, new.tokens[:padding]))
    )
    assert 0 <= text.find(made) <= 3
    assert len(text) - len(made) <= 64 + 8


@remembered
def token_bytes_of(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer)


def test_the_same_tokenizer_gives_the_teachers_targets(cache: Path, tmp_path: Path) -> None:
    own = teachers_tokenizer()
    retokenize(cache, own, tmp_path / "same", elsewhere="none", followed=0)
    theirs, same = CacheDataset(cache), CacheDataset(tmp_path / "same")
    compared = 0
    for i in range(len(theirs)):
        before, after = theirs[i], same[i]
        differing = np.flatnonzero(before["input_ids"] != after["input_ids"][:32])
        for place in range(int(differing[0]) - 1 if len(differing) else 31):
            (ids, weights), (found, own_weights) = before["targets"][place], after["targets"][place]
            canonical = all(token_bytes_of(own).first_of(b) == t for t, b in spelled(ids.tolist()))
            if canonical and len(found):
                assert found.tolist() == ids.tolist()
                assert own_weights.tolist() == weights.tolist()
                compared += 1
    assert compared > 500


def spelled(ids: list[int]) -> list[tuple[int, bytes]]:
    """Return the bytes of ordinary tokens; the end of a text is mapped by its role."""
    return [(t, token_bytes_of(teachers_tokenizer()).bytes_of[t]) for t in ids if t]


def test_thinning_views_and_mixtures_take_it(
    made: Path, second_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(second_cache, tmp_path / "second")
    retokenize(
        tmp_path / "second",
        student(),
        tmp_path / "other",
        cache_tokenizer=teachers_tokenizer(),
        window=Cache.open(made).identity.window_length,
    )
    mixture = CacheDataset([made, tmp_path / "other"])
    assert mixture.rounds == 12 + 15
    window = mixture[0]["targets"]
    assert window.rounds == 27
    thinned = window.thin(9, 1)
    assert thinned.rounds == 9
    assert thinned.mass()[thinned.entries_per_position > 0].sub(1).abs().max() < 0.2


@remembered
def teachers_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_the_hold_out_is_of_the_same_documents(cache: Path, made: Path) -> None:
    before, after = (PackedCorpus.open(folder / "corpus") for folder in (cache, made))
    assert (after.windows, after.holdout_windows) == (before.windows, before.holdout_windows)
    assert after.holdout_windows > 0
    for i in range(before.holdout_windows):
        old, new = before.read_holdout(i, i + 1)[0], after.read_holdout(i, i + 1)[0]
        assert_same_text(old, new)
    assert after.text_fingerprint != before.text_fingerprint


def test_a_student_trains_and_is_measured(made: Path, tmp_path: Path) -> None:
    model = tiny_llama(seed=3, vocab_size=300)
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    dataset = CacheDataset(made)
    assert "teacher_entropy" not in dataset[0]  # that of the images is unknown
    trainer = SparseKDTrainer(model=model, args=arguments, train_dataset=dataset, rounds=6)
    assert trainer.train().training_loss > 0
    assert not any("kl" in line for line in trainer.state.log_history)


def test_padding_of_windows_of_documents_is_no_text(tmp_path: Path) -> None:
    texts = [f"the statement number {n} " + "of the loop " * (n % 3) for n in range(40)]
    texts += ["one text is much longer than the others " * 2] * 3  # not cut by default
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": own}) + "\n" for own in texts))
    own = teachers_tokenizer()
    own.add_special_tokens({"pad_token": "<pad>"})  # which the student does not have
    packing = packing_for(own, window_length=64, kind="documents", holdout=0.2)
    corpus = pack(open_source(str(data)), own, packing, tmp_path / "c/corpus", vocab_size=len(own))
    assert packing.padding_id == own.pad_token_id
    engine = TransformersTeacher(tiny_llama(vocab_size=len(own)), identity={"weights": "l"})
    request = CacheRequest(tmp_path / "c", Systematic(9))
    build_caches(engine, corpus, [request], tokenizer_hash=tokenizer_fingerprint(own))
    report = retokenize(tmp_path / "c", student(), tmp_path / "s", cache_tokenizer=own)
    made = Cache.open(tmp_path / "s")
    assert verify(made, text_of=text_of_windows(tmp_path / "s")).ok
    ours, end = token_bytes_of(student()), made.identity.packing["separator_id"]
    for i in range(len(made)):
        record = made.read(i)
        count = int(np.flatnonzero(record.mask)[-1]) + 2
        spelled_out = b"".join(ours.bytes_of[t] for t in record.tokens[:count].tolist() if t != end)
        assert spelled_out.decode().strip() in {text.strip() for text in texts}
        assert (record.tokens[count:] == end).all()
    assert report.cut_tokens == 0
    assert report.padding > 0
    held = PackedCorpus.open(tmp_path / "s/corpus")
    assert held.holdout_windows == corpus.holdout_windows


def test_it_resumes_and_writes_the_same_bytes(cache: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "again")
    shards = sorted((tmp_path / "again" / "shards").iterdir())
    kept = {shard.name: shard.read_bytes() for shard in shards}
    shards[-1].unlink()
    again = retokenize(cache, student(), tmp_path / "again")
    assert again == retokenize(cache, student(), tmp_path / "again")
    found = {shard.name: shard.read_bytes() for shard in (tmp_path / "again" / "shards").iterdir()}
    assert found == kept


@pytest.mark.parametrize(
    "sampler", [TopK(6), Threshold(0.05), Systematic(8, proposal_exponent=0.8)]
)
def test_other_samplers_are_mapped(
    sampler: Any, cache: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    build_caches(
        load_teacher(str(teacher_folder), tokenizer=teachers_tokenizer()),
        PackedCorpus.open(cache / "corpus"),
        [CacheRequest(tmp_path / "cache", sampler)],
        tokenizer_hash=tokenizer_fingerprint(teachers_tokenizer()),
    )
    retokenize(
        tmp_path / "cache",
        student(),
        tmp_path / "out",
        cache_tokenizer=teachers_tokenizer(),
        elsewhere="none",
    )
    new = Cache.open(tmp_path / "out")
    assert all(shard.error is None for shard in verify(new).shards)
    # a list that is continued by another loses the mass that the other lacks
    masses, old = (
        torch.cat([CacheDataset(folder)[i]["targets"].mass() for i in range(40)])
        for folder in (tmp_path / "out", tmp_path / "cache")
    )
    expected = float(old[old > 0].mean())
    low = expected**3 if isinstance(sampler, TopK) else expected - 0.1
    assert low < float(masses[masses > 0].mean()) < expected + 0.1


def test_a_full_window_changes_neither_the_loss_nor_the_length_when_continued(
    cache: Path, made: Path, tmp_path: Path
) -> None:
    """`teacher_loss` is per token of the text, however many of them fit."""
    cut = retokenize(cache, student(), tmp_path / "cut", window=16)
    assert cut.cut_tokens > 0
    whole, short = Cache.open(made), Cache.open(tmp_path / "cut")
    for i in range(0, len(whole), 5):
        assert short.read(i).teacher_loss == whole.read(i).teacher_loss
    assert retokenize(cache, student(), tmp_path / "cut") == cut
    for wrong in (0, 1, -3):
        with pytest.raises(InvalidArgumentError, match="window_length"):
            retokenize(cache, student(), tmp_path / "none", window=wrong)


def test_the_teacher_is_not_run_on_tokens_of_the_student(made: Path, teacher_folder: Path) -> None:
    teacher = load_teacher(str(teacher_folder), tokenizer=teachers_tokenizer())
    with pytest.raises(IdentityMismatchError, match="was retokenized"):
        require_same_teacher(teacher, Cache.open(made).identity)


def test_a_token_with_several_roles_has_one_counterpart(cache: Path) -> None:
    """A token that ends a sequence and pads is the end for the student, in every process."""
    theirs, ours = make_tokenizer(), byte_level(300)
    others = ("pad_token", "sep_token", "cls_token", "mask_token")
    theirs.add_special_tokens(dict.fromkeys(("eos_token", *others), "<|im_end|>"))
    ours.add_special_tokens({name: f"<{name}>" for name in others})
    old = Cache.open(cache).identity
    convert, _ = conversion(old, theirs, ours)
    assert convert.special[theirs.eos_token_id] == ours.eos_token_id


# -- text ------------------------------------------------------------------------------------------


def aligned_text(teacher: Any, own: Any, text: str) -> tuple[Retokenizer, Any, list[int]]:
    """Return the conversion of a text that begins a document, and the teacher's tokens."""
    theirs, ours = TokenBytes(teacher), TokenBytes(own)
    tokens = teacher.encode(text, add_special_tokens=False)
    images = {i: ours.roles[r] for r, i in theirs.roles.items() if r in ours.roles}
    convert = Retokenizer(theirs, ours, images)
    return convert, convert.align(tokens, [0]), tokens


@pytest.mark.parametrize(
    "name", ["byte-level", "punctuation with lines", "sentencepiece", "unigram"]
)
@pytest.mark.parametrize("text", HARD)
def test_hard_text_of_smollm2(name: str, text: str) -> None:
    """Shared boundaries are where both spell the same bytes, whatever the text."""
    text = text.replace("<|im_start|>", "|").replace("</s>", "|")
    convert, aligned, tokens = aligned_text(
        smollm2(), trained(name), f"{text} and more words follow."
    )
    spelled = [convert.teacher.bytes_of[t] for t in tokens]
    data = b"".join(spelled)
    plain = name in ("byte-level", "punctuation with lines") and not text.startswith(HARD[2])
    if plain:
        made = b"".join(convert.student.bytes_of[t] for t in aligned.tokens.tolist())
        assert data.startswith(made)
        assert len(data) - len(made) == aligned.left_out
    shared = np.flatnonzero(aligned.source >= 0)
    assert len(shared) > 3
    for place in shared.tolist():
        before = len(b"".join(spelled[: int(aligned.source[place]) + 1]))
        following = convert.student.bytes_of[int(aligned.tokens[place + 1])]
        assert data[before:].startswith(following.removeprefix(b" ") if before == 0 else following)


def test_a_window_that_begins_and_ends_within_a_character() -> None:
    emoji = " \U0001f469\u200d\U0001f467 \U0001f44d words that follow \U0001f44d"
    tokens = smollm2().encode(emoji, add_special_tokens=False)
    theirs, ours = TokenBytes(smollm2()), TokenBytes(byte_level())
    convert = Retokenizer(theirs, ours, {})
    cut = 0
    for first in range(5):
        for last in range(len(tokens) - 3, len(tokens) + 1):
            window = tokens[first:last]
            aligned = convert.align(window, [])
            made = b"".join(ours.bytes_of[t] for t in aligned.tokens.tolist())
            made.decode()  # only whole characters
            assert made in b"".join(theirs.bytes_of[t] for t in window)
            cut += aligned.left_out > 0
    assert cut > 5


def test_bytes_that_are_no_text_within_a_window_get_no_target() -> None:
    theirs, ours = TokenBytes(byte_level()), TokenBytes(byte_level(400))
    lone = theirs.byte_tokens(b"\xff\xfe")
    words = byte_level().encode("some words", add_special_tokens=False)
    aligned = Retokenizer(theirs, ours, {}).align([*words, *lone, *words, *words], [])
    made = [ours.bytes_of[t] for t in aligned.tokens.tolist()]
    assert b"\xff" in made
    place = made.index(b"\xff")
    assert aligned.source[place - 1] == aligned.source[place] == -1
    assert (aligned.source[place + 3 :] >= 0).any()


def test_a_window_without_text_for_the_student_has_no_targets() -> None:
    """Only padding remains: of tokens that are left out, and of bytes that are no text."""
    theirs, ours = TokenBytes(byte_level()), TokenBytes(unigram())
    convert = Retokenizer(theirs, ours, {1: b"", 2: 2})
    packing = Packing(window_length=8, separator_id=2, bos_id=None)
    for tokens in ([1, 1, 1], theirs.byte_tokens(b"\xff\xfe\x80")):
        aligned = convert.align(tokens, [0])
        assert not len(aligned.tokens)
        drawn = torch.full((3,), 2, dtype=torch.int32)
        given = SparseTargets(
            torch.tensor(tokens), drawn / 2, torch.arange(4), theirs.size, counts=drawn, rounds=2
        )
        starts = np.zeros(1, np.int32)
        old = WindowRecord(5, np.array(tokens, np.int32), starts, None, given, 1.0, 1.0)
        made = _record(convert, aligned, packing, old, seed=0)
        made.validate(8, masked=False)
        assert made.tokens.tolist() == [2] * 8
        assert not made.present().any()


def test_end_of_text_and_chat_marks_are_mapped_by_text_and_role() -> None:
    """`<|endoftext|>` has the role of `</s>`; `<|im_start|>` is a token of both."""
    theirs, own = smollm2(), byte_level()
    text = "First words.<|endoftext|><|im_start|>user\nHello there<|im_end|>\nand more words"
    ids = theirs.encode(text, add_special_tokens=False)
    convert = Retokenizer(TokenBytes(theirs), TokenBytes(own), {0: 2, 1: 3, 2: b"<|im_end|>"})
    aligned = convert.align(ids, [0, ids.index(0) + 1])
    made = aligned.tokens.tolist()
    assert made.count(2) == made.count(3) == 1
    assert own.decode(made).startswith("First words.</s><|im_start|>user\nHello there<|im_end|>")
    assert aligned.starts.tolist() == [0, made.index(3)]
    predicts = made.index(2) - 1  # the position that predicts the end of the text
    assert aligned.source[predicts] == ids.index(0) - 1
    assert aligned.source[made.index(2)] == ids.index(0)  # and the one that predicts the chat mark
    with pytest.raises(
        InvalidArgumentError, match=r'no counterpart.*--special "<\|im_end\|>=TOKEN"'
    ):
        Retokenizer(convert.teacher, convert.student, {0: 2, 1: 3}).align(ids, [0])


def test_a_beginning_of_text_token_is_inserted_or_left_out() -> None:
    theirs, own = byte_level(), byte_level(400)
    text = theirs.encode("Some words and more", add_special_tokens=False)
    tokens = [*text, 2, *text]
    with_bos = Retokenizer(TokenBytes(theirs), TokenBytes(own), {2: 2}, bos_id=1)
    aligned = with_bos.align(tokens, [0, len(text) + 1])
    made = aligned.tokens.tolist()
    second = made.index(1, 1)
    assert made[0] == 1
    assert made[second - 1] == 2
    assert aligned.starts.tolist() == [0, second]
    assert aligned.source[second - 1] == -1  # predicts a token that the teacher does not have
    assert aligned.source[second] == len(text)
    without = Retokenizer(TokenBytes(theirs), TokenBytes(own), {2: 2, 1: b""})
    bare = without.align([1, *text, 2, 1, *text], [0, len(text) + 2])
    assert 1 not in bare.tokens.tolist()
    end = bare.tokens.tolist().index(2)
    assert bare.source[end] == len(text) + 2


def test_sentencepiece_adds_its_space_at_the_beginning_of_a_document_alone() -> None:
    theirs, own = byte_level(), sentencepiece_bpe()
    first = theirs.encode("The words", add_special_tokens=False)
    convert = Retokenizer(TokenBytes(theirs), TokenBytes(own), {2: 2})
    aligned = convert.align([*first, 2, *first, *theirs.encode(" of it")], [0, len(first) + 1])
    made = aligned.tokens.tolist()
    end = made.index(2)
    assert convert.student.bytes_of[made[end + 1]][:1] == b" "
    assert aligned.begins[end]
    assert aligned.source[end] == len(first)
    inside = convert.align([*first, *first], [])
    assert convert.student.bytes_of[int(inside.tokens[0])][:1] == b"T"


@pytest.mark.parametrize("make", [llama, sentencepiece_bpe, unigram])
def test_the_space_that_the_teachers_tokenizer_adds_is_no_text(make: Any) -> None:
    theirs = make()
    own = TokenBytes(theirs)
    first = theirs.encode("The statement of the loop and the words", add_special_tokens=False)
    tokens = [*first, 2, *first]
    drawn = torch.ones(len(tokens), dtype=torch.int32)
    given = SparseTargets(
        torch.tensor([*tokens[1:], 2]), drawn.float(), torch.arange(len(tokens) + 1), own.size,
        counts=drawn, rounds=1,
    )  # fmt: skip
    for followed in (0, 4):
        same = Retokenizer(own, own, {i: i for i in own.special}, followed=followed)
        aligned = same.align(tokens, [0, len(first) + 1])
        made = aligned.tokens.tolist()
        assert made == tokens[: len(made)]
        assert (aligned.source[:-1] >= 0).all()
        targets = same.targets(aligned, tokens, given, same.uniforms(aligned, 0, 0))
        assert targets.ids.tolist() == made[1:]
        other = Retokenizer(own, TokenBytes(byte_level()), {2: 2}, followed=followed)
        aligned = other.align(tokens, [0, len(first) + 1])
        made = aligned.tokens.tolist()
        assert other.student.bytes_of[made[0]][:1] == b"T"
        end = made.index(2)
        assert aligned.source[end] == len(first)
        targets = other.targets(aligned, tokens, given, other.uniforms(aligned, 0, 0))
        assert all(other.student.bytes_of[i][:1] == b"T" for i in targets[end].ids.tolist())


def test_the_space_after_an_added_token_is_no_text() -> None:
    theirs = llama()
    theirs.add_tokens([AddedToken("<answer>", normalized=False)])
    text = "The statement <answer>of the loop<answer> and the words"
    convert, aligned, _ = aligned_text(theirs, byte_level(), text)
    made = b"".join(convert.student.bytes_of[t] for t in aligned.tokens.tolist())
    assert made == text.removesuffix(" words").encode()  # the window may cut its last word


def test_no_space_is_added_after_an_unknown_character() -> None:
    convert, aligned, _ = aligned_text(unigram(), byte_level(), "The \u6f22 of the loop and words")
    spelled = [convert.student.bytes_of[t] for t in aligned.tokens.tolist()]
    assert b"".join(spelled) == b"The  of the loop and"


# -- loss masks ------------------------------------------------------------------------------------


def test_the_loss_mask_covers_the_same_text() -> None:
    theirs, own = byte_level(), byte_level(400)
    parts = ["A question of some words?", " An answer of other words."]
    tokens = [theirs.encode(part, add_special_tokens=False) for part in parts]
    learnt = np.array([False] * len(tokens[0]) + [True] * len(tokens[1]))
    present = np.append(learnt[1:], False)
    convert = Retokenizer(TokenBytes(theirs), TokenBytes(own), {})
    aligned = convert.align(tokens[0] + tokens[1], [0], present)
    ends = np.cumsum([len(convert.student.bytes_of[t]) for t in aligned.tokens])
    expected = ends[:-1] >= len(parts[0].encode())
    assert aligned.learnt[:-1].tolist() == expected.tolist()
    assert (aligned.source[:-1][~expected] == -1).all()


# -- errors and the command ------------------------------------------------------------------------


def test_what_cannot_be_retokenized(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, error in (
        ({"tokenizer": word_piece()}, "WordPiece"),
        ({"special": {"<none>": "</s>"}}, "'<none>' is not a special token of the cache"),
        (
            {"special": {"<|endoftext|>": "<none>"}},
            "'<none>' is not a special token of the student",
        ),
        ({"elsewhere": "nothing"}, "expected 'text' or 'none'"),
        ({"followed": -1}, "followed is -1; expected a whole number of at least 0"),
    ):
        with pytest.raises(SparseLogitsError, match=error):
            retokenize(cache, **{"tokenizer": student(), "out": out, **wrong})
        assert not out.exists() or not list(out.glob("shards/*"))
    with pytest.raises(IdentityMismatchError, match="the cache tokenizer"):
        retokenize(cache, student(), out, cache_tokenizer=byte_level(400))
    with pytest.raises(CacheError, match="no cache"):
        retokenize(tmp_path / "nowhere", student(), out)
    shutil.copytree(cache, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    with pytest.raises(InvalidArgumentError, match="--cache-tokenizer"):
        retokenize(tmp_path / "bare", student(), out)


def test_the_command(cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    student().save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["sparselogits", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr()

    given = ("retokenize", str(cache), "--tokenizer", "student", "--out", "out")
    code, said = run(*given, "--json")
    assert not code
    report = json.loads(said.out)
    assert report["with_target"] > report["without_target"] > 0
    code, said = run(*given)
    assert not code
    assert "with a target of the teacher" in said.out
    assert "train --cache out" in said.err
    code, said = run("verify", "out")
    assert not code
    code, said = run(*given[:-1], "other", "--special", "=x")
    assert code
    assert "give TEACHER=STUDENT" in said.err
    assert sparselogits.retokenize is retokenize
