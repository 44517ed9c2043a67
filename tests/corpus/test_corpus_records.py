"""Test records in all supported forms of conversations, valid and invalid."""

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, TEMPLATES, TOOLS, chat_tokenizer, published
from tests.conftest import write_lines
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import Packing, chat, open_source, pack
from sparselogits.errors import CorpusError

QUESTION = {"role": "user", "content": "What is a window?"}
ANSWER = {"role": "assistant", "content": "A run of tokens."}
TALK = [QUESTION, ANSWER]
LLAMA3 = (  # prints a list of parts as Python does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
ADDED = LLAMA3.replace("{{ m.content | trim }}", "{{ '' + m.content }}")  # refuses lists
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
EITHER = PARTS.replace(
    "{% for p in", "{% if m.content is string %}{{ m.content }}{% else %}{% for p in"
).replace("{% endif %}{% endfor %}<", "{% endif %}{% endfor %}{% endif %}<")


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def made() -> PreTrainedTokenizerFast:
    return chat_tokenizer("byte-level")


@pytest.fixture
def tokenizer(made) -> PreTrainedTokenizerFast:
    made.chat_template = CHATML
    return made


def written(path: Path, rows: list[Any]) -> Path:
    if path.suffix != ".jsonl":  # tables have every column in every row
        columns = dict.fromkeys(name for row in rows for name in row)
        rows = [{name: row.get(name) for name in columns} for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        write_lines(path, rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def texts(data: Any, tokenizer: Any, **options: Any) -> list[str]:
    return list(open_source(data, **options).read_by(tokenizer).documents())


def parts(*said: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in said]


SAID = {"human": QUESTION["content"], "gpt": ANSWER["content"]}
SHAREGPT = [{"from": role, "value": said} for role, said in SAID.items()]
FORMS: dict[str, dict[str, Any]] = {
    "openai": {"messages": TALK},
    "sharegpt": {"conversations": SHAREGPT},
    "sharegpt of lmsys": {"conversation": TALK},
    "openai under sharegpt's name": {"conversations": TALK},
    "json text": {"messages": json.dumps(TALK)},
    "json texts": {"messages": [json.dumps(turn) for turn in TALK]},
    "object of lists": {"messages": {key: [t[key] for t in TALK] for key in ("role", "content")}},
    "prompt and completion": {"prompt": [QUESTION], "completion": [ANSWER]},
    "parts": {"messages": [{**turn, "content": parts(turn["content"])} for turn in TALK]},
    "strings in a list": {"messages": [{**turn, "content": [turn["content"]]} for turn in TALK]},
    "empty text beside it": {"text": "", "messages": TALK},
    "no text beside it": {"text": None, "messages": TALK},
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conversations(tmp_path, tokenizer, form, suffix):
    want = tokenizer.apply_chat_template(TALK, tokenize=False)
    path = written(tmp_path / f"talk.{suffix}", [FORMS[form]])
    assert texts(path, tokenizer) == [want]
    assert texts(path, tokenizer, completion_only=True) == [want]
    assert texts([FORMS[form]], tokenizer, work=tmp_path / "w") == [want]


def test_roles_of_sharegpt(tmp_path, tokenizer):
    call = {"name": "weather", "arguments": {"when": "today", "city": "Oslo"}}
    tool_call = {"type": "function", "function": call}
    turns = [("human", "Rain?"), ("function_call", json.dumps(call)), ("observation", "yes")]
    turns.append(("function_call", "[]"))  # text, since it contains no call
    record = {
        "conversations": [
            {"from": role, "value": said} for role, said in [*turns, ("gpt", "Yes.")]
        ],
        "system": "Be brief.",
        "tools": json.dumps([{"name": "weather"}]),
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [tool_call]},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "[]"},
        {"role": "assistant", "content": "Yes."},
    ]
    tokenizer.chat_template = TOOLS
    want = tokenizer.apply_chat_template(messages, tools=[{"name": "weather"}], tokenize=False)
    assert texts(written(tmp_path / "a.jsonl", [record]), tokenizer) == [want]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
def test_a_field_of_another_name(tmp_path, tokenizer, suffix):
    want = tokenizer.apply_chat_template(TALK, tokenize=False)
    for number, talk in enumerate((TALK, SHAREGPT)):
        path = written(tmp_path / f"{number}.{suffix}", [{"id": 1, "dialog": talk}])
        for masked in (False, True):
            found = texts(path, tokenizer, text_field="dialog", completion_only=masked)
            assert found == [want]


ARROW = {
    "large strings": pa.large_string(),
    "string views": pa.string_view(),
    "a dictionary": pa.dictionary(pa.int32(), pa.string()),
    "nulls": pa.null(),
}


@pytest.mark.parametrize("kind", ARROW)
def test_types_of_arrow(tmp_path, tokenizer, kind):
    """Columns beside the text may hold anything."""
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    says = None if kind == "nulls" else "Plain."
    columns = {
        "text": pa.array([says, None], ARROW[kind]),
        "messages": pa.array([None, TALK], pa.large_list(turn)),
        "tools": pa.nulls(2),
        "when": pa.array([1, None], pa.timestamp("s")),
        "photo": pa.array([b"x", None], pa.binary()),
        "scores": pa.array([[1.0], None], pa.list_(pa.float16())),
        "more": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file_format:  # as Polars writes
        file_format.write_table(table, max_chunksize=1)
    talk = tokenizer.apply_chat_template(TALK, tokenize=False)
    for file in ("a.parquet", "a.arrow", "file.arrow"):
        assert texts(tmp_path / file, tokenizer) == ([talk] if says is None else [says, talk])


def test_maps_and_dates_in_tool_calls(tmp_path, tokenizer):
    tokenizer.chat_template = TOOLS
    kind = pa.struct([("when", pa.date32()), ("cost", pa.decimal128(4, 2)), ("n", pa.int64())])
    for arguments, value, said in (
        (pa.map_(pa.string(), pa.string()), [("b", "1"), ("a", "2")], '{"b": "1", "a": "2"}'),
        (kind, {"when": date(2024, 7, 26), "cost": None}, '{"when": "2024-07-26"}'),
    ):
        function = pa.struct([("name", pa.string()), ("arguments", arguments)])
        call = pa.struct([("type", pa.string()), ("function", function)])
        fields = [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))]
        [row] = [QUESTION | {"tool_calls": None}]
        answer = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": value}}],
        }
        talk = pa.array([[row, answer]], pa.list_(pa.struct(fields)))
        pq.write_table(pa.table({"messages": talk}), tmp_path / "a.parquet")
        [text] = texts(tmp_path / "a.parquet", tokenizer)
        assert f'"arguments": {said}' in text


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ADDED, PARTS, EITHER, published("smolvlm")])
def test_content_is_never_printed_as_python(tmp_path, tokenizer, template):
    """Text and parts come out alike, whichever of them the template knows."""
    tokenizer.chat_template = template
    talks = [TALK, [{**turn, "content": parts(turn["content"])} for turn in TALK]]
    found = texts(written(tmp_path / "a.jsonl", [{"messages": t} for t in talks]), tokenizer)
    assert found[0] == found[1]
    assert "{'" not in found[0]
    assert QUESTION["content"] in found[0]
    assert ANSWER["content"] in found[0]
    knows = talks[1] if template in (PARTS, published("smolvlm")) else talks[0]
    assert found[0] == tokenizer.apply_chat_template(knows, tokenize=False)


def test_several_parts(tmp_path, tokenizer):
    record = {"messages": [{"role": "user", "content": parts("One.", "Two.")}, ANSWER]}
    path = written(tmp_path / "a.jsonl", [record])
    tokenizer.chat_template = EITHER
    assert texts(path, tokenizer) == [
        tokenizer.apply_chat_template(record["messages"], tokenize=False)
    ]
    tokenizer.chat_template = LLAMA3
    assert "One.\nTwo." in texts(path, tokenizer)[0]


def calls(*functions: tuple[str, Any]) -> list[dict[str, Any]]:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in functions]
    return [QUESTION, {"role": "assistant", "content": None, "tool_calls": made}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
def test_tool_calls_keep_their_order_and_gain_no_nulls(tmp_path, tokenizer, suffix):
    tokenizer.chat_template = TOOLS
    schema = {"type": "object", "properties": {"when": {"type": "string"}, "a": {"type": "string"}}}
    rows = [
        {"messages": calls(("weather", {"when": "today", "city": "Oslo"})), "tools": [schema]},
        {"messages": calls(("add", {"b": [{"z": 1}], "a": 3})), "tools": None},
        {"messages": calls(("now", {})), "tools": [{"type": "none"}]},
    ]
    if suffix == "saved":
        rows[2]["messages"] = calls(("now", {"zone": "UTC"}))  # Arrow keeps no empty object
    want = [
        tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        for row in rows
    ]
    path = written(tmp_path / f"calls.{suffix}", rows)
    assert texts(path, tokenizer) == want
    dataset = datasets.Dataset.from_list(rows)
    stream = dataset.to_iterable_dataset()
    objects = (dataset, stream, stream.map(lambda row: row)) if suffix == "saved" else (rows,)
    for given in objects:
        assert texts(given, tokenizer, work=tmp_path / "w") == want


def test_null_that_was_written_stays(tmp_path, tokenizer):
    tokenizer.chat_template = TOOLS
    rows = [{"messages": calls(("weather", {"when": None, "city": "Oslo"}))}]
    for data in (written(tmp_path / "a.jsonl", rows), rows):
        [text] = texts(data, tokenizer, work=tmp_path / "w")
        assert '{"when": null, "city": "Oslo"}' in text


def test_the_json_feature_of_datasets(tmp_path, tokenizer):
    tokenizer.chat_template = TOOLS
    rows = [
        {"messages": calls(("weather", {"when": "today", "x": None}))},
        {"messages": calls(("at", {"when": 1690876800, "city": "Oslo"}))},
    ]
    want = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    file = str(written(tmp_path / "calls.jsonl", rows))
    dataset = datasets.load_dataset(
        "json", data_files=file, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert "Json" in str(dataset.features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "calls.parquet")
    for data in (dataset, tmp_path / "saved", tmp_path / "calls.parquet"):
        assert texts(data, tokenizer, work=tmp_path / "w") == want
    mixed = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    mixed.save_to_disk(tmp_path / "mixed")
    for data in (mixed, tmp_path / "mixed"):
        assert texts(data, tokenizer, work=tmp_path / "w") == want


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("files", [1, 2])
def test_text_and_conversations_together(tmp_path, tokenizer, suffix, files):
    rows = [{"text": "Plain text."}, {"prompt": "a", "completion": " b"}, {"messages": TALK}]
    want = ["Plain text.", "a b", tokenizer.apply_chat_template(TALK, tokenize=False)]
    if files == 1:
        assert texts(written(tmp_path / f"a.{suffix}", rows), tokenizer) == want
    elif suffix != "saved":
        (tmp_path / "folder").mkdir()
        for number, row in enumerate(rows):
            written(tmp_path / "folder" / f"{number}.{suffix}", [row])
        assert texts(tmp_path / "folder", tokenizer) == want


def test_a_column_of_nulls_is_no_text(tmp_path, tokenizer):
    (tmp_path / "folder").mkdir()
    for number, text in enumerate((None, "Some text.")):
        table = pa.table({"text": [text] * 3, "id": [1, 2, 3], "when": [None] * 3})
        pq.write_table(table, tmp_path / "folder" / f"{number}.parquet")
    assert texts(tmp_path / "folder", tokenizer) == ["Some text."] * 3
    table = pa.table({"text": pa.nulls(1), "messages": [TALK]})
    pq.write_table(table, tmp_path / "a.parquet")
    [text] = texts(tmp_path / "a.parquet", tokenizer)
    assert "A run of tokens." in text


def test_variables_of_the_template(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen 3"] + "{{ mode }}{{ documents }}"
    documents = [{"title": "t", "text": "x"}]
    record = {
        "messages": TALK,
        "documents": documents,
        "chat_template_kwargs": {"mode": "quick", "add_generation_prompt": True},
    }
    [text] = texts(written(tmp_path / "a.jsonl", [record]), tokenizer)
    assert text == tokenizer.apply_chat_template(
        TALK, documents=documents, mode="quick", tokenize=False
    )


def test_a_second_template_for_tools(tmp_path, tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    rows = [{"messages": TALK}, {"messages": TALK, "tools": [{"name": "weather"}]}]
    want = [
        tokenizer.apply_chat_template(TALK, tools=row.get("tools"), tokenize=False) for row in rows
    ]
    assert texts(written(tmp_path / "a.jsonl", rows), tokenizer) == want
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(CorpusError, match="multiple chat templates with no default"):
        texts(tmp_path / "a.jsonl", tokenizer)


BACKWARDS = "{{ messages | length }}{% for m in messages %}{{ m.content | reverse }}{% endfor %}"
MISTAKES: dict[str, tuple[str | None, Any, str]] = {
    "no template": (None, TALK, "no chat template .* give a tokenizer with a template"),
    "template that refuses": ("{{ raise_exception('no talk') }}", TALK, "no talk"),
    "template of an unknown name": ("{{ messages[0].a.b }}", TALK, "rejects the messages"),
    "text": (CHATML, "hello", "contains str instead of messages"),
    "strings": (CHATML, ["hello"], "contains list instead of messages"),
    "number": (CHATML, 7, "contains int instead of messages"),
    "from and value": (CHATML, SHAREGPT, "message 1 of `messages` has no `role` .*`from`, `value`"),
    "no role": (CHATML, [QUESTION, {"content": "x"}], "message 2 of `messages` has no `role`"),
    "empty role": (CHATML, [{"role": "", "content": "x"}], "message 1 .* has the role ''"),
    "role in capitals": (CHATML, [{"role": "Assistant", "content": "x"}], "Rename the role"),
    "role of a number": (CHATML, [{"role": 3, "content": "x"}], "message 1 .* has the role '3'"),
    "no content": (CHATML, [{"role": "user"}], "message 1 .* has no `content`"),
    "null content": (CHATML, [{"role": "user", "content": None}], "has no `content`"),
    "content of a number": (CHATML, [{"role": "user", "content": 5}], "content of type int"),
    "content of an object": (CHATML, [{"role": "user", "content": {"a": 1}}], "type dict"),
    "an image": (
        CHATML,
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "message 1 .* has a content part of type 'image'",
    ),
    "half a surrogate": (CHATML, [{"role": "user", "content": "a\ud800"}, ANSWER], "surrogate"),
    "template that changes what it wrote": (BACKWARDS, [*TALK, *TALK], r"{% generation %}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_goes_wrong_names_the_record(tmp_path, tokenizer, mistake):
    template, messages, said = MISTAKES[mistake]
    path = written(tmp_path / "talk.jsonl", [{"messages": []}, {"messages": messages}])
    tokenizer.chat_template = template
    with pytest.raises(CorpusError, match=said) as found:
        pack(
            open_source(path, completion_only=True),
            tokenizer,
            Packing(8, 0, None),
            tmp_path / "out",
            vocab_size=len(tokenizer),
        )
    assert "talk.jsonl, line 2" in str(found.value)


def test_a_speaker_that_nobody_knows(tmp_path, tokenizer):
    talk = [SHAREGPT[0], {"from": "assisatant", "value": "x"}]
    path = written(tmp_path / "talk.jsonl", [{"conversations": talk}])
    with pytest.raises(CorpusError, match=r"line 1: message 2 .* is from 'assisatant'; .*gpt"):
        texts(path, tokenizer)


def test_records_of_pandas(tokenizer, tmp_path):
    talk = np.array(TALK, dtype=object)
    calls = np.array(
        [{"type": "function", "function": {"name": "f", "arguments": {"a": np.int64(2)}}}]
    )
    turns = [QUESTION, {"role": "assistant", "tool_calls": calls}]
    rows = [
        {"text": "Plain.", "messages": float("nan")},
        {"text": float("nan"), "messages": talk},
        {"text": None, "messages": np.array(turns)},
    ]
    tokenizer.chat_template = TOOLS
    found = texts(rows, tokenizer, work=tmp_path)
    assert found[:2] == ["Plain.", tokenizer.apply_chat_template(TALK, tokenize=False)]
    assert '"arguments": {"a": 2}' in found[2]


def test_wrong_extras_name_the_record(tmp_path, tokenizer):
    tokenizer.chat_template = TOOLS
    for name, value in (("tools", "{"), ("tools", [3]), ("chat_template_kwargs", [1])):
        path = written(tmp_path / "talk.jsonl", [{"messages": TALK, name: value}])
        with pytest.raises(CorpusError, match=rf"talk\.jsonl, line 1: `{name}`"):
            texts(path, tokenizer)
    tokenizer.chat_template = CHATML  # which reads no tools: these are something else
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK, "tools": ["saw"], "documents": 3}])
    assert texts(path, tokenizer) == [tokenizer.apply_chat_template(TALK, tokenize=False)]


def test_plain_text_where_completions_are_asked_for(tmp_path, tokenizer):
    rows = [{"messages": TALK}, {"text": "Plain."}]
    for suffix in ("jsonl", "parquet"):
        path = written(tmp_path / f"a.{suffix}", rows)
        with pytest.raises(CorpusError, match="Plain text has no completions"):
            texts(path, tokenizer, completion_only=True)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set x = 'a' * 9999999999 %}{{ x | length }}",
    "output": "{% for a in range(90) %}{{ 'a' * 999999 }}{% endfor %}",
    "growth": "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "python": "{{ messages.__class__.__mro__ }}",
    "syntax": "{% for %}",
}


@pytest.fixture(scope="module")
def hurried() -> Iterator[None]:
    """A process for templates with a limit of one second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "CPU_SECONDS", 1)
        chat.shut_down()
        yield
    chat.shut_down()


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_costs_an_error(tmp_path, tokenizer, attack):
    tokenizer.chat_template = HOSTILE[attack]
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    with pytest.raises(CorpusError, match=r"talk\.jsonl, line 1: the chat template"):
        texts(path, tokenizer)


@pytest.mark.usefixtures("hurried")
def test_after_a_hostile_template_the_next_is_served(tmp_path, tokenizer):
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    assert len(texts(path, tokenizer)) == 1


def test_a_process_killed_in_the_middle_of_an_answer(tmp_path, tokenizer, monkeypatch):
    program = (
        "import os, signal, sys; sys.stdin.readline(); print('{}', flush=True); "
        "sys.stdin.readline(); print('{\"text', end='', flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(chat, "_PROGRAM", program)
    chat.shut_down()
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    with pytest.raises(CorpusError, match=r"chat template was stopped \(exit status -9\)"):
        texts(path, tokenizer)


def test_an_idle_process_ends_and_the_next_conversation_starts_one(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(chat, "IDLE_SECONDS", 1)
    chat.shut_down()
    path = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    first = texts(path, tokenizer)
    running = chat._running
    assert running is not None
    assert running.process.wait(timeout=60) == 0
    assert texts(path, tokenizer) == first
    assert chat._running is not running
    chat.shut_down()
