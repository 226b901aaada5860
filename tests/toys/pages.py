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
_SAVED = re.compile(r"\b[Ss]ave (?:this|it) as `([\w./-]+)`")


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
        blocks.append(Block(page, number, match[1], match[2], saved[1] if saved else None))
    return blocks


# The folder


def make_world(folder: Path) -> None:
    """Fill a folder with toys: the models, adapters, texts and recipes that the pages name."""
    base = toy_llama(folder / "Qwen/Qwen3-0.6B", seed=0)
    for name in ("owner/base", "owner/its-base", "owner/model", "HuggingFaceTB/SmolLM2-135M"):
        shutil.copytree(base, folder / name)
    experts = ("owner/law", "owner/medicine", "owner/law-expert", "owner/instruct", "owner/coder", "path/to/medicine",
               "path/to/expert", "path/to/model", "me/coder", "HuggingFaceTB/SmolLM2-135M-Instruct")  # fmt: skip
    for seed, name in enumerate(experts, 1):
        perturbed(base, folder / name, seed=seed, size=0.01)
    for seed, name in enumerate(("owner/law-lora", "owner/code-lora", "path/to/adapter"), 1):
        lora(base, folder / name, seed=seed)
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
    turns = [{"role": "user", "content": "what lays eggs"}, {"role": "assistant", "content": "the hen"}]
    write_jsonl(folder / "data/chat.jsonl", [{"messages": turns}] * 48)


def smaller(text: str) -> str:
    """Return a page's recipe with two steps a stage, and without tasks that only the Hub has."""
    fields = read_yaml(text)
    fields["train"] = {**fields.get("train", {}), "max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0}
    for stage in fields["stages"]:
        if "dataset" in stage:
            given = stage["dataset"] if isinstance(stage["dataset"], dict) else {"path": stage["dataset"]}
            stage["dataset"] = {**given, "heldout": 3}
        stage.pop("tasks", None)
    evaluate: dict[str, Any] = fields.get("evaluate", {})
    local = [task for task in evaluate.get("general_tasks", ()) if isinstance(task, dict)]
    fields["evaluate"] = {**evaluate, "general_tasks": local}
    return yaml.safe_dump(fields, sort_keys=False)
