"""Test that a trained folder converts to GGUF, and llama.cpp answers like transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparselogits.teacher.loading import load_tokenizer
from sparselogits.train.saving import save_student

PROGRAMS = Path(sys.prefix) / "llama.cpp"
"""Folder in which `make test` installs the programs; the converter includes a gguf package."""
PROMPTS = ["The with statement", "A class definition is", "def f(x):\n    return"]
ANSWER = """
import json, sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.warmup = sys.argv[1], 128, False
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
texts = []
for prompt in json.loads(sys.argv[2]):
    found = server.handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0.0})
    found = json.loads(found) if isinstance(found, (str, bytes)) else found
    texts.append(found["choices"][0]["text"])
print("ANSWERS" + json.dumps(texts))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAMS.is_dir(), reason="make test installs converter and llama.cpp")
def test_llama_cpp_answers_as_transformers(tmp_path):
    tokenizer = load_tokenizer("demo")  # the converter knows tokenizers by their names
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    save_student(model, tmp_path, tokenizer=tokenizer, dtype=torch.bfloat16, card="")
    programs = os.environ | {"PYTHONPATH": str(PROGRAMS)}
    converter = PROGRAMS / "convert_hf_to_gguf.py"
    file = tmp_path / "student.gguf"
    subprocess.run(
        [sys.executable, converter, tmp_path / "model", "--outfile", file, "--outtype", "f32"],
        env=programs,
        check=True,
        capture_output=True,
    )
    ran = subprocess.run(
        [sys.executable, "-c", ANSWER, file, json.dumps(PROMPTS)],
        env=programs,
        check=True,
        capture_output=True,
        text=True,
    )
    answers = json.loads(ran.stdout.rpartition("ANSWERS")[2])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = []
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt")
        made = student.generate(**ids, max_new_tokens=8, do_sample=False)
        expected.append(words.decode(made[0, ids.input_ids.shape[1] :]))
    assert answers == expected
    assert len(set(answers)) == len(PROMPTS)
