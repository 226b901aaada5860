"""The fenced blocks of README and docs/, and a folder in which their commands work: toys have the models' names."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.run.recipe.text import read_yaml
from toys import ROOT
from toys.loras import lora
from toys.models import TEXT, perturbed, toy_llama, write_jsonl

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
_NOT_RUN = re.compile(r"#.*?\bnot run: ([^)\n]+)")
_SAVED = re.compile(r"\b[Ss]ave (?:this|it)\s+as\s+`([\w./-]+)`")
_NAMED = re.compile(r"# ([\w./-]+\.(?:yml|py))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    number: int
    language: str
    text: str
    file: str | None
    """The file as which the page asks its reader to save it."""

    @property
    def reason(self) -> str | None:
        """Return why the tests do not run it, from a comment on a line of its own at the top."""
        lines = takewhile(lambda line: line.startswith("#"), self.text.splitlines())
        return next(filter(None, map(not_run, lines)), None)

    def commands(self) -> Iterator[str]:
        """Yield the command lines, continued lines joined."""
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if line.strip() and not line.startswith("#"):
                yield line


def not_run(text: str) -> str | None:
    """Return the reason of a comment `not run: REASON`."""
    match = _NOT_RUN.search(text)
    return match[1].strip() if match else None


def blocks_of(page: Path) -> list[Block]:
    """Return a page's blocks in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for number, match in enumerate(_FENCE.finditer(text)):
        saved = _SAVED.search(text[: match.start()].rstrip().removesuffix(":").rsplit("\n\n", 1)[-1])
        saved = saved or _NAMED.match(match[2])
        blocks.append(Block(page, number, match[1], match[2], saved[1] if saved else None))
    return blocks


# The folder

QUIZ: dict[str, Any] = {"name": "quiz", "kind": "multiple_choice", "dataset": "quiz.jsonl"}
"""A task in the place of those on the Hub."""


def make_world(folder: Path) -> None:
    """Fill a folder with toys: the models, adapters, texts and recipes that the pages name."""
    base = toy_llama(folder / "Qwen/Qwen3-0.6B", seed=0)
    for name in ("owner/base", "owner/its-base", "owner/model"):
        shutil.copytree(base, folder / name)
    owned = [f"owner/{name}" for name in ("law", "medicine", "law-expert", "instruct", "coder")]
    paths = [f"path/to/{name}" for name in ("medicine", "expert", "model")]
    experts = [*owned, *paths, "me/coder", "experts/law", "experts/law-2"]
    for seed, name in enumerate(experts, 1):
        perturbed(base, folder / name, seed=seed, size=0.01)
    for seed, name in enumerate(("owner/law-lora", "owner/code-lora", "path/to/adapter"), 1):
        lora(base, folder / name, seed=seed)
        config = folder / name / "adapter_config.json"
        config.write_text(config.read_text().replace(str(base), "Qwen/Qwen3-0.6B"))
    _write_texts(folder)
    for name in ("recipes", "hf_contmerge"):
        (folder / name).symlink_to(ROOT / name)


def _write_texts(folder: Path) -> None:
    lines = TEXT.strip().splitlines()
    (folder / "data").mkdir()
    for name in ("law", "medicine", "code", "general"):
        rows = [{"text": f"{name} {i}: {lines[i % len(lines)]}"} for i in range(48)]
        for place in (folder, folder / "data"):
            write_jsonl(place / f"{name}.jsonl", rows)
    words = TEXT.split()
    asked = [f"what comes after {word}, number {i}" for i, word in enumerate(words[:48])]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": w}] for q, w in zip(asked, words[1:])]  # noqa: B905
    write_jsonl(folder / "data/chat.jsonl", [{"messages": two} for two in turns])
    rows = [{"query": "the quick", "choices": ["brown", "fox", "red"], "gold": i % 3} for i in range(12)]
    write_jsonl(folder / "quiz.jsonl", rows)


def smaller(text: str) -> str:
    """Return a page's recipe with two steps a stage, and a local task in the place of those on the Hub."""
    fields = read_yaml(text)
    fields["train"] = {**fields.get("train", {}), "max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0}
    for stage in fields["stages"]:
        if "dataset" in stage:
            given = stage["dataset"] if isinstance(stage["dataset"], dict) else {"path": stage["dataset"]}
            stage["dataset"] = {**given, "heldout": 3}
        stage.pop("tasks", None)
    fields["evaluate"] = {**fields.get("evaluate", {}), "general_tasks": [QUIZ]}
    return yaml.safe_dump(fields, sort_keys=False)
