"""The command line itself: help, examples, misspelt words."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

import hf_contmerge
from hf_contmerge.commands.main import _COMMANDS, _parse, main, make_parser


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its commands, except mergekit's."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                if name != "yaml":
                    yield from commands(child)


EVERY = list(commands(make_parser(list(_COMMANDS))))
each = pytest.mark.parametrize("parser", EVERY, ids=lambda p: p.prog.replace(" ", "-"))


@each
def test_help_fits_80_columns_and_has_an_example(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        text = parser.format_help()
        assert [line for line in text.splitlines() if len(line) > 80] == []
    example = text.partition("\nExample:\n  ")[2].strip()
    assert example.startswith(parser.prog.rpartition(" ")[0])
    assert _parse(shlex.split(example)[1:]).do


def test_json_is_asked_for_in_one_way() -> None:
    """A flag; only `score` and `gate` also take a file."""
    facts = {
        parser.prog: action.nargs for parser in EVERY for action in parser._actions if "--json" in action.option_strings
    }
    plain = dict.fromkeys(
        (
            "plan",
            "status",
            "report",
            "compare",
            "study",
            "verify",
            "merge log",
            "merge rank",
            "doctor",
            "example list",
            "chat",
            "extract-lora",
            "push",
        ),
        0,
    )
    assert facts == {f"contmerge {name}": nargs for name, nargs in {**plain, "score": "?", "gate": "?"}.items()}


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = re.findall(r"^    ([\w-]+)", capsys.readouterr().out, flags=re.M)
    assert listed == list(_COMMANDS)


@pytest.mark.parametrize("words", [[], ["merge"]])
def test_without_a_command_there_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(" ".join(["usage: contmerge", *words, "[-h]"]))
    assert not printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"contmerge {hf_contmerge.__version__}\n")


@pytest.mark.parametrize("words", [
    ["report", ""], ["status", ""], ["run", ""], ["score", ""], ["export", "m", ""], ["push", "r", "--repo-id", ""],
    ["merge", "init", "", "--base", "b", "--rule", "magmax"], ["merge", "init", "s", "--base", "", "--rule", "magmax"],
    ["merge", "add", "s", ""], ["merge", "b", "x", "", "--rule", "magmax", "-o", "out"], ["chat", "m", "--against="],
    ["merge", "export", "s", "out", "--shard-size", ""], ["remix", "r", "--want", ""],
    ["gate", "b", ""], ["verify", ""], ["study", ""], ["compare", "a", ""],
], ids=" ".join)  # fmt: skip
def test_an_empty_word_is_not_the_current_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "is empty, as an unset shell variable is" in printed, printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rum", "Unknown command 'rum'. Did you mean 'run'?"),
        ("stauts runs/x", "Unknown command 'stauts'. Did you mean 'status'"),
        ("merge lgo state", "Unknown command 'lgo'. Did you mean 'log'?"),
        ("run x.yml --untill merge", "Unknown option '--untill'. Did you mean '--until'"),
        ("plan x.yml --jsno", "Unknown option '--jsno'. Did you mean '--json'?"),
        ("merge init state --baze=x", "Unknown option '--baze'. Did you mean '--base'?"),  # before what is missing
        ("run x.yml --until mrege", "Unknown value of --until 'mrege'. Did you mean 'merge'?"),
        ("redo runs/x trian", "Unknown phase 'trian'. Did you mean 'train'?"),
        ("redo", "The following arguments are required: RUN, phase"),
        ("verify a b", "Unexpected word 'b'"),
        ("run x.yml -q", "Unknown option '-q'."),
        ("score m --limit 0", "Argument --limit: must be a whole number from 1 on; got '0'"),
    ],
)
def test_misspelt_words(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"Error: {said}")
    assert printed.err.count("\n") == 1
    first = [] if words.startswith(("rum", "st")) else words.split()[:1]
    assert f"See `{' '.join(['contmerge', *first])}" in printed.err
    assert not printed.out


def test_values_after_two_dashes_are_words() -> None:
    assert _parse(["verify", "--", "--odd-name"]).what == "--odd-name"
    assert _parse(["run", "x.yml", "--set=name=--x"]).set == ["name=--x"]


def cold(code: str) -> str:
    """Run code in a new process; return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_no_help_imports_what_takes_seconds() -> None:
    heavy = {"torch", "transformers", "datasets", "lm_eval", "matplotlib"}
    assert (
        cold(
            "import sys\nfrom hf_contmerge.commands.main import _COMMANDS, make_parser\n"
            f"make_parser(list(_COMMANDS)).format_help()\nprint({heavy} & set(sys.modules))"
        )
        == "set()\n"
    )


def test_help_takes_a_third_of_a_second() -> None:
    code = (
        "import time\nfrom hf_contmerge.commands.main import make_parser\nmake_parser([]).format_help()\n"
        "print(time.process_time())"
    )
    assert min(float(cold(code)) for _ in range(3)) < 0.3


def test_seeds_of_chat_have_the_range_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parse(["chat", "model", "--seed", str(2**32 - 1)]).seed == 2**32 - 1
    with pytest.raises(SystemExit):
        _parse(["chat", "model", "--seed", str(2**32)])
    assert "must be a whole number from 0 to 4294967295; got '4294967296'" in capsys.readouterr().err
