"""Test pruned students: the parts with the lowest scores are removed, and nothing else changes.

Useless parts are planted in random models by setting weights to zero; a student without exactly
those parts must give the teacher's logits.
"""

import json
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from sparselogits.errors import InvalidArgumentError, ShrinkError
from sparselogits.lab.tasks import write_tasks
from sparselogits.shrink import layer_influence, layer_losses, shrink
from sparselogits.shrink.layout import layout_of, sizes_of
from tests.conftest import run_python, tiny_llama, write_lines

V = 97
COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE_HEADS = COMMON | {"head_dim": 16}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON | {"tie_word_embeddings": True}),
    "llama with biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        COMMON
        | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
        | {"num_key_value_heads": 4},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE_HEADS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", WIDE_HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", WIDE_HEADS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", WIDE_HEADS),
    "mistral": ("MistralForCausalLM", "MistralConfig", COMMON),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", COMMON),
    "phi3, fused rows": ("Phi3ForCausalLM", "Phi3Config", COMMON),
    "granite": ("GraniteForCausalLM", "GraniteConfig", COMMON),
}
OUTPUTS = ("o_proj", "down_proj")
"""Projections whose outputs are added to the residual stream."""


def model_of(name: str) -> nn.Module:
    kind, configuration, settings = ARCHITECTURES[name]
    torch.manual_seed(1)
    config = getattr(transformers, configuration)(**settings)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tokens(rows: int = 3, length: int = 24) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(0))


def outputs_of(model: nn.Module, kind: str) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if name.endswith(kind)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def assert_same_logits(student: nn.Module, teacher: nn.Module) -> None:
    expected = logits(teacher)
    # the epsilon of a normalisation weighs a little more over fewer channels
    atol = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_planted_useless_parts_are_removed_and_logits_do_not_change(name):
    teacher = model_of(name)
    useless_channels = [torch.arange(layer, 48, 4) for layer in range(3)]
    useless_hidden = torch.tensor([1, 5, 8, 30])
    groups = teacher.config.num_key_value_heads
    with torch.no_grad():
        for block, module in enumerate(outputs_of(teacher, "o_proj")):
            own = module.weight.unflatten(1, (groups, -1))
            own[:, block % groups] = 0  # one group of heads adds nothing
        for block, module in enumerate(outputs_of(teacher, "down_proj")):
            module.weight[:, useless_channels[block]] = 0
        for kind in OUTPUTS:
            for module in outputs_of(teacher, kind):
                module.weight[useless_hidden] = 0
                if module.bias is not None:
                    module.bias[useless_hidden] = 0
        teacher.get_input_embeddings().weight[:, useless_hidden] = 0
        outputs_of(teacher, "o_proj")[1].weight.zero_()  # the second block adds nothing at all
        outputs_of(teacher, "down_proj")[1].weight.zero_()
        for kind in OUTPUTS:
            if outputs_of(teacher, kind)[1].bias is not None:
                outputs_of(teacher, kind)[1].bias.zero_()
    before = logits(teacher)
    made = shrink(
        teacher, layers=2, channels=36, heads=4 - 4 // groups, hidden=28, windows=tokens()
    )
    torch.testing.assert_close(logits(teacher), before, rtol=0, atol=0)  # left as it was
    assert made.dropped_layers == (1,)
    assert made.model.config.num_hidden_layers == 2
    assert made.model.config.intermediate_size == 36
    assert made.model.config.hidden_size == 28
    assert made.model.config.num_attention_heads == 4 - 4 // groups
    assert made.parameters_after < made.parameters_before
    assert_same_logits(made.model, teacher)


def test_gpt2_is_pruned_in_depth_channels_and_coupled_width():
    teacher = gpt2()
    with torch.no_grad():
        for block in teacher.transformer.h:
            block.mlp.c_proj.weight[::4] = 0
            block.attn.c_proj.weight[8:16] = 0  # the second head
        teacher.transformer.h[2].attn.c_proj.weight.zero_()
        teacher.transformer.h[2].mlp.c_proj.weight.zero_()
    made = shrink(teacher, layers=2, channels=96, windows=tokens())
    assert made.dropped_layers == (2,)
    assert_same_logits(made.model, teacher)
    narrow = shrink(teacher, heads=3, windows=tokens()).model
    assert (narrow.config.n_head, narrow.config.n_embd) == (3, 24)
    assert narrow.transformer.h[0].attn.c_attn.weight.shape == (24, 72)
    # which channels of the residual stream stay, seen on the position embedding
    kept = [
        int((teacher.transformer.wpe.weight == column[:, None]).all(0).nonzero())
        for column in narrow.transformer.wpe.weight.T
    ]
    rows = [*range(8), *range(16, 32)]
    torch.testing.assert_close(
        narrow.transformer.h[0].attn.c_proj.weight,
        teacher.transformer.h[0].attn.c_proj.weight[rows][:, kept],
    )
    with pytest.raises(ShrinkError, match="heads \\* 8"):
        shrink(teacher, heads=2, hidden=24, windows=tokens())


def test_block_influence_and_losses_equal_their_definitions():
    model, layout = model_of("llama"), layout_of(model_of("llama"))
    states = model.model(tokens(), output_hidden_states=True).hidden_states
    # the last of transformers' hidden states is normalised: compare the blocks before it
    expected = [
        float((1 - F.cosine_similarity(before, after, dim=-1)).mean())
        for before, after in pairwise(states[:-1])
    ]
    found = layer_influence(model, layout, tokens())
    assert found[:2] == pytest.approx(expected, abs=1e-5)
    losses = layer_losses(model, layout, tokens())
    for dropped, loss in enumerate(losses):
        student = shrink(model, drop_layers=(dropped,)).model
        out = student(input_ids=tokens(), labels=tokens()).loss
        assert loss == pytest.approx(float(out), abs=1e-4)


def test_tied_embeddings_stay_tied_and_lists_per_block_are_shortened():
    teacher = model_of("gemma3")
    student = shrink(teacher, drop_layers=(0,), hidden=24, windows=tokens()).model
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()
    assert student.config.layer_types == teacher.config.layer_types[1:]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "nothing to prune"),
        ({"drop_layers": ()}, "nothing to prune"),
        ({"layers": 4}, "from 1 to the teacher's 3"),
        ({"layers": 2, "drop_layers": (1,)}, "give only one of them"),
        ({"drop_layers": (3,)}, "from 0 to 2"),
        ({"drop_layers": (0, 1, 2)}, "fewer than 3 distinct indices"),
        ({"heads": 3}, "a multiple of 2"),
    ],
)
def test_sizes_the_model_cannot_have_are_refused(wanted, message):
    with pytest.raises(ShrinkError, match=message):
        shrink(model_of("llama"), windows=tokens(), **wanted)


def test_calibration_windows_are_asked_for():
    with pytest.raises(InvalidArgumentError, match="calibration windows"):
        shrink(model_of("llama"), layers=2)


def test_a_score_that_does_not_exist_is_refused():
    with pytest.raises(InvalidArgumentError, match="layer_score='foo'; give influence, loss or"):
        shrink(model_of("llama"), layers=2, windows=tokens(), layer_score="foo")


def test_a_size_per_layer_is_refused_by_name():
    config = transformers.Gemma3nTextConfig(
        intermediate_size=[16, 24], num_hidden_layers=2, num_kv_shared_layers=0
    )
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(config)
    with pytest.raises(ShrinkError, match=r"Gemma3nForCausalLM: .*one size for all layers"):
        sizes_of(model)


@pytest.mark.parametrize(
    ("kind", "configuration", "settings", "wanted"),
    [
        # normalises queries over all heads at once
        ("Olmo2ForCausalLM", "Olmo2Config", COMMON, {"heads": 2}),
        # experts have no output projection of their own
        ("MixtralForCausalLM", "MixtralConfig", COMMON | {"num_local_experts": 2}, {"channels": 8}),
        # the width of a head is the hidden size over the number of heads
        (
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            {k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
            {"heads": 2},
        ),
    ],
)
def test_a_structure_that_is_not_understood_is_refused_by_name(
    kind, configuration, settings, wanted
):
    model = getattr(transformers, kind)(getattr(transformers, configuration)(**settings))
    with pytest.raises(ShrinkError, match=kind):
        shrink(model, windows=tokens(), **wanted)
    assert shrink(model, layers=2, windows=tokens()).model.config.num_hidden_layers == 2


def test_command_writes_a_folder_that_loads_and_generates(teacher_folder, text, tmp_path):
    out = tmp_path / "student"
    options = "--layers 1 --intermediate-size 48 --windows 4 --window 32 --device cpu --json"
    words = ["shrink", teacher_folder, "--data", text, "--out", out, *shlex.split(options)]
    done = run_python("-m", "sparselogits", *words, check=True)
    facts = json.loads(done.stdout)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert model.config.num_hidden_layers == facts["after"]["layers"] == 1
    assert model.config.intermediate_size == 48
    made = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4)
    assert made.shape[1] > 1
    dropped = facts["dropped_layers"]
    assert f"counted from 0: {dropped[0]}" in (out / "README.md").read_text()
    kept = 1 - dropped[0]
    torch.testing.assert_close(
        model.model.layers[0].self_attn.q_proj.weight,
        tiny_llama().model.layers[kept].self_attn.q_proj.weight,
    )


def test_rows_of_token_ids_are_calibration_text(teacher_folder, tokenizer, text, line, tmp_path):
    """Rows are joined, so rows of whole documents give the student of their text."""
    texts = [json.loads(each)["text"] for each in text.open()]
    separator = tokenizer.eos_token_id
    ids = [tokenizer(each)["input_ids"] + [separator] for each in texts]
    rows = write_lines(
        tmp_path / "rows.jsonl",
        ({"input_ids": own, "seq_lengths": [1, len(own) - 1]} for own in ids),
    )
    options = shlex.split("--intermediate-size 48 --windows 4 --window 32 --device cpu")
    given = ["shrink", teacher_folder, *options]
    assert line(*given, "--data", text, "--out", tmp_path / "a").code == 0
    done = line(
        *(*given, "--data", rows, "--tokenized-by", teacher_folder, "--out", tmp_path / "b")
    )
    assert done.code == 0, done.err
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    refused = line(*given, "--data", rows, "--out", tmp_path / "c")
    assert refused.code != 0
    assert "--tokenized-by" in refused.err
    of_cache = ("--cache", tmp_path / "cache", "--tokenized-by", teacher_folder)
    refused = line(*given, *of_cache, "--out", tmp_path / "c")
    assert refused.code != 0
    assert "--tokenized-by and --window can only be used with --data" in refused.err


def test_lm_eval_loads_and_scores_a_shrunk_folder(teacher_folder, tmp_path):
    """By lm-eval's own loader, from the folder alone, as `lm_eval --model hf` does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    out, data = tmp_path / "student", tmp_path / "data"
    command = [sys.executable, "-m", "sparselogits", "shrink", str(teacher_folder)]
    command += ["--drop-layers", "0", "--out", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    write_tasks(data, ["agreement"], count=12)
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data / "agreement.jsonl")},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(
        "hf",
        {"pretrained": str(out), "device": "cpu", "batch_size": 4},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    student = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    hits = []
    for line in (data / "agreement.jsonl").read_text().splitlines():
        pair = json.loads(line)
        scores = []
        for text in (pair["good"], pair["bad"]):
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
            with torch.no_grad():
                log_s = student(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(float(log_s.gather(1, ids[0, 1:, None]).sum()))
        hits.append(scores[0] > scores[1])
    assert found["results"]["pairs"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
