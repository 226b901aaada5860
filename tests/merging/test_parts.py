"""A state of several parts, each with its own shape: what comes out, and that it depends on nothing else."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from toys import rules
from toys.loras import lora
from toys.models import perturbed, toy_llama
from toys.teams import Team

from hf_contmerge.loop.plan.disk import running_bytes
from hf_contmerge.merge_rules import Weight, get_rule
from hf_contmerge.merging import _fold, _pieces, costs
from hf_contmerge.merging.adapter import export_adapter
from hf_contmerge.merging.in_mergekit.plugin import RuleMethod
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights

Tensors = dict[str, torch.Tensor]
SPLIT = 9_000
"""Bytes of a state's file: a few weights each."""


@pytest.fixture(autouse=True)
def toy_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rules.installed(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base of three layers and three experts."""
    home = tmp_path_factory.mktemp("models")
    base = toy_llama(home / "base", seed=0, layers=3)
    return [base, *(perturbed(base, home / f"e{i}", seed=i, size=0.1 * i) for i in (1, 2, 3))]


def tensors(folder: Path) -> Tensors:
    weights = Weights(folder)
    return {name: weights.tensor(name) for name in weights.names}


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name not in ("state.json", "merge.json")}  # with the time


def exact(base: Path, experts: Sequence[Path]) -> tuple[Tensors, float, float]:
    """Return S (1 + depth) / (1 + m) in float64, and what the norms of the state and of the mean expert must be."""
    wide, vocabulary = {n: t.double() for n, t in tensors(base).items()}, Weights(base).vocabulary
    changes = [{n: t.double() - wide[n] for n, t in tensors(e).items()} for e in experts]
    found, squares = {}, 0.0
    for name, start in wide.items():
        total = sum((c[name] for c in changes), torch.zeros_like(start))
        depth = next((k / 2 for k in range(3) if f"layers.{k}." in name), 0.0)
        found[name] = total * (1 + depth)
        squares += float(total.square().sum())
        if is_matrix(name, start.shape, vocabulary):
            moment = torch.stack([c[name].square().mean(1) for c in changes]).sum(0)
            found[name] = found[name] / (1 + moment[:, None])
            squares += float(moment.square().sum())
    lengths = [sum(float(t.square().sum()) for t in c.values()) ** 0.5 for c in changes]
    return found, squares**0.5, sum(lengths) / len(lengths)


def assert_merged(merged: Path, base: Path, wanted: Tensors, scale: float) -> None:
    before, after = tensors(base), tensors(merged)
    for name, change in wanted.items():
        expected = before[name].double() + scale * change
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_by_one_and_at_once_equal_a_float64_fold(count: int, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    wanted, norm, _ = exact(base, experts[:count])
    at_once = MergeState.create(tmp_path / "batch", base=base, rule="rowscaled", gain=0.7).add(*experts[:count])
    appended = MergeState.create(tmp_path / "stream", base=base, rule="rowscaled", gain=0.7)
    for expert in experts[:count]:
        appended.add(expert)
    for state in (at_once, appended):
        assert state.log().running_norm == pytest.approx(norm, rel=1e-6)
        assert_merged(state.export(state.folder / "merged"), base, wanted, 0.7)
    assert contents(at_once.require_running()) == contents(appended.require_running())
    assert contents(at_once.folder / "merged") == contents(appended.folder / "merged")


def test_a_scale_of_the_whole_model_reads_the_norm_of_all_parts(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    wanted, norm, mean = exact(base, experts)
    state = MergeState.create(tmp_path / "state", base=base, rule="rownormed").add(*experts)
    assert state.scale() == pytest.approx(mean / norm, rel=1e-6)
    assert_merged(state.export(tmp_path / "merged"), base, wanted, mean / norm)


def test_files_hold_each_part_in_its_own_shape(models: list[Path], tmp_path: Path) -> None:
    base, rule = Weights(models[0]), get_rule("rowscaled")
    running = MergeState.create(tmp_path / "state", base=models[0], rule="rowscaled").add(models[1]).require_running()
    stored = load_file(running / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored[f"{name}::sum"].shape == base.shape(name) == (32, 64)
    assert stored[f"{name}::moment"].shape == (32,)
    assert "model.norm.weight::moment" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert sum(tensor.nbytes for tensor in stored.values()) == running_bytes(base, rule)
    read = Running(running)
    assert read.names() == set(base.floating())
    assert read.rank(name) is None
    parts = read.state(name)
    assert parts is not None
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == {"sum": (32, 64), "moment": (32,)}


@pytest.mark.parametrize("rule", ["rowscaled", "loudest"])
def test_all_parts_and_owners_of_a_weight_lie_in_files_of_one_number(
    rule: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that hosts, which share whole files, write no page of another's."""
    whole = MergeState.create(tmp_path / "whole", base=models[0], rule=rule).add(*models[1:])
    monkeypatch.setattr(_fold, "STATE_SHARD", SPLIT)
    split = MergeState.create(tmp_path / "split", base=models[0], rule=rule).add(*models[1:])
    files = sorted(split.require_running().glob("model-*.safetensors"))
    assert len(files) > 3
    places = {key: number for number, file in enumerate(files) for key in load_file(file)}
    if rule == "loudest":
        owners = sorted((split.require_running() / "owners").glob("model-*.safetensors"))
        places |= {f"{key}::owners": number for number, file in enumerate(owners) for key in load_file(file)}
    for _, keys in itertools.groupby(sorted(places), key=lambda key: key.partition("::")[0]):
        assert len({places[key] for key in keys}) == 1
    merged = [state.export(state.folder / "merged") for state in (whole, split)]
    assert contents(merged[0]) == contents(merged[1])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "per_host"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("rule", ["rowscaled", "rownormed", "loudest"])
def test_ranks_and_hosts_write_the_bytes_of_one_process(
    rule: str, size: int, per_host: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fold, "STATE_SHARD", SPLIT)
    base, *experts = models
    alone = MergeState.create(tmp_path / "alone", base=base, rule=rule).add(*experts[:2]).add(experts[2])
    alone.export(tmp_path / "alone-merged")
    state = MergeState.create(tmp_path / "team", base=base, rule=rule)
    team = Team(size, per_host)
    for new in (experts[:2], experts[2:]):
        for result in team.run(lambda crew, new=new: state.add(*new, crew=crew)):
            assert isinstance(result, MergeState), result
    team.run(lambda crew: state.export(tmp_path / "team-merged", crew=crew))
    assert contents(state.require_running()) == contents(alone.require_running())
    assert contents(tmp_path / "team-merged") == contents(tmp_path / "alone-merged")


def test_pieces_do_not_change_a_bit(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and norms have one part of their own shape, and are cut; matrices are not."""
    whole = MergeState.create(tmp_path / "whole", base=models[0], rule="rowscaled").add(*models[1:])
    monkeypatch.setattr(costs, "PIECE", 37)
    cut = MergeState.create(tmp_path / "cut", base=models[0], rule="rowscaled").add(*models[1:])
    assert contents(whole.require_running()) == contents(cut.require_running())
    merged = [tensors(state.export(state.folder / "merged")) for state in (whole, cut)]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_part_that_no_piece_fits_keeps_a_weight_whole() -> None:
    rule, table = get_rule("rowscaled"), Weight("w", False, 1, (600, 700))
    matrix = Weight("w", True, 1, (600, 700))
    cpu = torch.device("cpu")
    assert len(list(_pieces.pieces(rule, table, cpu))) > 1
    assert [piece.shape for piece in _pieces.pieces(rule, matrix, cpu)] == [(600, 700)]
    assert [piece.shape for piece in _pieces.pieces(get_rule("loudest"), table, cpu)] == [(600, 700)]


def test_owners_are_those_of_the_first_part(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    state = MergeState.create(tmp_path / "state", base=base, rule="loudest")
    for expert in experts:
        state.add(expert)
    running, start = Running(state.require_running()), tensors(base)
    changes = [torch.zeros(()), *({n: t - start[n] for n, t in tensors(e).items()} for e in experts)]
    owned = set()
    for name in start:
        owners, parts = running.owners(name), running.state(name)
        assert parts is not None
        for stage in owners.unique().tolist():
            owned.add(stage)
            mine = owners == stage
            assert torch.equal(parts["value"][mine], changes[stage][name][mine])
        if start[name].ndim == 2:
            loudest = torch.stack([c[name].norm(dim=1) for c in changes[1:]]).argmax(0) + 1
            assert torch.equal(owners, loudest[:, None].expand_as(owners).to(torch.uint8))
    assert owned >= {3}


def test_adapters_are_folded_as_the_models_that_they_make(models: list[Path], tmp_path: Path) -> None:
    base = models[0]
    adapters = [lora(base, tmp_path / f"a{i}", seed=i) for i in (1, 2)]
    weights, whole = Weights(base), []
    for adapter in adapters:
        expert, values = open_expert(adapter, weights, force=True), tensors(base)
        for name in weights.floating():
            change = expert.reader(name, values[name])(0, values[name].numel(), values[name].reshape(-1))
            values[name] = values[name] + change.reshape(values[name].shape)
        folder = perturbed(base, tmp_path / f"whole-{adapter.name}", seed=0, size=0.0)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        whole.append(folder)
    wanted, norm, _ = exact(base, whole)
    state = MergeState.create(tmp_path / "state", base=base, rule="rowscaled").add(*adapters)
    assert state.log().running_norm == pytest.approx(norm, rel=1e-5)
    assert not (state.require_running() / "factors").exists()
    assert_merged(state.export(tmp_path / "merged"), base, wanted, 0.5)
    export_adapter(state, tmp_path / "adapter", rank=32)
    expert = open_expert(tmp_path / "adapter", weights, force=True)
    name = "model.layers.2.self_attn.o_proj.weight"
    tensor = weights.tensor(name)
    change = expert.reader(name, tensor)(0, tensor.numel(), tensor.reshape(-1)).reshape(tensor.shape)
    torch.testing.assert_close(change.double(), 0.5 * wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "parameters"), [("rowscaled", {"gain": 0.3}), ("rownormed", {}), ("rownormed", {"scale": 0.2})]
)
def test_the_mergekit_method_gives_the_same_bits(
    rule: str, parameters: dict[str, float], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor, and after a pass over the whole models; depths are those of the base's layers."""
    monkeypatch.setitem(registry._METHODS, rule, RuleMethod(rule))
    base, *experts = models
    recipe = {
        "merge_method": rule, "base_model": str(base), "models": [{"model": str(e)} for e in experts],
        "dtype": "float32", "parameters": parameters,
    }  # fmt: skip
    LoaderCache.loaders.clear()
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True, copy_tokenizer=False))
    wanted, norm, mean = exact(base, experts)
    scale = parameters.get("gain") or parameters.get("scale") or mean / norm
    assert_merged(tmp_path / "theirs", base, wanted, scale)
    if "scale" not in parameters:
        state = MergeState.create(tmp_path / "state", base=base, rule=rule, **parameters).add(*experts)
        ours, theirs = tensors(state.export(tmp_path / "ours")), tensors(tmp_path / "theirs")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
