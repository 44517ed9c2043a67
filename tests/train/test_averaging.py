"""Averages of checkpoints: the mean of each weight, in a folder that every command reads."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from sparselogits import CacheDataset
from sparselogits.cli import app
from sparselogits.data import DraftVocabulary
from sparselogits.errors import (
    InvalidArgumentError,
    SparseLogitsError,
    SparseLogitsWarning,
    TeacherError,
)
from sparselogits.teacher.loading import load_language_model
from sparselogits.train import average_checkpoints, averaging
from tests.conftest import PADDED_VOCABULARY, tiny_llama
from tests.train.test_trainer import trainer_of

SMALL = ["--window", "32", "--rounds", "4", "--device", "cpu"]


def saved(folder: Path, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_an_average_is_the_mean_of_every_weight(tmp_path, tied):
    models = [tiny_llama(seed, tie_word_embeddings=tied) for seed in range(3)]
    folders = [saved(tmp_path / f"{i}", model) for i, model in enumerate(models)]
    average_checkpoints(folders, tmp_path / "mean")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").state_dict()
    states = [model.state_dict() for model in models]
    assert found.keys() == states[0].keys()
    for name, weight in found.items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
    stored = load_file(tmp_path / "mean" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied


def test_an_average_has_the_number_format_of_the_first_and_is_computed_in_float32(tmp_path):
    """bfloat16 sums would lose the third checkpoint: 1 + 1 + 2^-7 is 2 there."""
    folders = []
    for place, value in enumerate((1.0, 1.0, 1.0078125)):
        model = tiny_llama()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
            model.lm_head.weight[0, 0] = place  # checkpoints differ
        folders.append(saved(tmp_path / f"{place}", model.bfloat16()))
    for dtype, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        average_checkpoints(folders, tmp_path / dtype, dtype=dtype)
        stored = load_file(tmp_path / dtype / "model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {kind}
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config["dtype"] == str(kind).removeprefix("torch.")
    assert float(stored["model.norm.weight"][0]) == pytest.approx(1 + 0.0078125 / 3, rel=1e-6)


def test_a_students_own_checkpoints_teach_it(cache, tokenizer, text, tmp_path):
    """From the Trainer's checkpoints to a cache of their average, by the commands of the page."""
    trainer = trainer_of(
        cache,
        tmp_path / "run",
        save_strategy="steps",
        save_steps=2,
        max_steps=6,
        processing_class=tokenizer,
    )
    trainer.train()
    checkpoints = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4, 6)]
    mean, out = tmp_path / "mean", tmp_path / "own-cache"
    short = tmp_path / "short.jsonl"
    short.write_text("".join(text.open().readlines()[:2]))
    for words in (
        ["average", *checkpoints, "--out", str(mean)],
        ["cache", "--teacher", str(mean), "--data", str(short), "--out", str(out), *SMALL],
    ):
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert CacheDataset(out).identity.teacher["name"] == "mean"
    assert "checkpoint-4" in (mean / "README.md").read_text()


def test_a_check_that_fails_can_be_allowed_as_its_message_says(tmp_path):
    folders = [saved(tmp_path / f"{seed}", tiny_llama(seed)) for seed in range(2)]
    weights = load_file(Path(folders[1]) / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, Path(folders[1]) / "model.safetensors", {"format": "pt"})
    words = ["average", *map(str, folders), "--out", str(tmp_path / "mean")]
    with pytest.raises(TeacherError, match="--allow missing-weights"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.warns(SparseLogitsWarning, match="allowed: missing-weights"):
        done = CliRunner().invoke(app, [*words, "--allow", "missing-weights"])
    assert done.exit_code == 0, done.output


def test_an_average_of_drafters_has_their_draft_vocabulary(tmp_path):
    one, other, third = (saved(tmp_path / f"{seed}", tiny_llama(seed)) for seed in range(3))
    draft = DraftVocabulary(torch.tensor([1, 3, 4]), PADDED_VOCABULARY)
    draft.save(one)
    draft.save(other)
    average_checkpoints([one, other], tmp_path / "mean")
    assert DraftVocabulary.load(tmp_path / "mean") == draft
    with pytest.raises(InvalidArgumentError, match=r"differ: .*3 .* in .*0, None in .*2"):
        average_checkpoints([one, other, third], tmp_path / "no")
    DraftVocabulary(torch.tensor([1, 3]), PADDED_VOCABULARY).save(third)
    with pytest.raises(InvalidArgumentError, match=r"vocabularies differ"):
        average_checkpoints([one, third], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_an_average_of_adapters_is_the_mean_of_the_models_that_they_make(tmp_path):
    base = saved(tmp_path / "base", tiny_llama(0))
    folders, expected = [], []
    for number, alpha in enumerate((2, 16)):
        torch.manual_seed(number)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(
                r=2,
                lora_alpha=alpha,
                target_modules=["q_proj", "down_proj"],
                init_lora_weights=False,
            ),
        )
        folders.append(tmp_path / f"adapter-{number}")
        adapted.save_pretrained(folders[-1])
        expected.append(adapted.merge_and_unload().state_dict())
    average_checkpoints([*folders, base], tmp_path / "mean")
    expected.append(AutoModelForCausalLM.from_pretrained(base).state_dict())
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").state_dict()
    assert mean.keys() == expected[0].keys()
    for name, found in mean.items():
        torch.testing.assert_close(found, sum(each[name] for each in expected) / 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft: tied weights are adapted
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_average_of_adapters_of_tied_weights_computes_what_they_compute(tmp_path, target):
    """Merged into the one weight of both, embedding and head would change together."""
    base = saved(tmp_path / "base", tiny_llama(0, tie_word_embeddings=True))
    folders, expected, ids = [], [], torch.tensor([[5, 6, 7, 8]])
    for number in range(2):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=2, lora_alpha=2 + number, target_modules=[target]),
        )
        torch.manual_seed(0)  # the same adapter, so the average computes what each does
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=(2 / (2 + number)) ** 0.5)
        folders.append(tmp_path / f"adapter-{number}")
        adapted.save_pretrained(folders[-1])
        expected.append(adapted.eval()(ids).logits)
    torch.testing.assert_close(expected[0], expected[1])
    average_checkpoints(folders, tmp_path / "mean")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").eval()(ids).logits
    torch.testing.assert_close(found, expected[0])


def test_two_models_are_in_memory(tmp_path, monkeypatch):
    """No earlier checkpoint is alive when the next one is loaded."""
    folders = [saved(tmp_path / f"{seed}", tiny_llama(seed)) for seed in range(4)]
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def load(name: str, **options: str) -> torch.nn.Module:
        gc.collect()  # a module is part of cycles of references
        assert not any(model() for model in loaded)
        model = load_language_model(name, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(averaging, "load_language_model", load)
    average_checkpoints(folders, tmp_path / "mean")
    assert len(loaded) == 4


def test_what_is_no_average_is_refused(tmp_path):
    one, other = (saved(tmp_path / f"{seed}", tiny_llama(seed)) for seed in range(2))
    wide = saved(tmp_path / "wide", tiny_llama(2, intermediate_size=96))
    deep = saved(tmp_path / "deep", tiny_llama(3, num_hidden_layers=3))
    heads = saved(tmp_path / "heads", tiny_llama(5, num_attention_heads=2, num_key_value_heads=1))
    norms = saved(tmp_path / "norms", tiny_llama(6, rms_norm_eps=1e-2))
    spoilt = tiny_llama(4)
    with torch.no_grad():
        spoilt.lm_head.weight[3, 3] = float("nan")
    out = tmp_path / "mean"
    for folders, kind, said in (
        ([one], InvalidArgumentError, "at least two checkpoints, found 1"),
        ([one, other, one], InvalidArgumentError, "have the same weights"),
        ([one, wide], InvalidArgumentError, r"down_proj.weight: shape \(32, 64\) .* \(32, 96\)"),
        ([one, deep], InvalidArgumentError, "weight .*layers.2.*: missing in"),
        (
            [one, heads],
            InvalidArgumentError,
            r"config.json has (head_dim|num_\w+) \d+ in .* and \d+ in",
        ),
        (
            [one, norms],
            InvalidArgumentError,
            r"config.json has rms_norm_eps 1e-06 in .* and 0.01 in",
        ),
        ([one, tmp_path / "none"], SparseLogitsError, "none"),
        ([one, saved(tmp_path / "nan", spoilt)], TeacherError, "not finite"),
    ):
        with pytest.raises(kind, match=said):
            average_checkpoints(folders, out)
        assert not out.exists()
    with pytest.raises(TeacherError, match="unknown dtype 'int4'"):
        average_checkpoints([one, other], out, dtype="int4")
    out.mkdir()
    (out / "file").write_text("kept")
    with pytest.raises(SparseLogitsError, match="mean"):
        average_checkpoints([one, other], out)
    assert (out / "file").read_text() == "kept"
