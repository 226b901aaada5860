"""`contmerge chat`: talk to one model or two in the terminal.

    contmerge chat runs/mine --against Qwen/Qwen3-0.6B
    printf 'What is a tort?\n' | contmerge chat merged --temperature 0 --json

Prompts are lines of standard input, of a terminal or a pipe. Notes go to standard error.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from hf_contmerge.commands._arguments import add_cpu_argument, add_json_argument, compute_on, number_from, whole_number
from hf_contmerge.commands._models import ANY_MODEL, opened_model
from hf_contmerge.runtime.fields import LARGEST_SEED
from hf_contmerge.runtime.hiding import printable
from hf_contmerge.runtime.stopping import Stopped, interruptible

if TYPE_CHECKING:
    from hf_contmerge.scoring.conversation import Conversation

_TEMPERATURE = number_from(0, 100, "a number from 0 on, such as 0.7")
_HELP = "/clear starts anew; /exit or Ctrl-D ends. Ctrl-C ends an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge chat`."""
    parser.add_argument("model", metavar="MODEL", help=ANY_MODEL)
    parser.add_argument("--against", metavar="OTHER", help="another model, answering the same prompts next to it")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--each", action="store_true", help="each prompt starts a new conversation")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=512, metavar="N", help="of an answer (default: 512)"
    )
    parser.add_argument(
        "--temperature", type=_TEMPERATURE, metavar="T", help="0: the most likely token (default: the model's)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), metavar="N", help="make sampled answers repeatable"
    )
    add_json_argument(parser)
    add_cpu_argument(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow the model's own code to run")
    parser.set_defaults(do=chat_command)


def chat_command(args: argparse.Namespace) -> None:
    """Answer prompts until they end.

    Raises:
        ContmergeError: a user error.
    """
    compute_on(cpu=args.cpu)
    names = [name for name in (args.model, args.against) if name]
    with ExitStack() as stack:
        places = [stack.enter_context(opened_model(name)) for name in names]
        voices = [_opened(args, place, name) for place, name in zip(places, names, strict=True)]
        if args.seed is not None:
            _seed(args.seed)
        for prompt in _prompts(voices):
            if args.each:
                _clear(voices)
            _reply(args, names, voices, prompt)


def _opened(args: argparse.Namespace, place: str, name: str) -> Conversation:
    from hf_contmerge.scoring.conversation import Conversation, Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature)
    voice = Conversation.open(place, sampling, system=args.system, trust_remote_code=args.trust_remote_code)
    if not voice.has_template:
        _note(f"{name} has no chat template: each prompt is text that it completes, without earlier turns.")
        if args.system:
            _note(f"--system is not used for {name}.")
    return voice


def _prompts(voices: Sequence[Conversation]) -> Iterator[str]:
    """Yield the lines that are prompts, and obey those that are commands."""
    talks = sys.stdin.isatty()
    if talks:
        import readline  # noqa: F401  (line editing and history)

        _note(_HELP)
    while (line := _line(talks)) is not None and line != "/exit":
        if line == "/clear":
            _clear(voices)
        elif line:
            yield line


def _line(talks: bool) -> str | None:
    """Return the next line; None at the end."""
    if not talks:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _clear(voices: Sequence[Conversation]) -> None:
    for voice in voices:
        voice.clear()


def _reply(args: argparse.Namespace, names: Sequence[str], voices: Sequence[Conversation], prompt: str) -> None:
    """Print all answers to a prompt; Ctrl-C in a terminal ends them."""
    try:
        with interruptible():
            _print_answers(args, names, voices, prompt)
    except Stopped as stop:
        if not sys.stdin.isatty() or stop.number != signal.SIGINT:
            raise
        print(" [stopped]")


def _print_answers(args: argparse.Namespace, names: Sequence[str], voices: Sequence[Conversation], prompt: str) -> None:
    if args.json:
        answers = [voice.answer(prompt, lambda _: None) for voice in voices]
        texts = [{"model": name, "text": text} for name, text in zip(names, answers, strict=True)]
        print(printable(json.dumps({"prompt": prompt, "answers": texts})), flush=True)
    elif len(voices) == 1:
        voices[0].answer(prompt, lambda text: print(printable(text), end="", flush=True))
        print()
    else:
        _side_by_side(names, voices, prompt)


def _side_by_side(names: Sequence[str], voices: Sequence[Conversation], prompt: str) -> None:
    """Print the answers in columns; a terminal shows them grow."""
    from rich.console import Console
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    texts = [""] * len(voices)
    console = Console()

    def table() -> Table:
        columns = Table(*map(escape, names), title=escape(prompt), expand=True)
        columns.add_row(*(Text(printable(text).strip()) for text in texts))
        return columns

    growing = Live(table(), console=console, transient=True) if console.is_terminal else None

    def show(index: int, text: str) -> None:
        texts[index] += text
        if growing:
            growing.update(table())

    try:
        with growing or nullcontext():
            for index, voice in enumerate(voices):
                voice.answer(prompt, partial(show, index))
    finally:
        console.print(table())


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)
