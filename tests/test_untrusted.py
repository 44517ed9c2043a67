"""Test that untrusted files are opened, parsed and printed safely."""

import io
import json
import os
import socket
import sys
import tracemalloc
from pathlib import Path

import pytest
from rich.table import Table

from sparselogits.cli.exits import run_and_exit
from sparselogits.console import results, styled
from sparselogits.errors import CacheError
from sparselogits.untrusted import (
    NotRegularError,
    json_text,
    leads_outside,
    open_regular,
    parse_json,
    printable,
    read_regular,
    shown,
)

ATTACKS = {
    "clipboard": "\x1b]52;c;Y3VybCBldmlsIHwgc2g=\x07",
    "title": "\x1b]0;root@host\x07",
    "clear screen": "\x1b[2J\x1b[H",
    "answer back": "\x1b[21t",
    "8-bit control": "\x9b2J",
    "carriage return": "damaged\rsound  ",
    "backspaces": "x" + "\b" * 9,
    "right to left": "\u202egpj.exe",
    "isolate": "\u2066abc\u2069",
    "hidden tags": "a\U000e0041\U000e0042",
    "surrogate": "a\ud800b",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\click\x1b]8;;\x1b\\",
}


def dangerous(text: str) -> bool:
    return any(not (c.isprintable() or c in "\n\t ") for c in text)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_control_character_reaches_a_terminal(attack):
    out = io.StringIO()
    console = results()
    console.file = out
    table = Table(attack)
    table.add_row(attack)
    for thing in (attack, styled("error:", "red", f" {attack}"), table, CacheError(attack)):
        console.print(thing)
    assert out.getvalue().count("\n") >= 4
    assert not dangerous(out.getvalue())
    assert not dangerous(str(CacheError(attack)))
    assert not dangerous(shown({attack: [attack]}))
    assert json.loads(json_text(attack)) == attack
    assert json_text(attack).isascii()


def test_text_that_harms_nobody_stays_as_it_is():
    for text in ("two\nlines", "größe 模型 ✓ 👩‍🚀", "a [bold]b[/bold] [/x] \\[c", ""):
        assert printable(text) == text
        console = results()
        console.file, console.width = io.StringIO(), 200
        console.print(text, soft_wrap=True)
        assert console.file.getvalue() == text + "\n"


def test_an_error_that_quotes_a_long_name_is_cut():
    said = str(CacheError("it begins " + "x" * 10_000_000 + " it ends"))
    assert len(said) < 9000
    assert said.startswith("it begins")
    assert said.endswith("it ends")


def test_a_value_is_echoed_short_whatever_it_is():
    bomb: object = ["lol"]
    for _ in range(60):
        bomb = [bomb] * 9

    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in (bomb, {"a": "x" * 10**7}, list(range(10**6)), 10**5000, Hostile(), b"\0" * 10**6):
        assert len(shown(value)) < 1500


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "link to a pipe"])
def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path, kind):
    path = tmp_path / "cache.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotRegularError, match="regular file is expected") as caught:
        open_regular(path)
    assert caught.value.filename == str(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_regular_file_is_read_up_to_its_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes, more than the 4"):
        read_regular(path, 4)
    with pytest.raises(ValueError, match="more than"):
        read_regular("/proc/self/maps", 10)  # claims to be empty


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"[]," * 300_000 + b"[]]",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a": NaN}',
        b"[-Infinity]",
        b'"\\ud800"',
        b"\xff\xfe[\x00]\x00",
        b"[1" + b"0" * 5000 + b"]",
        b" " * (2 << 20),
        b"",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_json_is_refused_before_it_takes_memory(data):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        parse_json(data)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_json_text_has_no_number_that_json_has_not():
    value = {"a": [float("nan"), -float("inf"), 1.5], "b": (float("inf"), True, None, 1 << 70)}
    read = json.loads(json_text(value), parse_constant=pytest.fail)
    assert read == {"a": [None, None, 1.5], "b": [None, True, None, 1 << 70]}


def test_a_bug_is_one_message_and_its_traceback_is_kept(tmp_path, monkeypatch, capsys):
    def broken(**_: object) -> None:
        raise KeyError("\x1b[2Jno such key")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sparselogits", "info"])
    with pytest.raises(SystemExit) as stopped:
        run_and_exit(broken)
    said = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "KeyError" in said
    assert "Please report it" in said
    assert "Traceback" not in said
    assert not dangerous(said)
    (kept,) = (tmp_path / "sparselogits/bugs").iterdir()
    assert "Traceback" in kept.read_text()
    assert kept.name in said.replace("\n", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file, so that no folder can be created
    with pytest.raises(SystemExit):
        run_and_exit(broken)
    assert "Please report it with the command and the output of --debug" in capsys.readouterr().err


@pytest.mark.parametrize("sub", ["", "de", "de/train"])
def test_blobs_are_part_of_a_folder_in_the_hubs_cache(tmp_path, sub):
    """`snapshot_download` makes links to blobs, and a user may name a folder within a snapshot."""
    repository, other = tmp_path / "datasets--org--name", tmp_path / "datasets--org--other"
    for each in (repository, other):
        (each / "blobs").mkdir(parents=True)
        (each / "blobs/0a1b").write_text("{}")
    folder = repository / "snapshots/c0ffee" / sub
    folder.mkdir(parents=True)
    links = {"own": repository / "blobs/0a1b", "other": other / "blobs/0a1b"}
    for name, target in links.items():
        (folder / name).symlink_to(os.path.relpath(target, folder))
    assert not leads_outside(folder / "own", folder)
    assert leads_outside(folder / "other", folder)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "link").symlink_to(repository / "blobs/0a1b")
    assert leads_outside(plain / "link", plain)
