"""Test the example that continues a cache-trained student on its own samples with TRL."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparselogits.teacher.loading import load_language_model, load_tokenizer
from sparselogits.train import run
from sparselogits.train.recipe import parse_recipe
from tests.conftest import documents, write_lines

EXAMPLE = Path(__file__).parents[2] / "examples" / "on_policy.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def student(tmp_path_factory, cache, teacher_folder) -> Path:
    """A student that was trained from the cache, as a folder."""
    recipe = {"cache": str(cache), "out": str(tmp_path_factory.mktemp("run")), "seed": 3}
    recipe |= {"student": {"config": str(teacher_folder)}, "max_steps": 4}
    return run(parse_recipe(recipe, source="test"), device="cpu").model_path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(page[:24].replace("\n", " ") + "\n" for page in documents()))
    return file


@torch.no_grad()
def reverse_kl(student: nn.Module, teacher: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """KL(student || teacher) at every position [B, L], in float64."""
    own, other = (
        model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
        for model in (student, teacher)
    )
    return (own.exp() * (own - other)).sum(-1)


def on_own_text(student: nn.Module, teacher: nn.Module, prompts: list[list[int]]) -> float:
    """Mean reverse KL over what the student writes after prompts of one length."""
    torch.manual_seed(7)
    given = torch.tensor(prompts)
    ids = student.generate(given, do_sample=True, top_k=0, max_new_tokens=24, pad_token_id=0)
    assert ids.shape[1] > given.shape[1]
    kl = reverse_kl(student, teacher, ids, torch.ones_like(ids))
    return float(kl[:, given.shape[1] - 1 : -1].mean())


def test_a_cache_trained_student_comes_closer_to_its_teacher_on_its_own_text(
    tmp_path, example, student, teacher_folder, prompts, monkeypatch, capsys
):
    out = tmp_path / "out"
    given = ["--student", student, "--teacher", teacher_folder, "--prompts", prompts, "--out", out]
    given += ["--steps", "24", "--learning-rate", "5e-3", "--completion", "24"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, given)])
    example["main"]()
    assert f"sparselogits eval {out}" in capsys.readouterr().out
    teacher = load_language_model(str(teacher_folder), dtype="float32")
    tokenizer = load_tokenizer(str(out))
    tokens = [tokenizer.encode(page[60:])[:8] for page in documents()]
    before, after = (
        on_own_text(load_language_model(str(folder), dtype="float32"), teacher, tokens)
        for folder in (student, out)
    )
    assert after < 0.9 * before


def test_the_loss_is_the_reverse_kl_of_what_the_student_wrote(
    tmp_path, example, student, teacher_folder, prompts
):
    model, teacher = (
        load_language_model(str(folder), dtype="float32") for folder in (student, teacher_folder)
    )
    tokenizer = load_tokenizer(str(student))
    trainer = example["make_trainer"](
        model,
        teacher,
        tokenizer,
        example["read_prompts"](prompts),
        tmp_path,
        max_steps=1,
        learning_rate=0.0,
        max_completion_length=12,
        logging_steps=1,
    )
    batches = []
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda given: batches.append(prepare(given)) or batches[-1]
    trainer.train()
    (batch,) = batches
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    known = [tokenizer.encode(line) for line in prompts.read_text().splitlines()]
    for row, own in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
        assert row[own.bool()].tolist() in known
    first = batch["prompt_ids"].shape[1]
    kl = reverse_kl(model, teacher, ids, mask)[:, first - 1 : -1]
    wanted = float((kl * batch["completion_mask"]).sum() / batch["completion_mask"].sum())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_prompts_are_text_or_messages_and_have_to_fill_a_batch(tmp_path, example):
    said = [{"role": "user", "content": "Go on."}]
    file = write_lines(tmp_path / "prompts.jsonl", ({"prompt": said, "id": i} for i in range(3)))
    rows = example["read_prompts"](file)
    assert rows[:] == {"prompt": [said] * 3}
    with pytest.raises(SystemExit, match="found 3 prompts, expected at least one batch of 8"):
        example["make_trainer"](None, None, None, rows, tmp_path)
