"""Conversations: the template's own text, of which the assistant's turns are learnt.

pytest tests/corpus/test_corpus_chat.py
"""

from __future__ import annotations

import json
import pickle
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trained_tokenizers import END, train_byte_level
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import Packing, open_source, pack, packing_for
from sparselogits.corpus.chat import ChatTemplate
from sparselogits.errors import CorpusError, IdentityMismatchError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOUTING = CHATML.replace("message.content", "message.content | upper")
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last or message.role != 'assistant' %}{{ message.content }}{% endif %}",
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a window?"},
    {"role": "assistant", "content": "A run of tokens."},
    {"role": "user", "content": "How long?"},
    {"role": "assistant", "content": "As long as you say."},
]
TRL = find_spec("trl")  # which brings the templates of many models; importing it is slow
assert TRL is not None
assert TRL.origin is not None
TEMPLATES = Path(TRL.origin).parent / "chat_templates"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=train_byte_level(), eos_token=END)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def template(text: str, implied: str = "") -> ChatTemplate:
    tokens = (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"))
    return ChatTemplate(text, tokens, implied)


def learnt_text(tokenizer: Any, corpus: Any) -> str:
    """What the windows of a corpus ask for, position after position."""
    ids: list[int] = []
    for window in corpus.read(0, corpus.windows):
        ids += window.tokens[np.flatnonzero(window.mask) + 1].tolist()
    return str(tokenizer.decode(ids))


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_turn_of_the_assistant_is_learnt(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = written(tmp_path / f"talk.{suffix}", [{"messages": TALK}] * 20)
    packing = packing_for(tokenizer, window_length=400)
    source = open_source(path, completion_only=True)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=len(tokenizer))
    first = corpus.read(0, 1)[0]
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    whole = tokenizer.encode(rendered, add_special_tokens=False)
    assert first.tokens[: len(whole)].tolist() == whole
    assert first.tokens[len(whole)] == packing.separator_id
    read = source.read_by(tokenizer)
    assert pickle.loads(pickle.dumps(read)) == read  # for the processes that tokenise
    said = f"A run of tokens.<|im_end|>\nAs long as you say.<|im_end|>\n{END}"
    assert learnt_text(tokenizer, corpus).startswith(said * 2)


def test_messages_as_prompt_and_completion_are_read_alike(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": TALK[:4], "completion": TALK[4:]}] * 20
    path = written(tmp_path / "talk.jsonl", records)
    source = open_source(path, completion_only=True)
    packing = packing_for(tokenizer, window_length=200)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=len(tokenizer))
    said = f"As long as you say.<|im_end|>\n{END}"
    assert learnt_text(tokenizer, corpus).startswith(said * 2)
    # all of it is learnt where that is not asked for
    source = open_source(path)
    corpus = pack(source, tokenizer, packing, tmp_path / "all", vocab_size=len(tokenizer))
    assert corpus.read(0, 1)[0].mask is None


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "cohere"]
)
def test_published_templates(name: str) -> None:
    """The parts are the template's text, and each turn's end belongs to what is learnt."""
    talk = TALK[1:] if name.startswith("gemma") else TALK
    chat = template((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    parts = chat.parts(talk)
    assert "".join(text for text, _ in parts) == chat._render(talk)
    said = [text for text, learnt in parts if learnt]
    for text, turn in zip(said, (TALK[2], TALK[4]), strict=True):
        assert turn["content"] in text
        assert text.strip() != turn["content"]  # with the end of the turn
        assert "How long?" not in text


def test_a_beginning_of_text_is_not_written_twice() -> None:
    text = "{{ bos_token }}" + CHATML
    assert template(text, implied="<s>").parts(TALK)[0][0].startswith("<|im_start|>system")
    assert template(text).parts(TALK)[0][0].startswith("<s><|im_start|>system")


def test_a_template_with_the_date_writes_the_same_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = (TEMPLATES / "llama3_2.jinja").read_text(encoding="utf-8")
    try:
        chat = ChatTemplate.of(tokenizer)
        today = tokenizer.apply_chat_template(TALK, tokenize=False)
    finally:
        tokenizer.chat_template = CHATML
    assert chat is not None
    text = "".join(part for part, _ in chat.parts(TALK))
    assert "Today Date: 26 Jul 2024\n" in text
    dated = r"Today Date: .*\n"
    assert re.sub(dated, "", text) == re.sub(dated, "", today)


def test_another_template_is_another_corpus(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}] * 20)
    source, out = open_source(path, completion_only=True), tmp_path / "out"
    pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))
    tokenizer.chat_template = SHOUTING
    try:
        with pytest.raises(IdentityMismatchError, match=r"source\.chat_template"):
            pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))
    finally:
        tokenizer.chat_template = CHATML
    pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))


MISTAKES = {
    "forgetful template": (FORGETFUL, {"messages": TALK}, "does not keep what it wrote"),
    "no template": (None, {"messages": TALK}, "give a tokenizer that has a chat template"),
    "template that refuses": (
        "{{ raise_exception('no system turns here') }}",
        {"messages": TALK},
        "no system turns here",
    ),
    "text": (CHATML, {"messages": "hello"}, "holds no messages"),
    "strings": (CHATML, {"messages": ["hello"]}, "holds no messages"),
    "half text": (
        CHATML,
        {"prompt": TALK[:4], "completion": "x"},
        "`completion` holds no messages",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_goes_wrong_names_the_record(tmp_path: Path, tokenizer: Any, mistake: str) -> None:
    text, record, said = MISTAKES[mistake]
    first = {"messages": TALK[:3]} if mistake not in ("no template",) else record
    path = written(tmp_path / "talk.jsonl", [first, record])
    tokenizer.chat_template = text
    try:
        with pytest.raises(CorpusError, match=said) as found:
            pack(
                open_source(path, completion_only=True),
                tokenizer,
                Packing(8, 0, None),
                tmp_path / "out",
                vocab_size=len(tokenizer),
            )
    finally:
        tokenizer.chat_template = CHATML
    assert "talk.jsonl, line " in str(found.value)


def test_the_end_after_a_question_is_not_learnt(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK[:4]}] * 20)
    source = open_source(path, completion_only=True)
    packing = packing_for(tokenizer, window_length=200)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=len(tokenizer))
    assert learnt_text(tokenizer, corpus).startswith("A run of tokens.<|im_end|>\n" * 2)


def test_a_conversation_without_an_answer_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": []}, {"messages": None}]
    path = written(tmp_path / "talk.jsonl", records)
    source = open_source(path, completion_only=True)
    corpus = pack(source, tokenizer, Packing(16, 0, None), tmp_path / "o", vocab_size=9999)
    assert (corpus.summary.documents, corpus.summary.blank_documents) == (1, 3)
