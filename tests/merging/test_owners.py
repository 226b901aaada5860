"""Whose weights a merged model is made of: counted again from the experts, drawn, refused where none is selected."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toys.models import perturbed, toy_llama
from toys.rules import PLAIN

from hf_contmerge.commands.main import main
from hf_contmerge.errors import RunError
from hf_contmerge.merge_rules import get_rule, rule_names
from hf_contmerge.merging.analysis import draw_ownership, ownership, write_ownership
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.weights import Weights

Tensors = dict[str, torch.Tensor]
LAYERS = ["embed_tokens", "layer 0", "layer 1", "norm", "all"]
SELECTING = [n for n in rule_names() if get_rule(n).selects]


def tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def counted(owners: Tensors, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the shares of each layer from the owner of each element."""

    def shares(names: Sequence[str]) -> dict[str, float]:
        flat = torch.cat([owners[n].reshape(-1) for n in names])
        return {stage: float((flat == i).double().mean()) for i, stage in enumerate(("base", *stages))}

    layers = {f"layer {i}": [n for n in owners if f".{i}." in n] for i in range(2)}
    return {
        "embed_tokens": shares(["model.embed_tokens.weight"]),
        **{layer: shares(names) for layer, names in layers.items()},
        "norm": shares(["model.norm.weight"]),
        "all": shares(list(owners)),
    }


def owners_by_magnitude(base: Tensors, experts: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """MagMax looked at from its end: the largest change owns; of equal ones the last, unless it is the same value."""
    found = {}
    for name, b in base.items():
        changes = torch.stack([torch.zeros_like(b), *(e[name] - b for e in experts)])
        best = changes.abs().max(0).values
        largest = changes.abs() == best
        last = largest.shape[0] - 1 - largest.flip(0).float().argmax(0)
        value = changes.gather(0, last[None])[0]
        # The owner is the one that last changed the value: go back while the largest before is the very same.
        owner = last.clone()
        for stage in range(len(experts), 0, -1):
            earlier = changes[:stage]
            same = (owner == stage) & (earlier.abs() == best).any(0)
            previous = stage - 1 - (earlier.abs() == best).flip(0).float().argmax(0)
            keeps = same & (earlier.gather(0, previous[None])[0] == value)
            owner = torch.where(keeps, previous, owner)
        found[name] = owner
    return found


def sequential(base: Path, folder: Path, count: int) -> list[Path]:
    """Write experts, each trained on from the one before: a third of its weights stay, and some turn back exactly."""
    start, noise, experts = tensors(base), torch.Generator().manual_seed(0), list[Path]()
    values = start
    for i in range(count):
        moved = {}
        for name, value in values.items():
            change = 0.01 * torch.randn(value.shape, generator=noise)
            draw = torch.rand(value.shape, generator=noise)
            moved[name] = torch.where(
                draw < 0.66, value + change, value
            )  # the rest: an exact tie with the stage before
            if i:
                moved[name] = torch.where(draw > 0.95, start[name] - (value - start[name]), moved[name])
        moved["model.norm.weight"] = start["model.norm.weight"].clone()  # frozen: nobody's
        values = moved
        expert = perturbed(base, folder / f"stage{i}", seed=0, size=0.0)
        save_file(values, expert / "model.safetensors", metadata={"format": "pt"})
        experts.append(expert)
    return experts


@pytest.fixture(scope="module")
def experts(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sequential(base_folder, tmp_path_factory.mktemp("experts"), 4)


def test_shares_are_those_counted_from_sequential_experts(
    base_folder: Path, experts: list[Path], tmp_path: Path
) -> None:
    """Added one by one or at once; exact ties keep their owner, what all left alone is the base's."""
    by_one = MergeState.create(tmp_path / "one", base=base_folder, rule="magmax")
    for i, expert in enumerate(experts, 1):
        by_one.add(expert)
        stages = [f"stage{k}" for k in range(i)]
        owners = owners_by_magnitude(tensors(base_folder), [tensors(e) for e in experts[:i]])
        found = ownership(Weights(base_folder), by_one.require_running(), stages)
        assert found == {layer: pytest.approx(v, abs=1e-12) for layer, v in counted(owners, stages).items()}
        assert list(found) == LAYERS
        running = Running(by_one.require_running())
        assert all(torch.equal(running.owners(n).long(), o) for n, o in owners.items() if n in running.names())
    assert found["norm"] == {"base": 1.0, **dict.fromkeys(stages, 0.0)}
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-12) for shares in found.values())
    assert all(0 < found["all"][name] < 1 for name in ("base", *stages))
    at_once = MergeState.create(tmp_path / "all", base=base_folder, rule="magmax").add(*experts)
    assert ownership(Weights(base_folder), at_once.require_running(), stages) == found


def test_random_mix_gives_each_stage_its_share(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    """Of about 40,000 weights, each stage's share is a third to within five standard deviations."""
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="random_mix").add(*expert_folders)
    shares = ownership(Weights(base_folder), state.require_running(), ["a", "b", "c"])["all"]
    spread = (2 / 9 / Weights(base_folder).numel()) ** 0.5
    assert shares["base"] == pytest.approx(0, abs=1e-4)
    assert all(shares[s] == pytest.approx(1 / 3, abs=5 * spread) for s in "abc")
    running, base = Running(state.require_running()), tensors(base_folder)
    for name, b in base.items():
        taken = torch.stack([torch.zeros_like(b), *(tensors(e)[name] - b for e in expert_folders)])
        owner = running.owners(name).long()
        state_of = running.state(name)
        assert state_of is not None
        assert torch.equal(taken.gather(0, owner[None])[0], state_of[""]), "the owner's value is there"


def test_dropping_a_stage_numbers_the_owners_anew(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="magmax").add(*expert_folders)
    state.drop(state.log().experts[0].stage)
    stages = [e.stage for e in state.log().experts]
    shares = ownership(Weights(base_folder), state.require_running(), stages)["all"]
    assert shares.keys() == {"base", "expert2", "expert3"}
    assert shares["expert2"] == pytest.approx(0.5, abs=0.02)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


def test_a_base_that_all_experts_equal(base_folder: Path, tmp_path: Path) -> None:
    """And a stage that is called as the base's own row is."""
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="magmax").add(base_folder)
    assert [e.stage for e in state.log().experts] == ["base"]
    table, picture = write_ownership(state, tmp_path / "out")
    shares = json.loads(table.read_text())["layers"]
    assert shares == {layer: {"base": 1.0, "base (stage)": 0.0} for layer in LAYERS}
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("rule", SELECTING)
def test_numbers_and_picture_are_written(
    rule: str, base_folder: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule=rule).add(*experts)
    assert main(["merge", "owners", str(state.folder), "--out", str(tmp_path / "new" / "out")]) == 0
    table, picture = tmp_path / "new/out/owners.json", tmp_path / "new/out/owners.png"
    assert capsys.readouterr().out == f"Shares:  {table}\nPicture: {picture}\n"
    found = json.loads(table.read_text())
    stages = [f"stage{i}" for i in range(4)]
    assert (found["rule"], found["base"], found["stages"]) == (rule, str(base_folder), stages)
    assert found["layers"] == ownership(Weights(base_folder), state.require_running(), stages)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 300
    assert main(["merge", "owners", str(state.folder)]) == 0
    assert (state.folder / "owners.json").read_bytes() == table.read_bytes()
    state.export(tmp_path / "still whole")


@pytest.mark.parametrize("rule", [n for n in PLAIN if n not in SELECTING])
def test_rules_that_select_nothing_are_refused(
    rule: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule=rule).add(expert_folders[0])
    with pytest.raises(RunError, match=rf"{rule} mixes experts .* Use magmax or random_mix\."):
        write_ownership(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (state.require_running() / "owners").exists()


def test_before_the_first_expert(base_folder: Path, tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="magmax")
    with pytest.raises(RunError, match="holds no expert yet"):
        write_ownership(state, tmp_path / "out")


def test_weights_outside_the_layers_go_by_their_names(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, tied=False, layers=11)
    state = MergeState.create(tmp_path / "state", base=base, rule="magmax")
    state.add(perturbed(base, tmp_path / "expert", seed=1, size=0.01))
    found = ownership(Weights(base), state.require_running(), ["expert"])
    assert list(found) == ["embed_tokens", *(f"layer {i}" for i in range(11)), "lm_head", "norm", "all"]


@pytest.mark.parametrize("stages", [1, 30])
def test_a_picture_of_many_layers_stays_readable(stages: int, tmp_path: Path) -> None:
    """80 layers and 30 stages: the picture grows, within what a page can show."""
    rows = ["base", *(f"a stage with a rather long name {i}" for i in range(stages))]
    shares = {f"layer {i}": dict.fromkeys(rows, 1 / len(rows)) for i in range(80)}
    draw_ownership({**shares, "all": shares["layer 0"]}, rows, tmp_path / "owners.png")
    with Image.open(tmp_path / "owners.png") as image:
        assert 1500 <= image.width <= 6000
        assert 300 <= image.height <= 3000
