"""Test `--help`: every option with its text and default, option groups, and examples."""

import re

import pytest
from typer.testing import CliRunner

from sparselogits.cli import app
from tests.test_docs_code import CONTEXT, PROGRAM, assert_command

COMMANDS = sorted(PROGRAM.commands)
OPTIONS = [
    (name, option)
    for name in COMMANDS
    for option in PROGRAM.commands[name].get_params(CONTEXT)
    if option.param_type_name == "option" and option.name != "help" and not option.hidden
]
HEADINGS = ["Model", "Data", "Targets", "Output", "Performance", "Distributed"]


def page(*words: str) -> str:
    """A help page as one line of words, without its borders."""
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "1000", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown.output).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: page(name) for name in COMMANDS}


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_an_option_shows_its_text_and_its_default(name, option, pages):
    """Square brackets in a help text would be read as markup and vanish."""
    words = " ".join(option.help.split())
    assert words[0].isupper() or words.split(":")[0].islower(), words
    assert words.endswith("."), f"a help text is a sentence: {words}"
    shown = pages[name]
    assert words in shown
    after = shown.split(words, 1)[1]
    if option.required:
        assert after.startswith(" [required]")
    elif isinstance(option.show_default, str):
        assert after.startswith(f" [default: ({option.show_default})]")
    elif not option.is_flag:
        assert option.default is not None, "show_default has to say what happens without it"
        default = getattr(option.default, "value", option.default)
        assert after.startswith(f" [default: {default}]")


def test_only_train_offers_the_best_teacher_of_each_window(pages):
    assert "or best, for the teacher with the lowest loss" in pages["train"]
    assert "or best" not in pages["eval"]  # which rejects it


def test_the_quick_check_does_not_claim_every_byte(pages):
    assert "--sample" in pages["verify"]
    assert "or with --sample a part of it" in pages["verify"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_page_ends_with_an_example_that_can_be_given(name, pages):
    example = pages[name].split(" Example: ")[1].split()
    assert example[:2] == ["sparselogits", name]
    assert_command(example, f"{name} --help")


def test_options_stand_in_groups_the_common_ones_first(pages):
    places = [pages["cache"].index(f" {heading} ") for heading in HEADINGS]
    assert places == sorted(places)
    for name, option in OPTIONS:
        if len(PROGRAM.commands[name].get_params(CONTEXT)) > 8:
            assert option.rich_help_panel, f"{name} {option.name} stands in no group"


def test_commands_stand_in_groups():
    shown = page()
    for heading in ("Create a cache", "Train and evaluate", "Manage a cache", "Analyse"):
        assert heading in shown


@pytest.mark.parametrize("words", [["-h"], ["cache", "-h"]])
def test_help_has_a_short_name(words):
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert "Usage:" in shown.output


@pytest.mark.parametrize("width", [72, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_cut_off_on_a_narrow_terminal(name, width):
    environment = {"COLUMNS": str(width), "TERM": "dumb"}
    shown = CliRunner().invoke(app, [name, "--help"], env=environment).output
    assert "…" not in shown
    for option in PROGRAM.commands[name].params:
        if option.param_type_name == "option" and not option.hidden:
            assert all(word in shown for word in [*option.opts, *option.secondary_opts])


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "demo"])
def test_a_bare_command_prints_its_usage(name):
    shown = CliRunner().invoke(app, [name], env={"COLUMNS": "200"})
    assert shown.exit_code == 2
    assert f"sparselogits {name}" in shown.output or "Usage:" in shown.output
