"""`contmerge chat`: prompts from a pipe and a terminal, templates, two models, all kinds of names."""

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toys.loras import loaded, lora
from toys.models import perturbed, toy_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.runtime.records import seal_yaml
from hf_contmerge.runtime.stopping import Stopped, interruptible, stoppable
from hf_contmerge.scoring.conversation import Conversation, Sampling

Chat = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Return a function that gives lines to the command, and returns what --json prints."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def chat(text: str, *words: str | Path) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", *map(str, words), "--temperature", "0", "--max-new-tokens", "12", "--cpu", "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return chat


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers have words and depend on all that was said."""
    folder = tmp_path_factory.mktemp("voices")
    return perturbed(toy_llama(folder / "start", seed=0, tied=False), folder / "talker", seed=7, size=0.3)


@pytest.fixture(scope="module")
def plain(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    folder = shutil.copytree(talker, tmp_path_factory.mktemp("plain") / "model")
    (folder / "chat_template.jinja").unlink()
    return folder


def wanted(folder: Path, text: str, model: Any = None) -> str:
    """Return what transformers generates after a text."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**encoded, max_new_tokens=12, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def texts(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [[answer["text"] for answer in line["answers"]] for line in lines]


def test_turns_are_what_transformers_generates(talker: Path, chat: Chat) -> None:
    lines = chat("the quick\n\nand law\n", talker, "--system", "be short")
    first = turn("system", "be short") + turn("user", "the quick")
    opening = "<|im_start|>assistant\n"
    answer = wanted(talker, first + opening)
    assert answer
    assert [line["prompt"] for line in lines] == ["the quick", "and law"]
    second = first + turn("assistant", answer) + turn("user", "and law") + opening
    assert texts(lines) == [[answer], [wanted(talker, second)]]


def test_each_prompt_alone(talker: Path, chat: Chat) -> None:
    lines = chat("the quick\n/clear\nthe quick\nthe quick\n/exit\nnever", talker)
    first, cleared, later = (line["answers"] for line in lines)
    assert first == cleared
    assert later != first  # it has a turn before it
    each = chat("the quick\nthe quick\n", talker, "--each")
    assert [line["answers"] for line in each] == [first, first]


def test_without_a_template(plain: Path, chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    lines = chat("the quick brown\na court may\n", plain)
    assert texts(lines) == [[wanted(plain, "the quick brown")], [wanted(plain, "a court may")]]
    assert main(["chat", str(plain), "--cpu"]) == 0  # an empty pipe
    assert "has no chat template: each prompt is text that it completes" in capsys.readouterr().err


def test_two_models(
    talker: Path, chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    other = perturbed(talker, talker.with_name("other"), seed=5, size=0.3)
    (line,) = chat("the quick\n", talker, "--against", other)
    assert [answer["model"] for answer in line["answers"]] == [str(talker), str(other)]
    assert texts([line])[0] == texts(chat("the quick\n", talker))[0] + texts(chat("the quick\n", other))[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("[b]the quick\n"))
    assert main(["chat", str(talker), "--against", str(other), "--cpu", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "[b]the quick" in shown
    assert shown.endswith("┘\n")


def test_long_conversations_lose_their_oldest_turns(talker: Path, chat: Chat) -> None:
    """The model has room for 512 tokens."""
    long = "the quick brown fox jumps over a lazy dog " * 12
    lines = chat(f"{long}\n{long}\n{long}\nso\n", talker)
    assert len(lines) == 4
    kept = turn("user", long.strip()) + turn("assistant", texts(lines)[2][0]) + turn("user", "so")
    assert texts(lines)[3] == [wanted(talker, kept + "<|im_start|>assistant\n")]


def test_adapter_state_and_run(talker: Path, chat: Chat, tmp_path: Path, plain: Path) -> None:
    adapter = lora(talker, tmp_path / "adapter", seed=1, size=0.2)
    prompt = turn("user", "the quick") + "<|im_start|>assistant\n"
    merged = loaded(talker, adapter, torch.float32).merge_and_unload()
    answer = wanted(talker, prompt, merged)
    assert texts(chat("the quick\n", adapter)) == [[answer]]
    state = MergeState.create(tmp_path / "state", base=talker, rule="average").add(adapter)
    assert texts(chat("the quick\n", state.folder)) == [[answer]]
    assert not list(Path("/tmp").glob("contmerge-*/merged"))


def test_a_run_without_a_merge(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    stages = [{"name": "a", "expert": str(talker)}]
    recipe = {"name": "x", "base_model": str(talker), "stages": stages, "merge": ["average"]}
    (run / "recipe.yml").write_text(seal_yaml(yaml.safe_dump(recipe)))
    assert main(["chat", str(run)]) == 2
    assert f"{run} holds no merged model yet. Finish the run: contmerge run" in capsys.readouterr().err


def test_bad_names_and_templates(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    assert main(["chat", "no model"]) == 2
    assert "There is no model at no model." in capsys.readouterr().err
    assert main(["chat", "."]) == 2
    broken = shutil.copytree(talker, tmp_path / "broken-template")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", str(broken), "--cpu"]) == 2
    assert "no system role" in capsys.readouterr().err


@pytest.fixture
def ctrl_c() -> Iterator[Callable[..., None]]:
    """Return a function that does what Ctrl-C does, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_one_answer(talker: Path, ctrl_c: Callable[..., None]) -> None:
    voice = Conversation.open(str(talker), Sampling(12, 0))
    with stoppable():
        with pytest.raises(Stopped), interruptible():
            voice.answer("the quick", ctrl_c)
        assert not voice.turns
        assert len(voice.answer("the quick", lambda _: None).split()) > 1


def test_an_error_after_ctrl_c_is_told_as_it_is(ctrl_c: Callable[..., None]) -> None:
    @stoppable()
    def talk() -> None:
        with pytest.raises(Stopped), interruptible():
            ctrl_c()
        raise ModelError("The chat template fails.")

    with pytest.raises(ModelError):
        talk()


def test_sigterm_ends_the_conversation(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, where Ctrl-C ends an answer alone."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("the quick\nnever\n"))
    monkeypatch.setattr(Conversation, "answer", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["chat", str(talker), "--cpu"]) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_in_a_terminal(talker: Path) -> None:
    """Ctrl-C ends the answers, not the conversation."""
    leader, follower = pty.openpty()
    words = ["chat", str(talker), "--against", str(talker), "--max-new-tokens", "400", "--cpu"]
    command = [sys.executable, "-m", "hf_contmerge.commands.main", *words]
    started = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm"},
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(follower)
    read = _Reader(leader)
    read.until("> ")
    os.write(leader, b"the quick\n")
    read.until("┏")  # the answers grow
    os.write(leader, b"\x03")
    read.until("[stopped]")
    read.until("> ")
    os.write(leader, b"/exit\n")
    assert started.wait(60) == 0


def _take_terminal() -> None:
    """Make standard input the controlling terminal, to which Ctrl-C belongs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs in the background ignore it, and hand that on
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class _Reader:
    """Reads a terminal until a text appears."""

    def __init__(self, leader: int) -> None:
        self._leader, self._seen = leader, ""

    def until(self, text: str, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < end, self._seen
            if select.select([self._leader], [], [], 1)[0]:
                self._seen += os.read(self._leader, 4096).decode(errors="replace")
        self._seen = self._seen.partition(text)[2]
