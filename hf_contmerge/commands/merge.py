"""`contmerge merge`: merging without a run, incrementally or from a mergekit recipe."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.commands._rank import add_rank, rank_command
from hf_contmerge.errors import RecipeError, shell_word
from hf_contmerge.runtime.hiding import printable
from hf_contmerge.runtime.plugins import require_same

if TYPE_CHECKING:
    import torch

    from hf_contmerge.commands.parser import CommandParser
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.runtime.crew import Crew

    Kinds = argparse._SubParsersAction[CommandParser]

Do = Callable[[argparse.Namespace], None]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


_EXAMPLES = {
    "once": "contmerge merge Qwen/Qwen3-0.6B owner/law owner/code --rule magmax -o merged",
    "init": "contmerge merge init state --base Qwen/Qwen3-0.6B --rule opcm --set alpha=0.5",
    "add": "contmerge merge add state owner/law-expert path/to/medicine",
    "export": "contmerge merge export state merged --dtype bfloat16",
    "log": "contmerge merge log state",
    "drop": "contmerge merge drop state medicine",
    "owners": "contmerge merge owners state --out shares",
    "rank": "contmerge merge rank state --on law.jsonl,general.jsonl owner/law owner/code",
    "from-recipe": "contmerge merge from-recipe recipes/magmax.yml merged",
}


def add_arguments(parser: CommandParser) -> None:
    """Add the commands of `contmerge merge`."""
    kinds = parser.add_commands("WHAT")

    once = _command(kinds, "once", _once, "merge models: BASE EXPERT... ; the word may be left out", works=True)
    once.add_argument("base", metavar="BASE", help="a folder, a Hub id[@revision] or a .gguf file")
    _add_rule(once)
    _add_experts(once)
    once.add_argument("-o", "--out", required=True, metavar="OUT", help="a new folder for the merged model")
    _add_format(once)

    init = _command(kinds, "init", _init, "start an empty state", state=True)
    init.add_argument("--base", required=True, metavar="MODEL", help="a folder, a Hub id[@revision] or a .gguf file")
    _add_rule(init)

    add = _command(kinds, "add", _add, "fold experts into the state, in this order", state=True, works=True)
    _add_experts(add)

    export = _command(kinds, "export", _export, "write the merged model", state=True, works=True)
    export.add_argument("out", metavar="OUT")
    _add_format(export)
    export.add_argument("--as-adapter", action="store_true", help="write one peft LoRA adapter instead of a model")
    export.add_argument("--rank", type=int, help="rank of the adapter (default: exact)")

    log = _command(kinds, "log", _log, "list the folded experts, in order", state=True)
    add_json_argument(log)

    drop = _command(kinds, "drop", _drop, "remove a stage: rebuild from the other experts", state=True, works=True)
    drop.add_argument("stage", metavar="STAGE")

    owners = _command(kinds, "owners", _owners, "show each stage's share of the weights, by layer", state=True)
    owners.add_argument("--out", metavar="DIR", help="folder for the table and picture (default: the state folder)")

    add_rank(_command(kinds, "rank", rank_command, "rank experts by whom they would help or hurt", state=True))

    recipe = _command(kinds, "from-recipe", _from_recipe, "merge once, from a mergekit recipe", works=True)
    recipe.add_argument("recipe", metavar="RECIPE")
    recipe.add_argument("out", metavar="OUT")
    recipe.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)")
    recipe.add_argument(
        "--force", action="store_true", help="accept an adapter of another base, or a model of another configuration"
    )


def spelt_out(words: list[str]) -> list[str]:
    """Return the words after `merge` with `once`, where it was left out.

    A first word that is no command, nor nearly one, is a base. Folders and Hub ids with a slash always are.
    """
    first = words[0] if words else "-h"
    if first in _EXAMPLES or first in ("-h", "--help"):
        return words
    is_place = "/" in first or Path(first).exists()
    return words if not is_place and difflib.get_close_matches(first, _EXAMPLES) else ["once", *words]


def _add_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rule", required=True, help="magmax, opcm, average ...")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the rule")
    parser.add_argument(
        "--layers", type=float, nargs=2, metavar=("FIRST", "LAST"), help="factors on the change of first and last layer"
    )


def _add_experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experts", nargs="+", metavar="EXPERT", help="a full model or a peft adapter; a folder or a Hub id"
    )
    parser.add_argument(
        "--as", dest="stages", action="append", default=[], metavar="STAGE",
        help="its name in the log (default: its stage, repository or folder)",
    )  # fmt: skip
    parser.add_argument(
        "--weight", dest="weights", type=float, action="append", default=[], metavar="W",
        help="a factor on its task vector, one per expert (linear rules only)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="accept an adapter of another base, or a model of another configuration"
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the base's)")
    parser.add_argument("--rounding", help="of 16-bit weights: stochastic (default) or nearest")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a weights file (default: 5GB)")
    parser.add_argument("--tokenizer-from", metavar="MODEL", help="source of the tokenizer and chat template")


def _command(
    kinds: Kinds,
    name: str,
    do: Do,
    text: str,
    *,
    state: bool = False,
    works: bool = False,
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", example=_EXAMPLES[name])
    add_plugin_argument(parser)
    if state:
        parser.add_argument("state", metavar="STATE")
    if works:
        parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads (default: one per core)")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.set_defaults(do=do)
    return parser


def _once(args: argparse.Namespace) -> None:
    """Merge models through a state next to the output, which is removed."""
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.runtime.files import new_folder, remove, target_of

    crew = crew_of(args)
    size, parameters = crew.ranks.all(lambda: (_size(args.shard_size), _rule_parameters(args)))
    out = target_of(Path(args.out))
    with new_folder(out, crew.ranks):  # refused before any work; the export makes it again
        pass
    scratch = out.with_name(f".{out.name}.state")
    crew.ranks.first(remove, scratch)
    try:
        state = MergeState.create(scratch, base=args.base, rule=args.rule, crew=crew, **parameters)
        state.add(*args.experts, stages=args.stages, weights=args.weights, force=args.force, crew=crew)
        state.export(
            out, dtype=args.dtype, rounding=args.rounding, shard_size=size, tokenizer_from=args.tokenizer_from,
            crew=crew,
        )  # fmt: skip
        if crew.ranks.is_main:
            _print_log(state)
    finally:
        if crew.ranks.is_main:
            remove(scratch)
            if not any(out.iterdir()):
                out.rmdir()


def _rule_parameters(args: argparse.Namespace) -> dict[str, Any]:
    from hf_contmerge.merge_rules import COMMON
    from hf_contmerge.merging.rules import make_rule

    found = {**_parameters(args.set), **dict(zip(COMMON, args.layers or (), strict=False))}
    make_rule(args.rule, found)  # before `create`, whose own arguments (`base`) are no rule parameters
    return found


def _init(args: argparse.Namespace) -> None:
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.runtime.crew import Crew
    from hf_contmerge.runtime.ranks import find_ranks

    crew = Crew(ranks=find_ranks())
    parameters = crew.ranks.all(_rule_parameters, args)
    state = MergeState.create(args.state, base=args.base, rule=args.rule, crew=crew, **parameters)
    _say(f"{state.folder} is ready. Next: contmerge merge add {shell_word(state.folder)} EXPERT")


def _add(args: argparse.Namespace) -> None:
    crew = crew_of(args)
    state = _state(args, crew)
    if crew.ranks.first(state.finish_add, args.experts, args.stages, args.weights):
        _say("These experts are the newest ones already; nothing was added.")
    else:
        state.add(*args.experts, stages=args.stages, weights=args.weights, force=args.force, crew=crew)
    _print_log(state)


def _export(args: argparse.Namespace) -> None:

    crew = crew_of(args)
    state = _state(args, crew)
    if args.as_adapter:
        from hf_contmerge.merging.adapter import export_adapter

        errors = export_adapter(state, Path(args.out), rank=args.rank, crew=crew)
        worst = max(errors, key=lambda name: errors[name])
        _say(f"{args.out}: {len(errors)} modules; largest relative error {errors[worst]:.1e} ({worst})")
        return
    size = crew.ranks.all(_model_shard_size, args)
    state.export(
        args.out, dtype=args.dtype, rounding=args.rounding, shard_size=size, tokenizer_from=args.tokenizer_from,
        crew=crew,
    )  # fmt: skip
    if crew.ranks.is_main:
        _say(f"Wrote {args.out}. {_kept(state.exports()[-1])}.")


def _log(args: argparse.Namespace) -> None:
    state = _load(args.state)
    if args.json:
        print_json({**state.log().to_json(), "scale": state.scale(), "exports": state.exports()})
    else:
        _print_log(state)


def _drop(args: argparse.Namespace) -> None:
    crew = crew_of(args)
    state = _state(args, crew)
    if crew.ranks.first(state.finish_drop, args.stage):
        _say(f"{args.stage} was dropped already.")
    else:
        state.drop(args.stage, crew=crew)
    _print_log(state)


def _owners(args: argparse.Namespace) -> None:
    from hf_contmerge.merging.analysis import write_ownership
    from hf_contmerge.runtime.crew import Crew
    from hf_contmerge.runtime.ranks import find_ranks

    crew = Crew(ranks=find_ranks())
    state = _state(args, crew)
    out = Path(args.out or args.state)
    table, picture = crew.ranks.first(write_ownership, state, out)
    _say(f"Shares:  {table}\nPicture: {picture}")


def _from_recipe(args: argparse.Namespace) -> None:
    from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe
    from hf_contmerge.merging.in_mergekit.replay import carry_out

    crew = crew_of(args)
    recipe, size = crew.ranks.first(lambda: (read_mergekit_recipe(Path(args.recipe)), _size(args.shard_size)))
    found = carry_out(recipe, Path(args.out), shard_size=size, crew=crew, force=args.force)
    if crew.ranks.is_main:
        norms = ", ".join(f"{n:.4g}" for n in found.norms.experts)
        _say(f"Wrote {args.out}: {recipe.rule}, scale {found.scale:.6g}, norms of the task vectors {norms}")


def _print_log(state: MergeState) -> None:
    log, rule = state.log(), state.rule()
    words = ", ".join(f"{k}={v}" for k, v in rule.parameters().items())
    _say(f"{log.rule}({words}) on {log.base}")
    for number, e in enumerate(log.experts, 1):
        weight = "" if e.weight == 1.0 else f"  weight {e.weight:g}"
        _say(f"{number:4d}  {e.stage:20s} {e.kind:8s} |D| {e.norm:10.4f}  {e.sha256[:12]}  {e.model}{weight}")
    _say(f"scale {rule.scale(log.norms()):.6g}, |running| {log.running_norm:.4f}" if log.experts else "no expert yet")
    if trust := log.trust():
        _say(trust.in_words())
    for e in state.exports():
        _say(f"written after {e['experts']} experts: {e['model']}, {_kept(e)}")


def _kept(export: dict[str, Any]) -> str:
    from hf_contmerge.models.survival import Survival

    return Survival.read(export).in_words()


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(printable(text))


def _state(args: argparse.Namespace, crew: Crew) -> MergeState:
    return crew.ranks.first(_load, args.state)


def _load(folder: str) -> MergeState:
    """Load the state in a folder.

    Raises:
        RunError: the folder holds no state, or its rule's plugin is missing or changed.
    """
    from hf_contmerge.merging.state import MergeState

    state = MergeState.load(folder)
    require_same(state.log().versions, folder, cure=", or start the state anew")
    return state


def crew_of(args: argparse.Namespace) -> Crew:
    """Return the crew of `--device` and `--workers`."""
    import torch

    from hf_contmerge.runtime.crew import Crew
    from hf_contmerge.runtime.progress import progress_bar
    from hf_contmerge.runtime.ranks import find_ranks

    ranks = find_ranks()
    device = ranks.all(_device, args.device, args.workers)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", ranks.rank % ranks.per_host % torch.cuda.device_count())
    return Crew(ranks=ranks, workers=args.workers, device=device, bar=progress_bar)


def _device(name: str, workers: int) -> torch.device:
    import torch

    if workers < 0:
        raise RecipeError(f"--workers {workers}: give a number of threads, or omit it for one per core.")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: unknown device. Give cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: CUDA is missing on this machine or in this torch. Use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0.")
    return device


def _model_shard_size(args: argparse.Namespace) -> int:
    if args.rank is not None:
        raise RecipeError("--rank belongs to --as-adapter: a model has no rank. Give both, or neither.")
    return _size(args.shard_size)


def _parameters(settings: list[str]) -> dict[str, Any]:
    import yaml

    from hf_contmerge.run.recipe.text import read_yaml

    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting}: expected NAME=VALUE, as in --set alpha=0.5.")
        try:
            found[name.strip()] = read_yaml(value)
        except yaml.YAMLError:
            found[name.strip()] = value
    return found


def _size(text: str) -> int:
    """Parse a number of bytes: 5GB, 500MB, 1000.

    Raises:
        RecipeError: the text is no size.
    """
    number = text.upper().rstrip("KMGTB")
    unit = text.upper()[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError) as error:
        raise RecipeError(f"Invalid size {text!r}. Give a number and KB, MB, GB or TB, as in 5GB.") from error
    if size < 1:
        raise RecipeError(f"A shard of {text} is empty. Give a size such as 5GB.")
    return size
