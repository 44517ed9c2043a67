"""The commands on a masked language model: cache, info, train, eval and view, end to end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.store import Cache
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert(vocab_size=VOCABULARY, initializer_range=0.1).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_texts(text, tmp_path_factory.mktemp("short") / "text.jsonl")


def test_a_masked_teacher_is_cached_learnt_from_and_evaluated(
    bert: Path, short: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = ["--device", "cpu", "--window", 32, "--holdout", 0.2, "--rounds", 6]
    shown = run(
        *("cache", "--teacher", bert, "--data", short, "--out", cache, *options),
        *("--mask-rate", 0.3, "--mask-units", "words", "--json"),
    )
    identity = json.loads(shown[shown.index("{") :])["identity"]
    assert identity["objective"]["name"] == "masked"
    assert identity["objective"]["rate"] == 0.3
    assert identity["objective"]["units"] == "words"
    told = run("info", cache)
    assert "masked: 0.3 of the tokens" in told
    assert "--student MODEL" in told  # the sizes of new students are those of causal models
    record = Cache.open(cache).read(0)
    assert 0 < record.mask.sum() < 0.7 * len(record.mask)

    trained = tmp_path / "run"
    run(
        *("train", "--cache", cache, "--student", bert, "--out", trained),
        *("--num-train-epochs", 1, "--per-device-train-batch-size", 8, "--device", "cpu"),
    )
    new = ["train", "--cache", cache, "--student-config", "tiny", "--out", tmp_path / "new"]
    with pytest.raises(InvalidArgumentError, match=r"for a masked language model: .* Use a masked"):
        CliRunner().invoke(app, [str(word) for word in new], catch_exceptions=False)
    (config,) = trained.glob("model/config.json")
    assert json.loads(config.read_text())["architectures"] == ["BertForMaskedLM"]
    assert 'pipeline("fill-mask",' in (trained / "model/README.md").read_text()

    shown = run("eval", trained, "--cache", cache, "--teacher", bert, "--device", "cpu", "--json")
    found = json.loads(shown[shown.index("{") :])
    assert "student" in json.dumps(found)
    assert "kl" in json.dumps(found)

    page = tmp_path / "page.html"
    run("view", cache, "--window", 0, "--tokenizer", bert, "--out", page)
    assert "[MASK]" in page.read_text()


def test_documents_are_cached_in_windows_of_their_own(
    bert: Path, short: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(
        *("cache", "--teacher", bert, "--data", short, "--out", cache, "--device", "cpu"),
        *("--window", 48, "--rounds", 4, "--packing", "documents"),
    )
    opened = Cache.open(cache)
    assert opened.identity.packing["kind"] == "documents"
    assert opened.read(0).document_starts[0] == 0
    run("verify", cache)
    told = run("info", cache)
    assert "one document per window" in told
    # a window of the middle of a document has no start, and no padding
    starts = [opened.read(i).document_starts for i in range(len(opened))]
    ends = [int(max(own, default=0)) or 48 for own in starts]
    share = sum(ends) / (48 * len(opened))
    assert 0.2 < share < 0.95
    assert f"{share:.1%} of them text and the others padding" in told
    per_token = opened.statistics().bytes_on_disk / sum(ends)
    assert f"{per_token:.2f}, the text's own tokens included (padding not counted)" in told
    found = json.loads(run("info", cache, "--sample", 0, "--json"))
    assert found["bytes_per_text_token"] == pytest.approx(per_token)
    run("eval", bert, "--cache", cache, "--data", short, "--device", "cpu", "--limit", 4)
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "of the loop " * 60}) + "\n")
    for packing in ("joined", "documents"):  # the packing of appended text must be the same
        words = ["cache", "--teacher", bert, "--data", more, "--out", cache, "--append"]
        words += ["--device", "cpu", "--window", 48, "--rounds", 4, "--packing", packing]
        done = CliRunner().invoke(app, [str(word) for word in words])
        if packing == "joined":
            assert isinstance(done.exception, IdentityMismatchError)
            assert "packing.kind: None in this build, 'documents' in the" in str(done.exception)
    assert done.exit_code == 0
    assert len(Cache.open(cache)) > len(opened)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "causal"], "expected --objective masked"),
        (["--mask-rate", "often"], "--mask-rate is 'often'"),
        (["--mask-rate", "1.5"], "rate is 1.5"),
        (["--mask-span", "2"], "span is 2.0"),
        (["--mask-units", "spans", "--mask-span", "inf"], "span is inf"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_work_starts(
    words: list[str], said: str, bert: Path, short: Path, tmp_path: Path
) -> None:
    given = ["cache", "--teacher", bert, "--data", short, "--out", tmp_path / "c", *words]
    done = CliRunner().invoke(app, [str(word) for word in given])
    assert isinstance(done.exception, InvalidArgumentError)
    assert said in str(done.exception)
    assert not (tmp_path / "c").exists()


def test_a_masked_student_is_evaluated_with_a_cache_alone(bert: Path, short: Path) -> None:
    given = ["eval", bert, "--data", short, "--device", "cpu", "--window", 32]
    done = CliRunner().invoke(app, [str(word) for word in given])
    assert isinstance(done.exception, InvalidArgumentError)
    assert "Name a cache of the student's teacher with --cache" in str(done.exception)


def test_options_of_masked_models_are_refused_for_a_causal_teacher(
    teacher_folder: Path, short: Path, tmp_path: Path
) -> None:
    given = ["cache", "--teacher", teacher_folder, "--data", short, "--out", tmp_path / "c"]
    done = CliRunner().invoke(app, [str(word) for word in [*given, "--mask-rate", 0.3]])
    assert isinstance(done.exception, InvalidArgumentError)
    assert "the teacher is a causal one" in str(done.exception)
