"""Test that conversations and masks equal those of transformers' `apply_chat_template`."""

import json
import pickle
import random
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, FAMILIES, TEMPLATES, chat_tokenizer, published
from tests.conftest import write_lines
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from sparselogits.corpus import Packing, open_source, pack, packing_for, records
from sparselogits.corpus.chat import ChatTemplate
from sparselogits.corpus.conversation import conversation_of
from sparselogits.corpus.rendering import Renderer, _BoundTemplate, _Turns
from sparselogits.errors import IdentityMismatchError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a window?"},
    {"role": "assistant", "content": "A run of tokens."},
    {"role": "user", "content": "How long?\n\nIn tokens."},
    {"role": "assistant", "content": "As long as you say."},
]
THOUGHTS = [
    *TALK[:2],
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA run of tokens."},
    TALK[3],
    {"role": "assistant", "content": "As long as you say.", "reasoning_content": "well"},
]
WEATHER = {"name": "weather", "arguments": {"when": "today", "city": "Oslo", "again": None}}
CALLS = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": WEATHER}]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]
_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Ask.", "parameters": _CITY},
}
NO_TOOLS = ("smollm", "mistral", "zephyr", "marked", "llama 3", "gemma", "phi 3")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {family: chat_tokenizer(family) for family in FAMILIES}


@pytest.fixture
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    made = tokenizers["byte-level"]
    made.chat_template = CHATML
    return made


@pytest.fixture(autouse=True)
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let templates that write the date find the day of every corpus."""
    day = type("Day", (), {"now": staticmethod(lambda: datetime(2024, 7, 26, 12, 0))})
    monkeypatch.setattr(chat_template_utils, "datetime", day)


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        write_lines(path, records)
    return path


def packed(
    folder: Path, record: dict[str, Any], tokenizer: Any, tokens: int, *, masked: bool = False
) -> tuple[list[int], list[bool] | None]:
    """Return the tokens of a record's only window, without the separator, and which are learnt."""
    path = written(folder / "one.jsonl", [record])
    packing = packing_for(tokenizer, window_length=tokens + 1)
    source = open_source(path, completion_only=masked)
    corpus = pack(source, tokenizer, packing, folder / "out", vocab_size=len(tokenizer))
    [window] = corpus.read(0, 1)
    assert window.tokens[-1] == packing.separator_id
    mask = None if window.mask is None else [False, *window.mask[:-1].tolist()][:-1]
    return window.tokens[:-1].tolist(), mask


def ends_itself(tokenizer: Any, ids: list[int]) -> bool:
    return bool(ids[-1] == packing_for(tokenizer, window_length=8).separator_id)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(tmp_path, tokenizers, name, family):
    tokenizer = tokenizers[family]
    tokenizer.chat_template = TEMPLATES[name]
    records = [{"messages": TALK if name != "gemma" else TALK[1:]}]
    if name in ("qwen 3", "deepseek v3", "gpt-oss"):
        records.append({"messages": THOUGHTS})
    if name not in NO_TOOLS:
        records.append({"messages": CALLS, "tools": [TOOL]})
        if name == "deepseek v3":  # reads arguments as text
            calls = json.loads(json.dumps(CALLS))
            calls[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(WEATHER["arguments"])
            records[-1]["messages"] = calls
    for number, record in enumerate(records):
        want = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"))
        want = want["input_ids"]
        # a text that ends with the separator by itself is not ended twice
        whole = len(want) - ends_itself(tokenizer, want)
        (tmp_path / str(number)).mkdir()
        assert packed(tmp_path / str(number), record, tokenizer, whole)[0] == want[:whole]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "cohere", "qwen3_instruct_2507"])
def test_what_is_learnt_is_what_marks_would_say(tmp_path, tokenizers, name, family):
    """TRL publishes these templates twice: as they are, and with `{% generation %}` marks."""
    tokenizer = tokenizers[family]
    talk = TALK[1:] if name == "gemma" else TALK
    learnt: list[list[bool]] = []
    for number, text in enumerate((published(name), published(f"{name}_training"))):
        tokenizer.chat_template = text
        want = tokenizer.apply_chat_template(talk)["input_ids"]
        whole = len(want) - ends_itself(tokenizer, want)
        (tmp_path / str(number)).mkdir()
        ids, mask = packed(
            tmp_path / str(number), {"messages": talk}, tokenizer, whole, masked=True
        )
        assert ids == want[:whole]
        assert mask is not None
        learnt.append(mask)
        if number:
            marks = tokenizer.apply_chat_template(
                talk, return_dict=True, return_assistant_tokens_mask=True
            )["assistant_masks"]
            assert mask == [mark == 1 for mark in marks[:whole]]
    if name != "phi3":  # whose last turn has two marks
        assert learnt[0] == learnt[1]
    assert "run of tokens" in tokenizer.decode(np.array(ids)[learnt[0]])


def learnt_text(folder: Path, record: dict[str, Any], tokenizer: Any) -> list[str]:
    """Return the runs of a record's text that are learnt, the separator left out."""
    path = written(folder / "talk.jsonl", [record] * 2)
    source = open_source(path, completion_only=True)
    packing = packing_for(tokenizer, window_length=8)
    corpus = pack(source, tokenizer, packing, folder / "out", vocab_size=len(tokenizer))
    tokens = np.concatenate([window.tokens for window in corpus.read(0, corpus.windows)])
    stream = corpus._training.read(0, len(tokens))
    assert stream.learnt is not None
    first = stream.learnt[: int(np.flatnonzero(stream.starts)[1])]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], first, [False]]).astype(int)))
    runs = [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]
    end = tokenizer.decode([packing.separator_id])
    return [run.removesuffix(end) for run in runs if run != end]


QWEN3 = {
    "a thought of an earlier turn is left out": (
        THOUGHTS,
        [
            "A run of tokens.<|im_end|>\n",
            "<think>\nwell\n</think>\n\nAs long as you say.<|im_end|>\n",
        ],
    ),
    "an answer that begins as the thought would": (
        [TALK[1], {"role": "assistant", "content": "<this> is one."}, *TALK[3:]],
        ["<this> is one.<|im_end|>\n", "<think>\n\n</think>\n\nAs long as you say.<|im_end|>\n"],
    ),
    "calls of a tool in an earlier turn": (
        CALLS,
        [
            '<tool_call>\n{"name": "weather", "arguments": {"when": "today", "city": "Oslo", '
            '"again": null}}\n</tool_call><|im_end|>\n',
            "It rains.<|im_end|>\n",
            "<think>\n\n</think>\n\nBye.<|im_end|>\n",
        ],
    ),
    "a greeting first": (
        [{"role": "assistant", "content": "Hi."}, *TALK[1:3]],
        ["Hi.<|im_end|>\n", "<think>\n\n</think>\n\nA run of tokens.<|im_end|>\n"],
    ),
    "an empty answer": (
        [TALK[1], {"role": "assistant", "content": ""}, *TALK[3:]],
        ["<|im_end|>\n", "<think>\n\n</think>\n\nAs long as you say.<|im_end|>\n"],
    ),
    "the digits that mark a place": (
        [TALK[1], {"role": "assistant", "content": "7391826450918273645"}, *TALK[3:]],
        [
            "7391826450918273645<|im_end|>\n",
            "<think>\n\n</think>\n\nAs long as you say.<|im_end|>\n",
        ],
    ),
    "answers of several messages": (
        [
            *CALLS[:2],
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "snow"},
            {"role": "assistant", "content": "Both.", "reasoning_content": "r"},
        ],
        [
            '<tool_call>\n{"name": "weather", "arguments": {"when": "today", "city": "Oslo", '
            '"again": null}}\n</tool_call><|im_end|>\n',
            "<think>\nr\n</think>\n\nBoth.<|im_end|>\n",
        ],
    ),
    "the same words in every turn": (
        [TALK[1], {"role": "assistant", "content": "assistant"}] * 3,
        ["assistant<|im_end|>\n"] * 2 + ["<think>\n\n</think>\n\nassistant<|im_end|>\n"],
    ),
}


@pytest.mark.parametrize("what", QWEN3)
def test_a_template_that_rewrites_earlier_turns(tmp_path, tokenizer, what):
    talk, said = QWEN3[what]
    tokenizer.chat_template = TEMPLATES["qwen 3"]
    assert learnt_text(tmp_path, {"messages": talk}, tokenizer) == said


SAID = ["Hello", " x", "\n", "\n\nyes", "<b>", "7391", "assistant", "é🙂", "<|im_end|>", "... "]


@pytest.mark.parametrize(
    "name", ["llama3_1", "qwen2_5", "qwen3", "gemma3", "phi3", "cohere2", "lfm2", "glm4moe"]
)
def test_markers_and_prefixes_locate_a_turn_equally(tokenizer, name):
    """Where both methods apply to a template, they agree, whatever is said."""
    rng, agreed = random.Random(name), 0
    tokenizer.chat_template = published(name)
    renderer = Renderer(asdict(ChatTemplate.of(tokenizer)))
    for _ in range(8):
        talk = []
        for _ in range(rng.randint(1, 3)):
            for role in ("user", "assistant"):
                said = "".join(rng.choices(SAID, k=rng.randint(1, 4)))
                talk.append({"role": role, "content": said})
        conversation = asdict(conversation_of({"messages": talk}, ["messages"]))
        render = _BoundTemplate(renderer, conversation)
        text = render.text(talk)
        turns = _Turns(render, talk, text)
        for number in range(1, len(talk), 2):
            asked = render.text(talk[:number], opened=True)
            told = render.text(talk[: number + 1])
            if text.startswith(asked) and text.startswith(told):
                assert turns._end_by_marker(number, told) == len(told)
                start = turns._start_from_example(number)
                assert start is not None
                assert text[start:].startswith(text[len(asked) :])
                agreed += 1
    assert agreed > 5


def test_a_template_that_wants_a_question_first(tmp_path, tokenizer):
    """Qwen 3.5's refuses every conversation without one, so that no prefix of this has a form."""
    tokenizer.chat_template = published("qwen3_5_think")
    talk = [TALK[0], {"role": "assistant", "content": "Hi."}, *TALK[1:3]]
    assert learnt_text(tmp_path, {"messages": talk}, tokenizer) == [
        "Hi.<|im_end|>\n",
        "\n</think>\n\nA run of tokens.<|im_end|>\n",  # asked for by "<think>\n"
    ]
    record = {"prompt": TALK[1:2], "completion": TALK[2:3]}
    (tmp_path / "2").mkdir()
    said = learnt_text(tmp_path / "2", record, tokenizer)
    assert said == ["\n</think>\n\nA run of tokens.<|im_end|>\n"]


def test_a_template_that_moves_the_system_message(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["mistral"]
    said = learnt_text(tmp_path, {"messages": TALK}, tokenizer)
    assert said == [" A run of tokens.", " As long as you say."]  # and `learnt_text` cuts </s>


def test_turns_that_end_otherwise_when_they_are_the_last(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["gpt-oss"]
    assert learnt_text(tmp_path, {"messages": THOUGHTS[1:]}, tokenizer) == [
        "<|channel|>final<|message|><think>\nhm\n</think>\n\nA run of tokens.<|end|>",
        "<|channel|>analysis<|message|>well<|end|><|start|>assistant"
        "<|channel|>final<|message|>As long as you say.<|return|>",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_turn_of_the_assistant_is_learnt(tmp_path, tokenizer, suffix):
    path = written(tmp_path / f"talk.{suffix}", [{"messages": TALK}] * 20)
    packing = packing_for(tokenizer, window_length=400)
    source = open_source(path, completion_only=True)
    corpus = pack(source, tokenizer, packing, tmp_path / "out", vocab_size=len(tokenizer))
    first = corpus.read(0, 1)[0]
    whole = tokenizer.apply_chat_template(TALK)["input_ids"]
    assert first.tokens[: len(whole)].tolist() == whole
    assert first.tokens[len(whole)] == packing.separator_id
    read = source.read_by(tokenizer)
    assert pickle.loads(pickle.dumps(read)) == read  # for the processes that tokenise
    said = "A run of tokens.<|im_end|>\nAs long as you say.<|im_end|>\n</s>"
    ids = first.tokens[np.flatnonzero(first.mask) + 1]
    assert str(tokenizer.decode(ids)).startswith(said * 2)


def test_messages_as_prompt_and_completion(tmp_path, tokenizer):
    record = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert learnt_text(tmp_path, record, tokenizer) == ["As long as you say.<|im_end|>\n"]
    # all of it is learnt where that is not asked for
    source = open_source(tmp_path / "talk.jsonl")
    packing = packing_for(tokenizer, window_length=16)
    corpus = pack(source, tokenizer, packing, tmp_path / "all", vocab_size=len(tokenizer))
    assert corpus.read(0, 1)[0].mask is None


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"train": False}])
@pytest.mark.parametrize("name", ["smollm", "qwen 3", "marked"])
def test_answers_that_a_record_leaves_out(tmp_path, tokenizer, name, flag):
    tokenizer.chat_template = TEMPLATES[name]
    talk = [*TALK[:2], {**TALK[2], **flag}, TALK[3], {**TALK[4], "weight": 1, "loss": True}]
    [said] = learnt_text(tmp_path, {"messages": talk}, tokenizer)
    assert "As long as you say." in said
    assert "A run" not in said


def test_a_turn_that_the_next_role_ends(tmp_path, tokenizer):
    """GLM stops by writing the next message's role; the last turn is ended by the separator."""
    tokenizer.chat_template = published("glm4moe").replace("<|user|>", "<|start|>")
    said = learnt_text(tmp_path, {"messages": TALK}, tokenizer)
    assert said == [
        "\n<think></think>\nA run of tokens.<|start|>",
        "\n<think></think>\nAs long as you say.",
    ]


@pytest.mark.parametrize(
    "talk", [[{"role": "assistant", "content": "A"}, TALK[1]], [*TALK[1:3], TALK[3]]]
)
def test_marks_that_end_with_the_first_token_or_with_white_space(tmp_path, tokenizer, talk):
    """Where transformers' own mask runs on to the end of the text."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}<|start|>{{ m.content }}{% endif %}{% endfor %}"
    )
    answer = next(turn["content"] for turn in talk if turn["role"] == "assistant")
    assert learnt_text(tmp_path, {"messages": talk}, tokenizer) == [answer]


def test_the_end_after_a_question_is_not_learnt(tmp_path, tokenizer):
    said = learnt_text(tmp_path, {"messages": TALK[:4]}, tokenizer)
    assert said == ["A run of tokens.<|im_end|>\n"]


def test_a_conversation_without_an_answer_is_left_out(tmp_path, tokenizer):
    records = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": []}, {"messages": None}]
    path = written(tmp_path / "talk.jsonl", records)
    source = open_source(path, completion_only=True)
    corpus = pack(source, tokenizer, Packing(16, 0, None), tmp_path / "o", vocab_size=9999)
    assert (corpus.summary.documents, corpus.summary.blank_documents) == (1, 3)


def test_another_template_is_another_corpus(tmp_path, tokenizer):
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}] * 20)
    source, out = open_source(path, completion_only=True), tmp_path / "out"
    pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))
    tokenizer.chat_template = CHATML.replace("message.content", "message.content | upper")
    with pytest.raises(IdentityMismatchError, match=r"source\.chat_template"):
        pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))
    tokenizer.chat_template = CHATML
    pack(source, tokenizer, Packing(64, 0, None), out, vocab_size=len(tokenizer))


def test_a_corpus_of_text_goes_on_when_its_tokenizer_gains_a_template(tmp_path, tokenizer):
    path = written(tmp_path / "text.jsonl", [{"text": "Some text."}] * 20)
    tokenizer.chat_template = None
    made = [
        pack(open_source(path), tokenizer, Packing(16, 0, None), tmp_path / "o", vocab_size=999)
    ]
    tokenizer.chat_template = CHATML
    made += [
        pack(open_source(path), tokenizer, Packing(16, 0, None), tmp_path / "o", vocab_size=999)
    ]
    assert made[0].windows == made[1].windows


def test_a_template_with_the_date_writes_the_same_every_day(tokenizer, tmp_path):
    tokenizer.chat_template = published("llama3_2")
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    [text] = open_source(path).read_by(tokenizer).documents()
    assert "Today Date: 26 Jul 2024\n" in text
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)  # on that day, see _same_day


def test_text_that_was_rendered_before_is_not_begun_or_ended_twice(tmp_path, tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    tokenizer.chat_template = TEMPLATES["mistral"]
    text = tokenizer.apply_chat_template(TALK[1:], tokenize=False)
    assert text.startswith("<s>")
    assert text.endswith("</s>")
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    packing = packing_for(tokenizer, window_length=len(want))
    assert (packing.bos_id, packing.separator_id) == (want[0], want[-1])
    answer = text.index(" A run")
    records = [{"text": text}, {"prompt": text[:answer], "completion": text[answer:]}]
    for number, record in enumerate(records):
        path = written(tmp_path / f"{number}.jsonl", [record])
        out = tmp_path / str(number)
        corpus = pack(open_source(path), tokenizer, packing, out, vocab_size=len(tokenizer))
        ids = corpus.read(0, 1)[0].tokens.tolist()
        assert (ids[0], ids.count(want[0])) == (want[0], 1)
        if number == 0:
            assert ids == want


def test_a_tokenizer_that_is_not_compiled(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    want = tokenizer.apply_chat_template(TALK)["input_ids"]
    ids, mask = packed(tmp_path, {"messages": TALK}, tokenizer, len(want), masked=True)
    assert ids == want
    said = bytes(i - 3 for i, learnt in zip(ids, mask or [], strict=True) if learnt).decode()
    assert said == "A run of tokens.<|im_end|>\nAs long as you say.<|im_end|>\n"


def test_a_conversation_longer_than_is_tokenised_at_once(tmp_path, tokenizer, monkeypatch):
    lines = "\n".join(f"Line {number} of a long answer." for number in range(3000))
    talk = [TALK[1], {"role": "assistant", "content": lines}, *TALK[3:]]
    want = tokenizer.apply_chat_template(talk)["input_ids"]
    whole = []
    for number, size in enumerate((4 << 20, 100)):
        monkeypatch.setattr(records, "CONVERSATION_BYTES", size)
        (tmp_path / str(number)).mkdir()
        record = {"messages": talk}
        whole.append(packed(tmp_path / str(number), record, tokenizer, len(want), masked=True))
    assert whole[0] == whole[1]
    assert whole[0][0] == want
