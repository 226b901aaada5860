"""Rules that need statistics of their experts: what they are given, and who is refused without."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from toys import rules
from toys.loras import lora
from toys.models import perturbed, toy_llama
from toys.teams import Team

from hf_contmerge import merge_rules
from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.costs import PIECE_ON_GPU, Passage, stream_job
from hf_contmerge.merging.in_mergekit.plugin import MergekitRecipeError, RuleMethod
from hf_contmerge.merging.state import MergeState
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import expert_sha256, open_expert
from hf_contmerge.models.statistics import Statistics, check_statistics, write_statistics
from hf_contmerge.models.weights import Weights

Tensors = dict[str, torch.Tensor]
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)
LEFT_OUT = "model.layers.0.self_attn.o_proj.weight"
"""A linear map without statistics, as a stack of experts has none."""


@pytest.fixture(autouse=True)
def toy_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rules.installed(monkeypatch)


def measured(base: Path, expert: Path, *, seed: int, diagonal: bool = False) -> Path:
    """Write made-up second moments next to an expert; those of q, k and v are one, as in real models."""
    weights, moments, draw = Weights(base), Tensors(), torch.Generator().manual_seed(seed)
    for name in sorted(weights.names, key=lambda n: (".k_proj" in n, n)):
        shape = weights.shape(name)
        if is_matrix(name, shape, weights.vocabulary) and name != LEFT_OUT:
            x = torch.randn(3 * shape[1], shape[1], generator=draw)
            moments[name] = x.square().mean(0) if diagonal else x.T @ x / len(x)
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        shared = moments.pop(f"{at}.q_proj.weight")
        for word in "qkv":
            moments.pop(f"{at}.{word}_proj.weight", None)
            moments[f"{at}.{word}_proj.weight"] = shared.clone()
    write_statistics(expert / "statistics", "inputs", moments, {"tokens": 1}, expert_sha256=expert_sha256(expert))
    return expert


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three experts with statistics."""
    home = tmp_path_factory.mktemp("models")
    base = toy_llama(home / "base", seed=0)
    experts = (perturbed(base, home / f"e{i}", seed=i, size=0.05) for i in (1, 2, 3))
    return [base, *(measured(base, expert, seed=i) for i, expert in enumerate(experts))]


def tensors(folder: Path) -> Tensors:
    weights = Weights(folder)
    return {name: weights.tensor(name) for name in weights.names}


def exact(base: Path, experts: Sequence[Path]) -> Tensors:
    """Return the merged model in float64: (sum D G)(sum G)^-1 for linear maps, else the mean."""
    start, vocabulary, found = tensors(base), Weights(base).vocabulary, Tensors()
    files = [load_file(e / "statistics/inputs.safetensors") for e in experts]
    changed = [tensors(e) for e in experts]
    for name, value in start.items():
        changes = [c[name].double() - value.double() for c in changed]
        if not is_matrix(name, value.shape, vocabulary):
            found[name] = value.double() + torch.stack(changes).mean(0)
            continue
        shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        grams = [f.get(shared, torch.ones(value.shape[1])).double() for f in files]
        grams = [g if g.ndim == 2 else g.diag() for g in grams]
        product = torch.stack([d @ g for d, g in zip(changes, grams, strict=True)]).sum(0)
        found[name] = value.double() + product @ torch.stack(grams).sum(0).inverse()
    return found


def assert_merged(merged: Path, wanted: Tensors) -> None:
    for name, tensor in tensors(merged).items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_each_expert_is_folded_with_its_own_statistics(count: int, models: list[Path], tmp_path: Path) -> None:
    """One by one and at once; a single expert comes out whole, and a map without statistics is still folded."""
    base, *experts = models[: count + 1]
    wanted = exact(base, experts)
    at_once = MergeState.create(tmp_path / "batch", base=base, rule="gramweighted").add(*experts)
    appended = MergeState.create(tmp_path / "stream", base=base, rule="gramweighted")
    for expert in experts:
        appended.add(expert)
    for state in (at_once, appended):
        assert_merged(state.export(state.folder / "merged"), wanted)
    files = [(s.require_running() / "model.safetensors").read_bytes() for s in (at_once, appended)]
    assert files[0] == files[1]
    if count == 1:
        assert_merged(at_once.folder / "merged", {n: t.double() for n, t in tensors(experts[0]).items()})


def test_wide_maps_come_with_their_diagonal(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_rules, "INPUTS_LIMIT", 16)
    base = models[0]
    experts = [shutil.copytree(e, tmp_path / e.name) for e in models[1:3]]
    for seed, expert in enumerate(experts):
        measured(base, expert, seed=seed, diagonal=True)
    state = MergeState.create(tmp_path / "state", base=base, rule="gramweighted").add(*experts)
    assert_merged(state.export(tmp_path / "merged"), exact(base, experts))


def test_ranks_and_hosts_give_the_bytes_of_one_process(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    alone = MergeState.create(tmp_path / "alone", base=base, rule="gramweighted").add(*experts)
    state = MergeState.create(tmp_path / "team", base=base, rule="gramweighted")
    for result in Team(4, 2).run(lambda crew: state.add(*experts, crew=crew)):
        assert isinstance(result, MergeState), result
    files = [(s.require_running() / "model.safetensors").read_bytes() for s in (alone, state)]
    assert files[0] == files[1]


def test_a_small_memory_knows_of_them(models: list[Path]) -> None:
    base, name = Weights(models[0]), "model.layers.0.mlp.down_proj.weight"
    with_moments, parts = (stream_job(get_rule(r), base, name, Passage(2)) for r in ("gramweighted", "rowscaled"))
    assert with_moments.memory - parts.memory == 4 * (64 * 64 + 2 * (64 * 64 - 32))


def test_a_small_memory_knows_of_the_larger_pieces_of_a_gpu(models: list[Path]) -> None:
    base, rule = Weights(models[0]), get_rule("magmax")
    name = max(base.names, key=base.nbytes)
    numel = math.prod(base.shape(name))
    for piece, held in ((100, 100), (PIECE_ON_GPU, numel)):  # state and its update; base, expert, change and merged
        assert stream_job(rule, base, name, Passage(2, piece=piece)).memory == 4 * held * (2 + 4)


def test_an_adapter_has_its_statistics_in_its_own_folder(models: list[Path], tmp_path: Path) -> None:
    base, rule = models[0], get_rule("gramweighted")
    adapter = lora(base, tmp_path / "adapter", seed=1)
    state = MergeState.create(tmp_path / "state", base=base, rule="gramweighted")
    with pytest.raises(ModelError, match=f"{adapter} lacks the statistics"):
        state.add(adapter)
    measured(base, adapter, seed=1)
    check_statistics(rule, [adapter])
    state.add(adapter)
    assert not (state.require_running() / "factors").exists()
    expert = open_expert(adapter, Weights(base), force=True)
    merged, start = tensors(state.export(tmp_path / "merged")), tensors(base)
    for name, value in start.items():  # alone, it comes out whole
        change = expert.reader(name, value)(0, value.numel(), value.reshape(-1)).reshape(value.shape)
        torch.testing.assert_close(merged[name], value + change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "fields"), [("covariance", {"space": "inputs"}), ("curvature", {}), ("input_space", {"rank": 8})]
)
def test_the_statistics_of_a_weight_that_an_adapter_leaves_alone_count(
    rule: str, fields: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    """One by one as at once: the second expert is weighed against what the first one reads there."""
    base, full = models[0], measured(models[0], shutil.copytree(models[1], tmp_path / "full"), seed=1)
    adapter = measured(base, lora(base, tmp_path / "adapter", seed=1, target_modules=["q_proj"]), seed=2)
    draw = torch.Generator().manual_seed(3)
    for expert in (adapter, full):
        fisher = {n: torch.rand(Weights(base).shape(n), generator=draw) for n in Weights(base).floating()}
        write_statistics(expert / "statistics", "fisher", fisher, {}, expert_sha256=expert_sha256(expert))
    at_once = MergeState.create(tmp_path / "batch", base=base, rule=rule, **fields).add(adapter, full)
    stream = MergeState.create(tmp_path / "stream", base=base, rule=rule, **fields).add(adapter).add(full)
    found, wanted = (tensors(s.export(s.folder / "merged")) for s in (stream, at_once))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    alone = tensors(MergeState.create(tmp_path / "alone", base=base, rule=rule).add(full).export(tmp_path / "one"))
    name = "model.layers.0.mlp.up_proj.weight"  # which the adapter leaves alone
    assert not torch.allclose(found[name], alone[name], rtol=0, atol=1e-3)


# Refused


def test_without_statistics_nothing_is_merged(models: list[Path], tmp_path: Path) -> None:
    base, first, second, _ = models
    bare = perturbed(base, tmp_path / "bare", seed=9, size=0.05)
    said = (
        rf"{bare} lacks the statistics 'inputs', which the rule Gramweighted needs: write them with "
        rf"`contmerge statistics {bare} --data FILE`\."
    )
    state = MergeState.create(tmp_path / "state", base=base, rule="gramweighted").add(first)
    log = state.log()
    with pytest.raises(ModelError, match=said):
        state.add(second, bare)
    assert state.log() == log
    weights = Weights(base)
    for found in Team(2, 2).run(
        lambda crew: merge_experts(
            get_rule("gramweighted"), weights, [open_expert(bare, weights)], running_out=tmp_path / "out", crew=crew
        )
    ):
        assert isinstance(found, ModelError)
    assert not (tmp_path / "out").exists(), "before any work"
    check_statistics(get_rule("magmax"), [bare])
    with pytest.raises(ModelError, match=said):
        check_statistics(get_rule("gramweighted"), [first, bare])


def test_statistics_of_other_weights_are_refused(models: list[Path], tmp_path: Path) -> None:
    """An expert that was trained again in its folder."""
    expert = shutil.copytree(models[1], tmp_path / "expert")
    check_statistics(get_rule("gramweighted"), [expert])
    shutil.copyfile(models[2] / "model.safetensors", expert / "model.safetensors")
    with pytest.raises(ModelError, match=rf"The statistics of {expert} are of other weights than it holds now: write"):
        check_statistics(get_rule("gramweighted"), [expert])
    write_statistics(expert / "statistics", "inputs", {}, {}, expert_sha256=expert_sha256(expert))
    check_statistics(get_rule("gramweighted"), [expert])


def test_damaged_statistics_are_named(models: list[Path], tmp_path: Path) -> None:
    expert = shutil.copytree(models[1], tmp_path / "expert")
    file = expert / "statistics/inputs.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=rf"{file} is truncated"):
        check_statistics(get_rule("gramweighted"), [expert])


def test_equal_neighbours_are_stored_once_and_read_by_all(models: list[Path]) -> None:
    statistics, stored = Statistics(models[1]), load_file(models[1] / "statistics/inputs.safetensors")
    cpu, at = torch.device("cpu"), "model.layers.1.self_attn"
    assert {n for n in stored if at in n} == {f"{at}.o_proj.weight", f"{at}.q_proj.weight"}
    found = [statistics.of(f"{at}.{word}_proj.weight", ("inputs",), cpu)["inputs"] for word in "qkv"]
    assert all(torch.equal(moment, stored[f"{at}.q_proj.weight"]) for moment in found)
    assert statistics.of("model.norm.weight", ("inputs",), cpu) == {}
    assert Statistics(models[0]).kinds == ()


# Under mergekit


def by_mergekit(models: Sequence[Any], out: Path, **more: Any) -> Path:
    base, *experts = models
    recipe = {
        "merge_method": "gramweighted", "base_model": str(base), "models": [{"model": str(e)} for e in experts],
        "dtype": "float32", **more,
    }  # fmt: skip
    LoaderCache.loaders.clear()
    run_merge(MergeConfiguration.model_validate(recipe), str(out), OPTIONS)
    return out


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._METHODS, "gramweighted", RuleMethod("gramweighted"))


@pytest.mark.usefixtures("method")
def test_the_mergekit_method_reads_the_sidecars(models: list[Path], tmp_path: Path) -> None:
    theirs = tensors(by_mergekit(models, tmp_path / "theirs"))
    state = MergeState.create(tmp_path / "state", base=models[0], rule="gramweighted").add(*models[1:])
    ours = tensors(state.export(tmp_path / "ours"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_merged(tmp_path / "theirs", exact(models[0], models[1:]))


@pytest.mark.usefixtures("method")
def test_mergekit_reads_statistics_that_were_measured_again(models: list[Path], tmp_path: Path) -> None:
    """In one process, as in a notebook."""
    base, *experts = models[0], *(shutil.copytree(e, tmp_path / e.name) for e in models[1:3])
    before = tensors(by_mergekit([base, *experts], tmp_path / "before"))
    measured(base, experts[0], seed=9)
    after = tensors(by_mergekit([base, *experts], tmp_path / "after"))
    assert_merged(tmp_path / "after", exact(base, experts))
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("method")
def test_mergekit_is_refused_before_any_tensor(models: list[Path], tmp_path: Path) -> None:
    base, first, *_ = models
    bare = perturbed(base, tmp_path / "bare", seed=9, size=0.05)
    with pytest.raises(MergekitRecipeError, match=rf"{bare} lacks the statistics 'inputs'.* --data FILE"):
        by_mergekit([base, first, bare], tmp_path / "out")
    adapter = lora(base, tmp_path / "adapter", seed=1)
    recipe = [base, first, f"{base}+{adapter}"]
    LoaderCache.loaders.clear()
    config = MergeConfiguration.model_validate(
        {"merge_method": "gramweighted", "base_model": str(base), "models": [{"model": str(m)} for m in recipe[1:]]}
    )
    options = MergeOptions(quiet=True, copy_tokenizer=False, lora_merge_cache=str(tmp_path / "cache"))
    with pytest.raises(MergekitRecipeError, match=rf"{base}\+{adapter} has no statistics that gramweighted could read"):
        run_merge(config, str(tmp_path / "out"), options)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.usefixtures("method")
def test_slices_have_no_statistics_of_their_own(models: list[Path], tmp_path: Path) -> None:
    """A layer that mergekit calls by another number is not what the files hold under that name."""
    base, first, second, _ = models
    sources = [{"model": str(m), "layer_range": [1, 2]} for m in (base, first, second)]
    recipe = {"merge_method": "gramweighted", "base_model": str(base), "slices": [{"sources": sources}]}
    LoaderCache.loaders.clear()
    with pytest.raises(MergekitRecipeError, match=r"so it is not known which statistics are its"):
        run_merge(
            MergeConfiguration.model_validate(recipe),
            str(tmp_path / "out"),
            MergeOptions(quiet=True, copy_tokenizer=False),
        )
