"""Completion scripts, in the shells themselves where they are installed."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_contmerge.commands.completion import completion_script
from hf_contmerge.commands.main import _COMMANDS, every_command

SHELLS = ("bash", "zsh", "fish")
BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMP_LINE="{line}" COMP_POINT=${{#COMP_LINE}}
_shtab_contmerge
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(shell: str, line: str, folder: Path) -> set[str]:
    """Return what a shell offers for the last word of a line."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    script = folder / f"contmerge.{shell}"
    script.write_text(completion_script(shell))
    words = shlex.join(line.split(" "))
    code = (
        BASH.format(script=script, line=line, words=words)
        if shell == "bash"
        else f"source {script}; complete -C '{line}'"
    )
    done = subprocess.run([shell, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stderr
    return {offered.split("\t")[0].strip() for offered in done.stdout.splitlines()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_words_are_completed(shell: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yml").touch()
    assert completed(shell, "contmerge stat", tmp_path) == {"status", "statistics"}
    assert {"--num-processes", "--config-file"} <= completed(shell, "contmerge run --", tmp_path)
    assert "redo" not in completed(shell, "contmerge merge ", tmp_path)
    assert {"init", "add", "export"} <= completed(shell, "contmerge merge ", tmp_path)
    assert completed(shell, "contmerge plan mi", tmp_path) == {"mine.yml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_have_every_command_and_are_read_by_the_shell(shell: str, tmp_path: Path) -> None:
    text = completion_script(shell)
    assert [name for name in _COMMANDS if name not in text] == []
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here: its script was made, but not read")
    script = tmp_path / "script"
    script.write_text(text)
    subprocess.run([shell, "-n", script], check=True)


def test_each_shell_is_a_choice() -> None:
    (commands,) = (a for a in every_command()._actions if isinstance(a, argparse._SubParsersAction))
    assert commands.choices["completion"].parse_args(["fish"]).shell == "fish"
    with pytest.raises(SystemExit):
        commands.choices["completion"].parse_args(["sh"])


def test_the_library_is_loaded_when_a_script_is_asked_for() -> None:
    code = "import sys; from hf_contmerge.commands.main import make_parser; make_parser([]).format_help()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('shtab' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
