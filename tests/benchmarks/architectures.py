"""Write docs/architectures.md: architecture x mergekit x us, each cell tried.

    python tests/benchmarks/architectures.py [--out docs/architectures.md]

Takes some minutes on two cores; the network is not needed.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from toys.architectures import ARCHITECTURES, LAYOUTS, Cell, Tiny, build, by_hand, load, moved, try_cell

HEAD = """
# What we read as a model

What we read is what `from_pretrained` reads. What we write loads as what we computed. Anything else is refused with one
message before any work.

We merge by the names in the files and need no list of architectures: a new one works on the day it appears. Where names
leave a doubt, transformers is asked which weight each stored tensor becomes; its model is built without data. A model
with code of its own (`auto_map`) is merged by names alone, and its code is not run.

- **Files.** A `model.safetensors` comes first, then the shards in `model.safetensors.index.json`, with every tensor in
  them, listed or not. Other files next to them (`consolidated.safetensors`, `*.fp16.safetensors`, `pytorch_model.bin`,
  `original/`) are not read. A folder with both a model and an adapter is refused.
- **Buffers.** Old rotary frequencies, position ids and attention masks are no weights: they are left out. Other tensors
  that transformers ignores, such as the layers of multi-token prediction, are merged if the expert has them; else the
  base's are kept.
- **Names.** Old and new names of one weight are matched, with or without the inner model's prefix. Experts of a mixture
  stored one by one are matched with stacks. The merged model has the base's names.
- **Tied tables.** A tied head that is stored a second time counts once. A tied flag next to another stored head means
  two tables, as in transformers. An expert with a separate head is refused if the base ties its own.
- **Missing weights.** A base or expert that lacks a weight, which transformers would fill at random, is refused.
- **Function.** Fields of config.json that change what equal weights compute (rotary base and scaling, numbers of heads,
  activation, norm epsilon, sliding window, experts per token) must be the base's, and so must the tokens at equal
  numbers. Spellings of older releases count as equal. `contmerge merge add --force` skips this check. Other token ids,
  templates and added tokens give a warning: a merged model has the base's, unless training here set them.
- **What is copied and published.** Config, tokenizer, processor, templates, licence, and the code behind `auto_map`, by
  name. Trainer state, logs, notes and links out of the folder are not.

Under `mergekit-yaml`, mergekit reads the files itself. Where it would read other tensors than transformers, or names
differ, the recipe is refused; `contmerge merge from-recipe` takes it.

The table is written by `tests/benchmarks/architectures.py`. Each cell builds a tiny base and two experts, stores them
in that layout, merges them, loads the result with `from_pretrained`, and compares weights and logits with the average
of the loaded models in float64. mergekit's column is its own linear merge of the same models, in one file each: `by
names` means that the architecture is not in its list. A `no` there holds for this small configuration, as this release
of transformers saves it: other settings and older files of the same architecture may work.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cells: dict[tuple[str, str], Cell] = {}
    by_mergekit: dict[str, str] = {}
    for tiny in ARCHITECTURES:
        for layout in LAYOUTS:
            with tempfile.TemporaryDirectory() as scratch:
                cells[tiny.name, layout] = try_cell(tiny, layout, Path(scratch))
        with tempfile.TemporaryDirectory() as scratch:
            by_mergekit[tiny.name] = try_mergekit(tiny, Path(scratch))
        print(tiny.name, dict(Counter(cells[tiny.name, layout].outcome for layout in LAYOUTS)), by_mergekit[tiny.name])
    if by_mergekit["LlamaForCausalLM"] != "yes":  # the control: mergekit merges Llama, so the trial itself is broken
        sys.exit(f"mergekit: Llama is {by_mergekit['LlamaForCausalLM']}. The page is not written.")
    args.out.write_text(page(cells, by_mergekit), encoding="utf-8")


def try_mergekit(tiny: Tiny, folder: Path) -> str:
    """Return what mergekit makes of the same models in one file each."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    folders = [folder / name for name in ("base", "one", "two")]
    base = build(tiny)
    for model, place in zip([base, moved(base, 1), moved(base, 2)], folders, strict=True):
        model.save_pretrained(place)
    models = [{"model": str(place), "parameters": {"weight": 1.0}} for place in folders[1:]]
    recipe = MergeConfiguration.model_validate({"merge_method": "linear", "models": models, "dtype": "float32"})
    options = MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True)
    try:
        run_merge(recipe, str(folder / "out"), options)
    except Exception as error:  # whatever a user would see
        print(f"mergekit, {tiny.name}: {type(error).__name__}: {error}")
        return "no: an error"
    try:
        merged = load(tiny, folder / "out")
    except AssertionError as error:
        print(f"mergekit, {tiny.name}: {error}")
        return "no: weights are missing"
    wanted = by_hand([load(tiny, place) for place in folders])
    state = {name: tensor for name, tensor in merged.state_dict().items() if tensor.is_floating_point()}
    same = all(torch.allclose(tensor.double(), wanted[name], atol=1e-6) for name, tensor in state.items())
    return f"yes{_how(folders[0])}" if same else "other weights"


def _how(folder: Path) -> str:
    """Return how mergekit knows an architecture: by its list, or by the names in the files."""
    from mergekit.architecture import arch_info_for_config

    listed = arch_info_for_config(transformers.AutoConfig.from_pretrained(folder))
    return "" if listed else ", by names"


def page(cells: dict[tuple[str, str], Cell], by_mergekit: dict[str, str]) -> str:
    """Return the page."""
    counts = Counter(cell.outcome for cell in cells.values() if cell.outcome != "none")
    lines = [
        HEAD.strip(),
        "",
        "## Architectures",
        "",
        f"{len(ARCHITECTURES)} architectures, {counts.total()} cells: {counts['equal']} equal, {counts['refused']} "
        f"refused before work, {counts['silent']} silent. transformers {version('transformers')}, mergekit "
        f"{version('mergekit')}.",
        "",
        "| architecture | kind | layouts | equal | refused | mergekit, one file |",
        "|---|---|---|---|---|---|",
    ]
    for tiny in ARCHITECTURES:
        own = {layout: cells[tiny.name, layout].outcome for layout in LAYOUTS}
        tried = Counter(outcome for outcome in own.values() if outcome != "none")
        refused = ", ".join(layout for layout, outcome in own.items() if outcome == "refused") or "–"
        columns = [f"`{tiny.name}`", tiny.kind, tried.total(), tried["equal"], refused, by_mergekit[tiny.name]]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    lines += ["", "## Layouts", ""]
    lines += [f"- {layout}: {_first_line(layout)}" for layout in LAYOUTS]
    return "\n".join(lines) + "\n"


def _first_line(layout: str) -> str:
    text = (inspect.getdoc(LAYOUTS[layout]) or "").splitlines()[0]
    return text[0].lower() + text[1:]


if __name__ == "__main__":
    main()
