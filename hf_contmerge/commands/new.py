"""`contmerge new`: a commented recipe from three questions, or from flags.

    contmerge new mine.yml                                             asks on a terminal
    contmerge new mine.yml --base Qwen/Qwen3-0.6B --stage law=data/law.jsonl --stage code=model:me/coder --gpus 8

A source is a dataset (a file, a folder, a Hub id) or, with the prefix `model:`, a trained model. A local folder with a
config.json or an adapter_config.json is recognised as a model without the prefix. A benchmark's stages come in one of
its published orders:

    contmerge new bench.yml --base Qwen/Qwen3-0.6B --suite cl-standard --order 2
    contmerge new local.yml --base Qwen/Qwen3-0.6B --suite trace --data files/trace    the same from local files
    contmerge new experts.yml --base meta-llama/Llama-3.2-3B --suite mergebench        trained experts from the Hub
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.errors import RecipeError, ResourceError
from hf_contmerge.run.recipe.streams import Stream, stream_names, stream_orders, stream_rules, stream_stages
from hf_contmerge.run.recipe.text import parse_recipe, read_yaml
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.foreign import expanded

T = TypeVar("T")
_BLEND = "{rule: blend, start_from: previous, parameters: {keep: 0, take: 0.5}}"
"""The default where all stages are trained: docs/figures.md, cl-standard and the stream that was set aside."""
_MODEL = "model:"


@dataclass(frozen=True)
class Source:
    """One stage's dataset or trained model."""

    stage: str
    path: str
    is_model: bool


@dataclass(frozen=True)
class Answers:
    """The contents of a new recipe; `gpus` is 0 for a CPU."""

    name: str
    base: str
    sources: tuple[Source, ...]
    gpus: int
    rules: tuple[str, ...] = ()
    """None: the default."""
    stream: Stream | None = None
    """A benchmark's stages, instead of sources."""
    plugins: tuple[str, ...] = ()

    def stages_trained(self) -> list[bool]:
        """Say of each stage if it is trained, not given."""
        if self.stream:
            return [not s.expert for s in stream_stages(self.stream.suite, self.stream.order)]
        return [not s.is_model for s in self.sources]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge new`."""
    parser.add_argument("recipe", nargs="?", default="recipe.yml", help="the file to write (default: recipe.yml)")
    parser.add_argument("--base", metavar="MODEL", help="the pretrained model: a Hub id, a folder, a .gguf file")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=SOURCE",
        help="what to learn, in order: a dataset, or model:OWNER/MODEL for a trained model",
    )  # fmt: skip
    parser.add_argument(
        "--suite", metavar="NAME", help=f"the stages of a benchmark instead: {', '.join(stream_names())}"
    )
    parser.add_argument("--order", type=int, metavar="N", help="published order of the suite (default: the first)")
    parser.add_argument("--data", metavar="DIR", help="folder of the suite's local files (default: the Hub)")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs; 0: CPU only")
    parser.add_argument("--rule", action="append", default=[], metavar="RULE", help="merge rule (repeatable)")
    add_plugin_argument(parser)
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.set_defaults(do=new_command)


def new_command(args: argparse.Namespace) -> None:
    """Write a recipe from flags or answers; print the next commands.

    Raises:
        RecipeError: the file exists, a value is invalid, or questions remain without a terminal.
        ResourceError: the file cannot be written.
    """
    path = Path(args.recipe)
    if path.exists() and not args.force:
        raise RecipeError(f"{path} exists. Choose another file, or overwrite it with --force.")
    answers = _answers(args, path)
    text = recipe_text(answers, path.as_posix())
    parse_recipe(read_yaml(text), where=str(path))
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror}. Choose another file.") from error
    plan, launch = _next(answers, path.as_posix())
    print(f"Wrote {path}. Review it, then run:\n  {plan}\n  {launch}")


def recipe_text(answers: Answers, path: str) -> str:
    """Return a recipe as YAML with comments.

    Args:
        answers: contents of the recipe.
        path: its future file.
    """
    from hf_contmerge.merging.rules import make_rule

    for rule in answers.rules:
        make_rule(rule, {}, where="--rule")
    parts = (_head(answers, path), _stages(answers), _train(answers), _merge(answers), _evaluate(answers))
    return "\n".join(parts)


def _answers(args: argparse.Namespace, path: Path) -> Answers:
    base, stages = args.base, list(args.stage)
    if args.suite and stages:
        raise RecipeError("`--suite` and `--stage` both define the stages; give only one of them.")
    if args.suite:
        stream_stages(args.suite, args.order)  # known
    stream = Stream(suite=args.suite, order=args.order, data=args.data) if args.suite else None
    if not (base and (stages or stream)):
        _require_terminal(args)
        base = base or _ask("Which base model? (a Hub id, a folder, a .gguf file)", str)
        stages = stages or ([] if stream else _ask_stages())
        if args.gpus is None:
            args.gpus = _ask("How many GPUs will it run on? (0: CPU only)", int)
    if args.gpus is None:
        import torch

        args.gpus = torch.cuda.device_count()
    if args.gpus < 0:
        raise RecipeError(f"--gpus must be 0 or more; got {args.gpus}.")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._") or "mine"
    sources = tuple(parse_source(stage) for stage in stages)
    rules = tuple(args.rule) or (stream_rules(args.suite) if args.suite else ())
    return Answers(name, base, sources, args.gpus, rules, stream, tuple(args.plugin))


def parse_source(words: str) -> Source:
    """Parse NAME=SOURCE.

    Raises:
        RecipeError: the text has another form.
    """
    name, equals, path = words.partition("=")
    path = path.strip()
    is_model = path.startswith(_MODEL)
    path = path.removeprefix(_MODEL).strip()
    if not (name.strip() and equals and path):
        raise RecipeError(f"A stage is NAME=SOURCE, such as law=data/law.jsonl or code=model:me/coder; got {words!r}.")
    folder = expanded(path)
    is_model = is_model or any((folder / f).is_file() for f in ("config.json", "adapter_config.json"))
    return Source(name.strip(), path, is_model)


def _require_terminal(args: argparse.Namespace) -> None:
    if sys.stdin.isatty():
        return
    missing = [flag for flag, given in (("--base", args.base), ("--stage", args.stage or args.suite)) if not given]
    raise RecipeError(
        f"`contmerge new` needs a terminal for its questions, or flags; missing: {', '.join(missing)}. Give "
        "`--base MODEL --stage NAME=SOURCE [--stage ...] [--gpus N]`."
    )


def _ask(question: str, read: Callable[[str], T]) -> T:
    """Ask until the answer is valid.

    Raises:
        RecipeError: the input ended.
    """
    while True:
        try:
            answer = input(f"{question}\n> ").strip()
        except EOFError as error:
            raise RecipeError("The input ended before all questions were answered; no file was written.") from error
        try:
            if answer:
                return read(answer)
        except ValueError as error:  # includes RecipeError
            print(error)


def _ask_stages() -> list[str]:
    print(
        "What should it learn, in order? One NAME=SOURCE per line, an empty line to end; a source is a dataset\n"
        "(law=data/law.jsonl, chat=HuggingFaceH4/no_robots) or a trained model (code=model:me/coder)."
    )
    stages: list[str] = []
    while True:
        try:
            line = input(f"{len(stages) + 1}> ").strip()
        except EOFError as error:
            raise RecipeError("The input ended before all questions were answered; no file was written.") from error
        if not line and stages:
            return stages
        try:
            if line:
                parse_source(line)
                stages.append(line)
        except RecipeError as error:
            print(error)


def _scalar(word: str) -> str:
    """Return a word as YAML for a flow mapping.

    It is quoted as in JSON if necessary.
    """
    plain = re.fullmatch(r"[A-Za-z./~][\w./~-]*", word) and read_yaml(word) == word
    return word if plain else json.dumps(word, ensure_ascii=False)


def _next(answers: Answers, path: str) -> tuple[str, str]:
    """Return the commands to check and to run the recipe."""
    words = shlex.join([path, *(word for file in answers.plugins for word in ("--plugin", file))])
    ranks = f" --num-processes {answers.gpus}" if answers.gpus > 1 else ""
    return f"contmerge plan {words}", f"contmerge run {words}{ranks}"


def _head(answers: Answers, path: str) -> str:
    plan, launch = _next(answers, path)
    listed = ", ".join(_scalar(Path(os.path.relpath(p, Path(path).parent)).as_posix()) for p in answers.plugins)
    return (
        f"# Written by `contmerge new`. Comments explain each line; review it, then run:\n"
        f"#   {plan}      checks it and estimates memory, disk and time, without fetching weights\n"
        f"#   {launch}\n\n"
        f"name: {_scalar(answers.name)}    # the results go to runs/{answers.name}\n"
        f"base_model: {_scalar(answers.base)}    # a Hub id (owner/model, owner/model@revision), a folder, a .gguf\n"
        "seed: 0\n" + (f"plugins: [{listed}]    # code with the rules; it runs only with --plugin\n" if listed else "")
    )


def _stages(answers: Answers) -> str:
    if answers.stream:
        return _stream(answers.stream)
    lines = ["stages:    # learnt in this order; each is merged with all earlier ones"]
    for source in answers.sources:
        if source.is_model:
            lines.append(f"  - {{name: {_scalar(source.stage)}, expert: {_scalar(source.path)}}}    # already trained")
        else:
            data = f"{{path: {_scalar(source.path)}, heldout: 32}}"
            lines.append(f"  - {{name: {_scalar(source.stage)}, dataset: {data}}}")
    lines += [
        "  # heldout: number of examples excluded from training, to measure later forgetting of this stage.",
        "  # A dataset needs a column `text`, or `messages`, or `prompt` and `completion`. Otherwise name the column",
        '  # or format to read: dataset: {path: ..., text: "{question}\\n{answer}"}. Fewer examples: max_examples: 99.',
        "  # The vector between two models is a stage too: {name: chat, expert: owner/instruct, minus: owner/base}.",
    ]
    return "\n".join(lines) + "\n"


def _stream(stream: Stream) -> str:
    """Return a published stream as the recipe's stages."""
    data = f", data: {_scalar(stream.data)}" if stream.data else ""
    order = stream.order or next(iter(stream_orders(stream.suite)))
    names = ", ".join(stage.name for stage in stream_stages(stream.suite, order))
    lines = textwrap.wrap(f"Learnt in this order, each merged with all earlier ones: {names}.", 110,
                          initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)  # fmt: skip
    lines += [
        "  # With `data: DIR` from local files. Of each stage, `max_examples` (1000) are drawn to train on, and",
        "  # `test_examples` (500) to score.",
    ]
    return f"stages: {{suite: {_scalar(stream.suite)}, order: {order}{data}}}\n" + "\n".join(lines) + "\n"


def _train(answers: Answers) -> str:
    steps, batch, length, note = (
        (500, 8, 2048, "fill the GPU memory; `contmerge plan` reports the amount")
        if answers.gpus
        else (50, 2, 256, "small, for a CPU")
    )
    lines = [
        "train:    # any field of TRL's SFTConfig, by its own name"
        + ("" if any(answers.stages_trained()) else "; unused: all stages are trained"),
        "  strategy: [full, anchor]    # or, to save memory, lora, with parameters: {r: 16} below it",
        f"  max_steps: {steps}    # per stage; or num_train_epochs: 1",
        f"  per_device_train_batch_size: {batch}    # {note}",
        "  gradient_accumulation_steps: 1    # a larger batch without more memory",
        f"  max_length: {length}    # tokens; longer examples are cut",
        "  learning_rate: 1.0e-5    # about 1.0e-4 with lora",
        "  warmup_steps: 5",
        "  gradient_checkpointing: true    # less memory for a third more time",
        "  save_strategy: steps    # checkpoints, to resume inside a stage; the disk holds two at a time",
        f"  save_steps: {max(steps // 5, 1)}",
    ]
    return "\n".join(lines) + "\n"


def _merge(answers: Answers) -> str:
    from hf_contmerge.merge_rules import rule_names

    trained, rules = all(answers.stages_trained()), answers.rules
    lines = ["merge:    # all rules share the experts; the report compares them"]
    if trained and not rules:
        rules = ("blend", "magmax")
        lines += [
            "  # Half-way from the base to the last expert. With `take: auto` the share is searched after each stage.",
            f"  - {_BLEND}",
            "  # - {rule: magmax}    # keeps more of the earlier stages, less of the newest",
        ]
    else:
        rules = rules or ("magmax",)
        lines += [f"  - {{rule: {_scalar(rule)}}}" for rule in rules]
    others = ", ".join(rule for rule in rule_names() if rule not in rules)
    lines += textwrap.wrap(f"Others: {others}.", 110, initial_indent="  # ", subsequent_indent="  # ")
    lines.append("  # Parameters of a rule: {rule: magmax, parameters: {lambda: 0.5}}")
    if trained and answers.rules:
        lines += [
            "  # Half-way from the base to the last expert; keeps the newest stage where it was measured:",
            f"  # {_BLEND}",
        ]
    return "\n".join(lines) + "\n"


def _evaluate(answers: Answers) -> str:
    limit = "" if answers.gpus else "  limit: 200    # documents of each task; remove it on a GPU\n"
    return (
        "evaluate:\n"
        "  general_tasks: [arc_easy, hellaswag, piqa]    # abilities to keep; also a suite, such as general\n"
        f"{limit}"
        "  batch_size: auto\n"
        "# publish: {repo_id: me/my-model}    # then: contmerge push RUN\n"
    )
