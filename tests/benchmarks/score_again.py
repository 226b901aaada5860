"""Scoring a model that has been scored before, against the first time.

    python tests/benchmarks/score_again.py             SmolLM2-135M with the quickstart's five tasks
    python tests/benchmarks/score_again.py --quick     a toy with toy tasks, to see that it works

The first `contmerge score` finds an empty cache and measures; the later ones give the same command again, each in a
process of its own. They must tell the same numbers.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # toys and toy recipes of the tests

LIMIT = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that the script works")
    parser.add_argument("--repeats", type=int, default=7, help="of the second time")
    parser.add_argument("--firsts", type=int, default=1, help="how often to begin with an empty cache")
    args = parser.parse_args()
    measure.contmerge("score")
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        model, run = tasks_of(home, quick=args.quick)
        print(measure.machine(home, "transformers", "lm_eval"), end="\n\n")
        compare(home, model, run, firsts=args.firsts, repeats=args.repeats)


def tasks_of(home: Path, *, quick: bool) -> tuple[str, Path]:
    """Write the tasks of the quickstart's recipe, as a run would; return the name of its model and the run folder."""
    from toys.recipes import toy_recipe

    from hf_contmerge import Run, load_recipe
    from hf_contmerge.loop.plan.checks import Circumstances, Prepared, checks_of_data
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.runtime.quickstart import quickstart_recipe

    recipe = toy_recipe("quickstart", home) if quick else load_recipe(quickstart_recipe())
    run = Run.open(recipe, home / "run")
    for check in checks_of_data(recipe, Prepared(resolve_model(recipe.base_model)), Circumstances(run.tasks)):
        check()
    return recipe.base_model, run.folder


def compare(home: Path, model: str, run: Path, *, firsts: int, repeats: int) -> None:
    """Measure the first time and the later ones; print a table, and what the target says."""
    out, cache = home / "scores.json", home / "cache"
    words = measure.contmerge("score", model, "--run", str(run), "--json", str(out))
    command = measure.Command(words, env={"HF_CONTMERGE_CACHE": str(cache)})
    costs: dict[str, list[measure.Cost]] = {"first": [], "again": []}
    for _ in range(firsts):
        if cache.exists():
            shutil.rmtree(cache)
        costs["first"].append(measure.run(command))
        first = told(out)
    for _ in range(repeats):
        costs["again"].append(measure.run(command))
        again = told(out)
        assert all(task.pop("cached") for task in again.values()), "measured again"
        assert again == {name: {k: v for k, v in task.items() if k != "cached"} for name, task in first.items()}
    print("\n".join(measure.cost_rows(costs)), end="\n\n")
    for what, figure in (("seconds", measure.wall), ("processor seconds", measure.cpu)):
        share = measure.median(costs["again"], figure) / measure.median(costs["first"], figure)
        print(measure.verdict(f"{what} of the second time / of the first", share, LIMIT))


def told(out: Path) -> dict[str, Any]:
    """Return task -> what was told of it."""
    return json.loads(out.read_text(encoding="utf-8"))["tasks"]


if __name__ == "__main__":
    main()
