"""Test that other programs load the folder of a trained student."""

import errno
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from sparselogits.data import CacheDataset
from sparselogits.errors import (
    IdentityMismatchError,
    InvalidTargetsError,
    RecipeError,
    SparseLogitsWarning,
    StorageError,
    TeacherError,
    TrainingError,
)
from sparselogits.locks import lock_file
from sparselogits.teacher.loading import keep_tokenizer
from sparselogits.train import PlannedRun, RunResult, run
from sparselogits.train.recipe import parse_recipe, with_old_names
from tests.conftest import tiny_llama
from tests.data.test_mixture import make_cache

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
SMALL = {"hidden_size": 16, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def kept(cache, tokenizer, tmp_path_factory) -> Path:
    """A copy of the cache whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("kept") / "cache"
    shutil.copytree(cache, folder)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.copytree(cache / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(CHAT)
    return folder


def recipe(cache: Path, out: Path, **changes: Any) -> Any:
    values = {"cache": cache, "out": out, "student": SMALL, "logging_steps": 1, "max_steps": 2}
    values["per_device_train_batch_size"] = 16
    return parse_recipe(values | changes, source="test")


@pytest.fixture(scope="module")
def trained(kept, tmp_path_factory) -> RunResult:
    return run(recipe(kept, tmp_path_factory.mktemp("trained") / "run"), device="cpu")


def test_tokenizer_template_and_generation(trained, tokenizer):
    folder = trained.model_path
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "The with statement"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == CHAT
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache
    assert model.config.architectures == ["LlamaForCausalLM"]
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == loaded.eos_token_id == model.config.eos_token_id
    assert {p.name for p in folder.iterdir()} >= {"README.md", "generation_config.json"}


def test_a_pipeline_generates(trained):
    generate = pipeline("text-generation", str(trained.model_path))
    (found,) = generate("The with statement", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("The with statement")
    chat = [{"role": "user", "content": "hello"}]
    (answer,) = generate(chat, max_new_tokens=4, do_sample=False)
    assert answer["generated_text"][-1]["role"] == "assistant"


def test_lm_eval_loads_it(trained):
    """As `lm-eval --model hf --model_args pretrained=FOLDER` does."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(trained.model_path), device="cpu", batch_size=2)
    pairs = [("The with", " statement"), ("A", " class is")]
    requests = [Instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    own = AutoModelForCausalLM.from_pretrained(trained.model_path)
    words = AutoTokenizer.from_pretrained(trained.model_path)
    for (context, continuation), (loglikelihood, _) in zip(pairs, found, strict=True):
        first, ids = words(context).input_ids, words(context + continuation).input_ids
        with torch.no_grad():
            scores = own(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(scores[i - 1, ids[i]]) for i in range(len(first), len(ids)))
        assert loglikelihood == pytest.approx(expected, rel=1e-4)


def test_the_card_says_what_it_is_made_from(trained, kept):
    card = (trained.model_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    identity = CacheDataset(kept).identity
    for said in (identity.fingerprint, identity.teacher["name"], "last training loss", "max_steps"):
        assert said in body
    given = body.split("```yaml\n")[1].split("```")[0]
    read = parse_recipe(yaml.safe_load(given), source="the card")
    assert read.student.hidden_size == 16


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_is_as_asked(kept, tmp_path, tokenizer, stored, asked, expected):
    tiny_llama(seed=4, tie_word_embeddings=True).to(stored).save_pretrained(tmp_path / "base")
    student = {"path": str(tmp_path / "base")}
    found = run(recipe(kept, tmp_path / "run", student=student, save_dtype=asked), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(found.model_path)
    assert model.dtype == expected
    assert AutoTokenizer.from_pretrained(found.model_path).chat_template == CHAT


def test_an_adapter_is_merged_and_kept(kept, tmp_path, teacher_folder):
    from peft import AutoPeftModelForCausalLM

    planned: list[PlannedRun] = []
    student = {"path": str(teacher_folder), "lora": {"rank": 2}}
    found = run(
        recipe(kept, tmp_path / "run", student=student), device="cpu", announce=planned.append
    )
    assert planned[0].trained < planned[0].parameters / 4
    assert planned[0].learning_rate == 2e-4
    merged = AutoModelForCausalLM.from_pretrained(found.model_path).eval()
    apart = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(teacher_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = apart(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(base(ids).logits, expected)
    wrong = {"path": str(teacher_folder), "lora": {"targets": ["nowhere"]}}
    with pytest.raises(RecipeError, match=r"student\.lora"):
        run(recipe(kept, tmp_path / "other", student=wrong), device="cpu")


def test_what_is_planned_is_said_first(kept, tmp_path):
    planned: list[PlannedRun] = []
    mine = recipe(kept, tmp_path / "run", alpha=0.25, max_steps=-1)
    result = run(mine, device="cpu", announce=planned.append)
    (plan,) = planned
    assert plan.steps == result.steps
    assert plan.tokens == result.steps * 16 * 32
    model = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert plan.parameters == plan.trained == sum(p.numel() for p in model.parameters())
    assert plan.loss == (
        "0.75 x cross-entropy to the cached targets + 0.25 x cross-entropy to the labels"
    )
    assert plan.learning_rate == 1e-3


def test_a_student_of_another_architecture(kept, tmp_path):
    from transformers import GPT2Config

    config = tmp_path / "config.json"
    GPT2Config(vocab_size=520, n_embd=16, n_layer=1, n_head=2, n_positions=64).save_pretrained(
        tmp_path
    )
    found = run(recipe(kept, tmp_path / "run", student={"config": str(config)}), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(found.model_path)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert model.config.eos_token_id == 0
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": 10**6}))
    with pytest.raises(RecipeError, match="1,000,000 layers"):
        run(recipe(kept, tmp_path / "deep", student={"config": str(config)}), device="cpu")
    config.write_text("{}")
    with pytest.raises(RecipeError, match="not the configuration of a transformers model"):
        run(recipe(kept, tmp_path / "none", student={"config": str(config)}), device="cpu")


def test_tokenizers_that_are_missing_or_others(cache, kept, tmp_path, teacher_folder):
    bare = tmp_path / "cache"
    shutil.copytree(kept, bare)
    shutil.rmtree(bare / "tokenizer")
    with pytest.warns(SparseLogitsWarning, match="--tokenizer"):
        run(recipe(bare, tmp_path / "without"), device="cpu")
    named = run(recipe(bare, tmp_path / "named", tokenizer=str(teacher_folder)), device="cpu")
    assert (named.model_path / "tokenizer.json").exists()
    more = AutoTokenizer.from_pretrained(teacher_folder)
    more.add_tokens(["another"])
    keep_tokenizer(more, tmp_path / "more")
    name = str(tmp_path / "more" / "tokenizer")
    with pytest.warns(
        SparseLogitsWarning, match=r"the recipe's tokenizer .* 1 added token .* here"
    ):
        longer = run(recipe(bare, tmp_path / "longer", tokenizer=name), device="cpu")
    assert "another" in AutoTokenizer.from_pretrained(longer.model_path).get_vocab()
    state = json.loads(more.backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    keep_tokenizer(other, tmp_path / "other")
    name = str(tmp_path / "other" / "tokenizer")
    with pytest.raises(IdentityMismatchError, match=r"the recipe's tokenizer .* other tokens"):
        run(recipe(bare, tmp_path / "no", tokenizer=name), device="cpu")
    assert not (tmp_path / "no" / "recipe.json").exists()
    with pytest.raises(TeacherError, match="contains no model"):
        run(recipe(bare, tmp_path / "no", tokenizer=str(tmp_path)), device="cpu")


def test_logs_are_kept_and_held_out_text_is_evaluated(kept, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    further = {"eval_strategy": "steps", "eval_steps": 1, "optim": "adafactor"}
    out = tmp_path / "run"
    run(recipe(kept, out, report_to=["tensorboard"], save_steps=1, **further), device="cpu")
    events = EventAccumulator(str(next((out / "logs").rglob("events.*"))))
    events.Reload()
    assert {"train/loss", "train/kd", "train/kl", "eval/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("eval/loss")) == 2
    assert not (out / "checkpoints").exists()
    assert "held-out loss" in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"lr_scheduler_type": "nope"}, "rejects these settings"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"dataloader_prefetch_factor": 3}, "rejects these settings"),
    ],
)
def test_settings_of_the_trainer_that_cannot_be(kept, tmp_path, further, said):
    with pytest.raises(RecipeError, match=said):
        run(recipe(kept, tmp_path / "run", **further), device="cpu")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_run_of_the_names_before_is_recognised(kept, tmp_path):
    """Finished or not; a setting that differs is named as it is called now."""
    mine = recipe(kept, tmp_path / "run", bf16=False)
    assert run(mine, device="cpu").fresh
    file = tmp_path / "run" / "recipe.json"
    new = json.loads(file.read_text())
    old = with_old_names(new)
    old["trainer"] = {"max_steps": old.pop("max_steps")}
    assert {"epochs", "batch_windows", "accumulate", "warmup", "precision", "log_steps"} <= set(old)
    file.write_text(json.dumps(old))
    assert not run(mine, device="cpu").fresh
    for change in ({"max_steps": 3}, {"num_train_epochs": 2}, {"bf16": True}):
        with pytest.raises(RecipeError, match=rf"different: {next(iter(change))}\)"):
            run(recipe(kept, tmp_path / "run", **change), device="cpu")
    (tmp_path / "run" / "run.json").unlink()
    assert run(mine, device="cpu").fresh


def test_a_moved_cache_and_run_are_recognised(kept, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(kept, here)
    first = run(recipe(here, tmp_path / "run"), device="cpu")
    here.rename(there)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert not run(recipe(there, tmp_path / "moved"), device="cpu").fresh
    shutil.rmtree(there / "shards")
    assert not run(recipe(here, tmp_path / "moved"), device="cpu").fresh  # gone, but finished
    assert first.steps == 2


def test_another_cache_at_the_same_path_is_refused(kept, answers, tmp_path):
    place = tmp_path / "cache"
    shutil.copytree(kept, place)
    run(recipe(place, tmp_path / "run"), device="cpu")
    shutil.rmtree(place)
    shutil.copytree(answers[1.0], place)
    with pytest.raises(RecipeError, match="different: cache"):
        run(recipe(place, tmp_path / "run"), device="cpu")


def test_an_invalid_student_leaves_no_folder(tmp_path):
    root = make_cache(tmp_path / "cache", 0)
    tiny_llama(vocab_size=4).save_pretrained(tmp_path / "student")
    changes = {"student": {"path": str(tmp_path / "student")}, "per_device_train_batch_size": 2}
    with (
        pytest.warns(SparseLogitsWarning, match="no tokenizer will be saved"),
        pytest.raises(InvalidTargetsError, match="student"),
    ):
        run(recipe(root, tmp_path / "run", **changes), device="cpu")
    assert not (tmp_path / "run").exists()


def _hold(path: Path, ready: Any, release: Any) -> None:
    with lock_file(path):
        ready.set()
        release.wait(60)


def test_a_second_run_in_one_folder_is_refused(kept, tmp_path):
    """Held by a process; a dead one holds nothing."""
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    out = tmp_path / "run"
    holder = context.Process(target=_hold, args=(out / ".training", ready, release))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(TrainingError, match="another process is training in"):
        run(recipe(kept, out), device="cpu")
    assert not (out / "recipe.json").exists()
    holder.kill()
    holder.join()
    assert run(recipe(kept, out), device="cpu").fresh


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left on device"), "rust"])
def test_a_full_disk_is_said_and_nothing_is_lost(kept, tmp_path, monkeypatch, full):
    """What libraries raise when they save; the same command finishes once there is room."""
    from transformers import LlamaForCausalLM

    out, wanted = tmp_path / "run", {"save_steps": 1}
    error = RuntimeError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise error if full == "rust" else full

        patch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        with pytest.raises(StorageError, match="Free space"):
            run(recipe(kept, out, **wanted), device="cpu")
    assert not (out / "model").exists()
    assert run(recipe(kept, out, **wanted), device="cpu").fresh
    assert not list(out.glob(".tmp*"))


def test_a_student_with_nan_is_refused(kept, tmp_path, tokenizer):
    from sparselogits.cli.models import load_student

    model = tiny_llama(seed=4)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(TeacherError, match=r"not finite .* model\.norm\.weight"):
        load_student(str(tmp_path / "student"), "cpu")
    student = {"path": str(tmp_path / "student")}
    with pytest.raises(TeacherError, match="not finite"):
        run(recipe(kept, tmp_path / "run", student=student), device="cpu")


@pytest.mark.filterwarnings("ignore::sparselogits.errors.SparseLogitsWarning")
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["head adapted", "embedding adapted", "head saved", "both saved"],
)
def test_an_adapter_of_a_tied_model_is_merged_right(kept, tmp_path, adapter):
    """Merged into the one weight of both, embedding and head would change together."""
    from peft import LoraConfig, get_peft_model

    from sparselogits.train.saving import save_student
    from tests.train.test_trainer import trainer_of

    tiny_llama(seed=4, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **adapter))
    data = CacheDataset(kept)
    trainer_of(data, tmp_path, student, max_steps=3).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    student.eval()
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        save_student(student, tmp_path, tokenizer=None, dtype=torch.float32, card="")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_adapter_goes_on_bit_for_bit(kept, tmp_path, teacher_folder):
    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, line: dict[str, float]) -> None:
        if done == 3:
            raise StoppedError

    student = {"path": str(teacher_folder), "lora": {"rank": 2}}
    changes = {"student": student, "save_steps": 2, "max_steps": 4}
    whole = run(recipe(kept, tmp_path / "whole", **changes), device="cpu")
    with pytest.raises(StoppedError):
        run(recipe(kept, tmp_path / "broken", **changes), device="cpu", progress=stop)
    found = run(recipe(kept, tmp_path / "broken", **changes), device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(whole.model_path).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(found.model_path).state_dict().items():
        assert torch.equal(value, expected[name]), name
