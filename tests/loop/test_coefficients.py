"""Coefficients of a run: blend's search, factors by layer, weights by stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from toys.guarded import make_home, moved, recipe
from toys.models import perturbed

from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import MergePlace
from hf_contmerge.run.recipe.changes import changes
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train import main

Data = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("coefficients"))
    perturbed(home / "base", home / "side", seed=5, size=0.02)
    moved(home / "base", home / "half", home / "side", by=0.5)
    return home


def merged(run: Run, t: int) -> MergePlace:
    return run.merged(t, run.recipe.merge[0])


def from_mergekit(place: MergePlace, out: Path) -> str:
    config = MergeConfiguration.model_validate(yaml.safe_load(place.mergekit_recipe.read_text()))
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    return weights_sha256(out)


@pytest.mark.slow
def test_blend_searches_both_coefficients_and_its_record_repeats_the_merge(home: Path, tmp_path: Path) -> None:
    data = recipe(home, "quiet", "side", merge=[{"rule": "blend", "parameters": {"keep": "auto", "take": "auto"}}])
    run = run_recipe(parse_recipe(data), tmp_path / "run", until="merge")
    one, two = (merged(run, t).record("merge") for t in (1, 2))
    assert len({t["parameters"]["keep"] for t in one["tries"]}) == 1  # the first stage has nothing to keep
    assert len(one["tries"]) <= 8
    assert 9 <= len(two["tries"]) <= 17
    best = max(two["tries"], key=lambda t: t["objective"])
    assert best["taken"]
    assert two["parameters"] == best["parameters"]
    assert two["folded"][1]["chosen"] == two["parameters"]
    assert weights_sha256(merged(run, 2).model) == two["model_sha256"]
    assert from_mergekit(merged(run, 2), tmp_path / "again") == two["model_sha256"]
    before = weights_sha256(merged(run, 2).running)
    for t in (2, 1):
        merged(run, t).undo("merge")
    run = run_recipe(parse_recipe(data), tmp_path / "run", until="merge")
    assert merged(run, 2).record("merge")["model_sha256"] == two["model_sha256"]
    assert weights_sha256(merged(run, 2).running) == before


def test_the_share_of_the_newest_expert_is_searched_alone(home: Path, tmp_path: Path) -> None:
    """`contmerge new` offers this: half-way from the base to the last expert, or as far as the documents say."""
    entry = {"rule": "blend", "parameters": {"keep": 0, "take": "auto"}}
    run = run_recipe(parse_recipe(recipe(home, "side", "half", merge=[entry])), tmp_path / "run", until="merge")
    for t, expert in ((1, "side"), (2, "half")):
        record = merged(run, t).record("merge")
        assert 4 <= len(record["tries"]) <= 8
        assert {tried["parameters"]["keep"] for tried in record["tries"]} == {0}
        share = record["parameters"]["take"]
        assert share == next(tried["parameters"]["take"] for tried in record["tries"] if tried["taken"])
        wanted = load_file(moved(home / "base", tmp_path / expert, home / expert, by=share) / "model.safetensors")
        found = load_file(merged(run, t).model / "model.safetensors")
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.float(), wanted[name].float(), atol=1e-6, rtol=1e-5)


def test_weights_and_layers_of_an_entry_are_folded_and_recorded(home: Path, tmp_path: Path) -> None:
    entry = {"rule": "average", "weights": {"s2": 0.5}, "layers": {"first": 0.25}}
    run = run_recipe(parse_recipe(recipe(home, "loud", "side", merge=[entry])), tmp_path / "run", until="merge")
    record = merged(run, 2).record("merge")
    assert record["parameters"] == {"first_layer": 0.25}
    assert record["folded"] == [{"stage": 1, "replayed": False}, {"stage": 2, "replayed": False, "weight": 0.5}]
    assert from_mergekit(merged(run, 2), tmp_path / "again") == record["model_sha256"]


def test_the_first_layers_factor_is_searched(home: Path, tmp_path: Path) -> None:
    entry = {"rule": "average", "layers": {"first": "auto"}}
    run = run_recipe(parse_recipe(recipe(home, "loud", merge=[entry])), tmp_path / "run", until="merge")
    record = merged(run, 1).record("merge")
    assert record["parameters"].get("first_layer", 1.0) == next(
        t["parameters"].get("first_layer", 1.0) for t in record["tries"] if t["taken"]
    )
    assert 4 <= len(record["tries"]) <= 8


@pytest.mark.parametrize(
    ("entry", "said"),
    [({"rule": "average", "weights": {"law": 1}}, "has a weight for law, which is not a stage"),
     ({"rule": "magmax", "weights": {"s1": 0.5}}, "magmax cannot give experts weights"),
     ({"rule": "average", "layers": {"middle": 1}}, "middle"),
     ({"rule": "average", "weights": {"s1": "much"}}, "s1")],
)  # fmt: skip
def test_bad_coefficients_are_refused_before_any_work(
    entry: Data, said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(home, "quiet", merge=[entry])))
    assert main([str(tmp_path / "recipe.yml"), "--run", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run/stages").exists()


def test_three_coefficients_at_once_and_weights_under_a_ladder_are_refused(home: Path, tmp_path: Path) -> None:
    entry: Data = {"rule": "blend", "parameters": {"keep": "auto", "take": "auto"}, "layers": {"first": "auto"}}
    with pytest.raises(RecipeError, match="at most 2 can be searched together"):
        run_recipe(parse_recipe(recipe(home, "quiet", merge=[entry])), tmp_path / "a")
    guard = {"max_forgetting": 0.1, "ladder": [{"rule": "magmax"}]}
    data = recipe(home, "quiet", merge=[{"rule": "average", "weights": {"s1": 0.5}}], guard=guard)
    with pytest.raises(RecipeError, match=r"guard\.ladder\.0: magmax cannot give experts weights"):
        run_recipe(parse_recipe(data), tmp_path / "b")


def test_a_weight_for_a_new_stage_changes_no_earlier_merge(home: Path) -> None:
    def with_weights(experts: int, weights: Data) -> Any:
        names = ["quiet", "side", "half"][:experts]
        return parse_recipe(recipe(home, *names, merge=[{"rule": "average", "weights": weights}]))

    assert not list(changes(with_weights(2, {}), with_weights(3, {"s3": 0.5, "s1": 1.0})))
    found = list(changes(with_weights(2, {}), with_weights(2, {"s2": 0.5})))
    assert [(c.field, c.phase) for c in found] == [("merge.average.weights.s2", "merge")]
