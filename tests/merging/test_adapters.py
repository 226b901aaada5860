"""Adapters in the engine: a state of real peft adapters is the fold of the models that they make, in factors or not."""

import json
import math
import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.loras import loaded, lora
from toys.models import perturbed, toy_llama
from toys.rules import PLAIN, tolerance
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule, rule_names
from hf_contmerge.merging._factored import pays
from hf_contmerge.merging.adapter import export_adapter
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.lora.reader import Adapter
from hf_contmerge.models.weights import Weights
from hf_contmerge.testing.rules import flat, fold

Tensors = dict[str, torch.Tensor]
TOKENS = torch.tensor([[5, 6, 7, 8, 40, 41]])
Q, K, DOWN = (f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
BASIS_FREE = [n for n in rule_names() if get_rule(n).basis_free]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases wide enough for factors to pay; adapters and a full expert of the first."""
    folder = tmp_path_factory.mktemp("models")
    found = {"base": toy_llama(folder / "base", seed=0, hidden=64, tied=False)}
    for i in (1, 2, 3):
        found[f"a{i}"] = lora(found["base"], folder / f"a{i}", seed=i)
    found["full"] = perturbed(found["base"], folder / "full", seed=9, size=0.01)
    found["tied"] = toy_llama(folder / "tied", seed=0, hidden=64, tied=True)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": 96, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(folder / "gpt2")
    found["gpt2"] = folder / "gpt2"
    return found


def tensors(folder: Path) -> Tensors:
    weights = Weights(folder)
    return {n: weights.tensor(n) for n in weights.names}


def made_by(base: Path, expert: Path) -> Tensors:
    """Return an expert's weights in float64: for an adapter, what peft makes of its base."""
    if not (expert / "adapter_config.json").is_file():
        return {n: t.double() for n, t in tensors(expert).items()}
    merged = loaded(base, expert).merge_and_unload().state_dict()
    return {n: merged[n] for n in Weights(base).names}


def folded(rule: MergeRule, base: Path, experts: Sequence[Path]) -> Tensors:
    """Return the merged change of each weight, from whole models in float64."""
    before, vocabulary = {n: t.double() for n, t in tensors(base).items()}, Weights(base).vocabulary
    whole = [made_by(base, e) for e in experts]
    vectors = [{n: expert[n] - b for n, b in before.items()} for expert in whole]
    matrix = {name: is_matrix(name, b.shape, vocabulary) for name, b in before.items()}
    state = {n: fold(rule, [v[n] for v in vectors], is_matrix=matrix[n], name=n) for n in before}
    scale = rule.scale(Norms(tuple(norm(v) for v in vectors), norm({n: flat(s) for n, s in state.items()})))
    stages = len(experts)
    return {n: scale * rule.read_out(s, Weight(n, matrix[n], stages, tuple(before[n].shape))) for n, s in state.items()}


def norm(values: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in values.values()))


def assert_merged(state: MergeState, base: Path, experts: Sequence[Path], out: Path) -> None:
    """The exported model must be the fold of the models that the experts make."""
    wanted = folded(state.rule(), base, experts)
    found, before = tensors(state.export(out, dtype="float32")), tensors(base)
    error = {n: found[n].double() - before[n].double() - change for n, change in wanted.items()}
    assert norm(wanted) > 0.1
    assert norm(error) <= tolerance(state.log().rule) * norm(wanted)


def factor_files(state: MergeState) -> set[str]:
    return {p.stem for p in (state.require_running() / "factors").glob("*.safetensors")}


def linear(base: Path) -> set[str]:
    weights = Weights(base)
    return {n for n in weights.names if is_matrix(n, weights.shape(n), weights.vocabulary)}


# The same as with whole models


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "stitch"])
def test_adapters_are_folded_as_the_models_that_they_make(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    experts = [models[f"a{i}"] for i in (1, 2, 3)]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule=name)
    state.add(experts[0]).add(*experts[1:])
    assert_merged(state, models["base"], experts, tmp_path / "out")
    assert factor_files(state) == (linear(models["base"]) if get_rule(name).basis_free else set())
    assert [e.kind for e in state.log().experts] == ["adapter"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PLAIN if n != "stitch"])
def test_a_full_model_between_two_adapters(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    experts = [models["a1"], models["full"], models["a2"]]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule=name)
    for expert in experts:
        state.add(expert)
    assert_merged(state, models["base"], experts, tmp_path / "out")
    assert factor_files(state) == set()
    assert [e.kind for e in state.log().experts] == ["adapter", "model", "adapter"]
    at_once = MergeState.create(tmp_path / "at_once", base=models["base"], rule=name).add(*experts)
    assert_merged(at_once, models["base"], experts, tmp_path / "out-at-once")


KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "different modules": (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    ),
    "different ranks": ({"r": 1}, {"r": 4}, {"r": 2, "rank_pattern": {"q_proj": 3}, "use_rslora": True}),
    "modules to save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]},
    ),
    "tables": ({"target_modules": ["embed_tokens", "lm_head"]},) * 2,
    "dora": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "k_proj"], "use_dora": True}, {}),
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("rule", ["opcm", "ema", "slao", "magmax"])
def test_adapters_of_all_kinds(case: str, rule: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Among them: rules that shrink what an expert does not touch."""
    experts = [lora(models["base"], tmp_path / f"x{i}", seed=i, **k) for i, k in enumerate(KINDS[case])]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule=rule)
    for expert in experts:
        state.add(expert)
    assert_merged(state, models["base"], experts, tmp_path / "out")


@pytest.mark.parametrize("rule", ["opcm", "average", "magmax"])
def test_weights_that_are_stored_transposed(rule: str, models: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2's Conv1D, with biases that LoRA trains too."""
    kinds: tuple[dict[str, Any], ...] = (
        {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    )  # fmt: skip
    experts = [lora(models["gpt2"], tmp_path / f"x{i}", seed=i, fan_in_fan_out=True, **k) for i, k in enumerate(kinds)]
    state = MergeState.create(tmp_path / "state", base=models["gpt2"], rule=rule).add(*experts)
    assert_merged(state, models["gpt2"], experts, tmp_path / "out")


def test_a_base_in_bfloat16(tmp_path: Path) -> None:
    """The state holds the adapters' own change, exactly; only the model that leaves is rounded."""
    base = toy_llama(tmp_path / "base", seed=0, hidden=64, tied=False, dtype=torch.bfloat16)
    experts = [lora(base, tmp_path / f"x{i}", seed=i) for i in (1, 2)]
    state = MergeState.create(tmp_path / "state", base=base, rule="opcm").add(*experts)
    assert_merged(state, base, experts, tmp_path / "out")
    rounded = tensors(state.export(tmp_path / "rounded", rounding="nearest"))
    exact = tensors(tmp_path / "out")
    assert all(torch.equal(t, exact[n].bfloat16()) for n, t in rounded.items())


# Factors


@pytest.mark.parametrize("name", BASIS_FREE)
def test_rules_on_factors_never_read_the_base(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The same bytes come of a base whose weights are all NaN."""
    for kind in ("sane", "nan"):
        base = tmp_path / kind / "base"
        shutil.copytree(models["base"], base)
        if kind == "nan":
            values = {n: torch.full_like(t, float("nan")) for n, t in tensors(base).items()}
            save_file(values, base / "model.safetensors", metadata={"format": "pt"})
        state = MergeState.create(base.parent / "state", base=base, rule=name)
        state.add(models["a1"], force=True).add(models["a2"], models["a3"], force=True)
    sane, nan = (MergeState.load(tmp_path / kind / "state").require_running() for kind in ("sane", "nan"))
    files = [p.relative_to(sane) for p in sane.rglob("*.safetensors")]
    assert len(files) == len(linear(models["base"]))
    assert all((sane / f).read_bytes() == (nan / f).read_bytes() for f in files)


def test_factors_become_dense_where_they_no_longer_pay(models: dict[str, Path], tmp_path: Path) -> None:
    """A narrow weight first; and what has become dense stays so."""
    base, experts, seen = Weights(models["base"]), list[Path](), list[set[str]]()
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm")
    for i in range(7):
        experts.append(lora(models["base"], tmp_path / f"x{i}", seed=i, target_modules=["q_proj", "k_proj"]))
        state.add(experts[-1])
        seen.append(factor_files(state) & {Q, K})
        assert seen[-1] == {n for n in (Q, K) if pays(base.shape(n), 2 * len(experts))}
        assert Running(state.require_running()).names() >= {Q, K}
    assert [len(s) for s in seen] == sorted((len(s) for s in seen), reverse=True)
    assert {Q} in seen
    assert seen[-1] == set()
    assert_merged(state, models["base"], experts, tmp_path / "out")


def test_an_adapter_that_is_not_finite_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    for rule in ("opcm", "magmax"):
        broken = tmp_path / rule / "broken"
        shutil.copytree(models["a1"], broken)
        values = load_file(broken / "adapter_model.safetensors")
        values["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 3] = float("inf")
        save_file(values, broken / "adapter_model.safetensors", metadata={"format": "pt"})
        state = MergeState.create(tmp_path / rule / "state", base=models["base"], rule=rule)
        with pytest.raises(ModelError, match=f"{Q} in {broken} has .* NaN or infinite"):
            state.add(broken)
        assert state.log().experts == ()


def test_an_adapter_that_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """As peft makes it before any training: B is zero."""
    fresh = lora(models["base"], tmp_path / "fresh", seed=0, size=0.0)
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm").add(fresh)
    assert state.log().experts[0].norm == 0
    before = tensors(models["base"])
    assert all(torch.equal(t, before[n]) for n, t in tensors(state.export(tmp_path / "out")).items())
    with pytest.raises(ModelError, match="of the merged model equal the base"):
        export_adapter(state, tmp_path / "adapter")
    state.add(models["a1"])
    assert_merged(state, models["base"], [fresh, models["a1"]], tmp_path / "out2")


# The merged model as an adapter


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_model(state: MergeState, adapter: Path, tmp_path: Path) -> None:
    """peft's model of the exported adapter must be the exported model: its weights when merged, and its logits."""
    base = Path(state.log().base_folder)
    exported = tensors(state.export(tmp_path / "exported", dtype="float32"))
    wrapped = loaded(base, adapter)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float64).eval()
    assert torch.dist(logits(whole), logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))) > 0.01
    torch.testing.assert_close(logits(wrapped), logits(whole), atol=1e-4, rtol=0)
    merged = wrapped.merge_and_unload().state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(merged[name], tensor.double(), atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", BASIS_FREE)
def test_an_exported_adapter_is_the_exported_model(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule=name)
    state.add(*(models[f"a{i}"] for i in (1, 2, 3)))
    errors = export_adapter(state, tmp_path / "adapter")
    assert max(errors.values()) <= 1e-6
    assert errors == json.loads((tmp_path / "adapter/reconstruction.json").read_text())
    assert_same_model(state, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("case", ["modules to save", "tables", "dora"])
def test_what_is_no_plain_lora_leaves_with_the_adapter(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    experts = [lora(models["base"], tmp_path / f"x{i}", seed=i, **k) for i, k in enumerate(KINDS[case])]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm").add(*experts)
    export_adapter(state, tmp_path / "adapter", rank=None if case != "dora" else 64)  # DoRA's change is of any rank
    assert_same_model(state, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_tied_table_leaves_so_that_both_its_sides_change(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """peft would apply a LoRA of it to the input side alone, and twice when merging; so it leaves whole."""
    base = models["tied"]
    if kind == "full":
        expert = perturbed(base, tmp_path / "full", seed=9, size=0.05)
    else:
        expert = lora(base, tmp_path / "lora", seed=9, target_modules=["q_proj", "embed_tokens"])
    state = MergeState.create(tmp_path / "state", base=base, rule="opcm").add(expert)
    export_adapter(state, tmp_path / "adapter", rank=64 if kind == "full" else None)
    assert_same_model(state, tmp_path / "adapter", tmp_path)
    again = MergeState.create(tmp_path / "again", base=base, rule="average").add(tmp_path / "adapter")
    second = tensors(again.export(tmp_path / "again-merged", dtype="float32"))
    for name, tensor in tensors(tmp_path / "exported").items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=1e-5)


def test_an_exported_adapter_of_gpt2(models: dict[str, Path], tmp_path: Path) -> None:
    base = models["gpt2"]
    experts = [
        lora(base, tmp_path / f"x{i}", seed=i, fan_in_fan_out=True, target_modules=t, bias=b)
        for i, (t, b) in enumerate(((["c_attn", "c_fc"], "none"), (["c_proj", "c_attn"], "lora_only")))
    ]
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(*experts)
    export_adapter(state, tmp_path / "adapter")
    assert_same_model(state, tmp_path / "adapter", tmp_path)


def test_names_that_are_stored_without_what_stands_in_front(models: dict[str, Path], tmp_path: Path) -> None:
    """The stock gpt2 on the Hub stores h.0.attn..., and is transformer.h.0.attn... in memory, which peft goes by."""
    base = tmp_path / "base"
    shutil.copytree(models["gpt2"], base)
    bare = {n.removeprefix("transformer."): t for n, t in load_file(base / "model.safetensors").items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    expert = lora(base, tmp_path / "x", seed=0, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(expert)
    assert "h.0.attn.c_attn.weight" in export_adapter(state, tmp_path / "adapter")
    before, wrapped = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64),
        loaded(base, tmp_path / "adapter"),
    )
    whole = AutoModelForCausalLM.from_pretrained(state.export(tmp_path / "out"), dtype=torch.float64)
    assert torch.dist(logits(whole), logits(before)) > 0.01
    torch.testing.assert_close(logits(wrapped), logits(whole), atol=1e-5, rtol=0)


def test_an_architecture_that_transformers_does_not_know(models: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(models["base"], base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    (base / "config.json").write_text(json.dumps(config))
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(models["a1"], force=True)
    with pytest.raises(ModelError, match=r"does not know this architecture.* without --as-adapter"):
        export_adapter(state, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_more_factors_than_a_process_may_have_files_open(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, hidden=64, tied=False, layers=8)
    experts = [lora(base, tmp_path / f"x{i}", seed=i) for i in (1, 2)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 25, before[1]))
    try:
        state = MergeState.create(tmp_path / "state", base=base, rule="opcm").add(experts[0]).add(experts[1])
        assert len(factor_files(state)) == 8 * 7
        state.export(tmp_path / "out")
        export_adapter(state, tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_exported_adapter_is_an_expert_again(models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="average").add(models["a1"], models["a2"])
    export_adapter(state, tmp_path / "adapter")
    again = MergeState.create(tmp_path / "again", base=models["base"], rule="average").add(tmp_path / "adapter")
    first, second = tensors(state.export(tmp_path / "1")), tensors(again.export(tmp_path / "2"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kinds", [("a1", "a2", "a3"), ("a1", "full"), ("full",)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_a_rank_costs_what_reconstruction_says(
    kinds: tuple[str, ...], rank: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """Measured on the files that are written, against the merged model and the best approximation that there is."""
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm").add(*(models[k] for k in kinds))
    said = export_adapter(state, tmp_path / "adapter", rank=rank)
    before, whole = tensors(models["base"]), folded(state.rule(), models["base"], [models[k] for k in kinds])
    adapter = Adapter(tmp_path / "adapter", Weights(models["base"]))
    assert set(said) == linear(models["base"])
    for name, error in said.items():
        change = whole[name]
        found = adapter.task_vector(name, before[name]).double()
        tail = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
        assert (adapter.rank(name) or 0) <= rank
        assert float((found - change).norm() / change.norm()) == pytest.approx(error, abs=2e-6)
        assert error == pytest.approx(float(tail), abs=2e-6)
    if rank == 1000:
        assert max(said.values()) <= 1e-6
        assert_same_model(state, tmp_path / "adapter", tmp_path)


# What is said and refused


@pytest.mark.parametrize(
    ("rule", "experts", "why"),
    [
        ("magmax", ("a1",), "the rule magmax does not work on factors"),
        ("opcm", ("a1", "full"), "full is a full model"),
        ("opcm", ("wide",), "the adapters' ranks add up too high for factors to be smaller"),
    ],
)
def test_why_there_is_no_exact_adapter(
    rule: str, experts: Sequence[str], why: str, models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    folders = [lora(models["base"], tmp_path / e, seed=1, r=40) if e == "wide" else models[e] for e in experts]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule=rule).add(*folders)
    with pytest.raises(RecipeError) as error:
        export_adapter(state, tmp_path / "out")
    assert str(error.value) == (
        f"model.layers.0.mlp.down_proj.weight and {len(linear(models['base'])) - 1} more are stored as full "
        f"tensors, not as low-rank factors: {why}. Set --rank to write the nearest adapter of that rank, with its "
        "errors in reconstruction.json; or export a model, without --as-adapter."
    )
    assert not (tmp_path / "out").exists()
    words = ["merge", "export", str(state.folder), str(tmp_path / "out"), "--as-adapter"]
    assert main(words) == 2
    assert main([*words, "--rank", "2"]) == 0
    assert "14 modules; largest relative error" in capsys.readouterr().out
    assert Adapter(tmp_path / "out", Weights(models["base"])).rank(Q) == 2


def test_a_rank_below_one(models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm").add(models["a1"])
    with pytest.raises(RecipeError, match="--rank 0: an adapter's rank must be at least 1"):
        export_adapter(state, tmp_path / "out", rank=0)


def edited(adapter: Path, out: Path, **settings: Any) -> Path:
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return out


def test_an_adapter_of_another_base_is_refused_unless_forced(models: dict[str, Path], tmp_path: Path) -> None:
    other = edited(models["a1"], tmp_path / "other", base_model_name_or_path="someone/elses-model")
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm")
    with pytest.raises(ModelError, match="was trained on someone/elses-model, not on"):
        state.add(other)
    assert state.log().experts == ()
    assert main(["merge", "add", str(state.folder), str(other), "--force"]) == 0
    assert_merged(MergeState.load(state.folder), models["base"], [models["a1"]], tmp_path / "out")


def test_twins_and_what_only_looks_like_one(models: dict[str, Path], tmp_path: Path) -> None:
    """The same tensors with another alpha make another expert; the same adapter elsewhere does not."""
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="average").add(models["a1"])
    copy = edited(models["a1"], tmp_path / "copy")
    for twin in (models["a1"], copy):
        with pytest.raises(ModelError, match=f"{twin} has the same weights as a1"):
            state.add(twin)
    with pytest.raises(ModelError, match="has the same weights as"):
        state.add(models["a2"], edited(models["a2"], tmp_path / "copy2"))
    louder = edited(models["a1"], tmp_path / "louder", lora_alpha=6)
    state.add(louder)
    first, second = state.log().experts
    assert first.sha256 != second.sha256
    assert second.norm == pytest.approx(2 * first.norm, rel=1e-6)
    assert_merged(state, models["base"], [models["a1"], louder], tmp_path / "out")


def test_a_model_in_an_adapters_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Some training scripts leave the merged model, or the base, there; transformers would load both."""
    expert = edited(models["a1"], tmp_path / "a1")
    shutil.copy(models["full"] / "model.safetensors", expert)
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="average")
    with pytest.raises(ModelError, match=r"a1 holds a whole model \(model\.safetensors\) and an adapter"):
        state.add(expert)
    assert state.log().experts == ()


def test_dropping_an_adapter_is_never_having_had_it(models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm")
    state.add(models["a1"]).add(models["full"]).add(models["a2"]).drop("full")
    never = MergeState.create(tmp_path / "never", base=models["base"], rule="opcm").add(models["a1"], models["a2"])
    files = {p.relative_to(never.require_running()) for p in never.require_running().rglob("*.safetensors")}
    assert len(files) == len(linear(models["base"]))
    for file in files:
        assert (state.require_running() / file).read_bytes() == (never.require_running() / file).read_bytes()
