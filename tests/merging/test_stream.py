"""Experts folded over files: what comes out, by every rule; what it may not depend on; what is refused."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file
from toys.loras import lora
from toys.models import perturbed, toy_llama
from toys.rules import PLAIN, tolerance
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule, rule_class, rule_names
from hf_contmerge.merging import costs
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.stream import merge_experts, write_sum
from hf_contmerge.merging.write import Merged, Output
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.lora.reader import Adapter
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.testing.folding import flat, fold

Tensors = dict[str, torch.Tensor]

EXACT = [name for name in PLAIN if name != "stitch"]
"""Those whose oracle sees one weight at a time; `stitch` over a whole model is in test_thresholds.py."""
SELECTING = [name for name in rule_names() if rule_class(name).selects]


def merge(rule: MergeRule, base: Path, experts: Sequence[Path], folder: Path, **options: Any) -> tuple[Path, Merged]:
    """Merge experts at once; return the merged folder, beside which the state is left as `running`, and the finding."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {key: options.pop(key) for key in ("dtype", "rounding", "shard_size", "companions") if key in options}
    weights, merged = Weights(base), folder / "merged"
    merged.mkdir()
    opened = [open_expert(e, weights, force=True) for e in experts]
    found = merge_experts(
        rule, weights, opened, running_out=folder / "running", merged_out=Output(merged, **outputs), **options
    )
    return merged, found


def one_by_one(rule: MergeRule, base: Path, experts: Sequence[Path], folder: Path) -> tuple[Path, Merged]:
    """Merge experts, each on top of the state that the one before has left."""
    assert experts
    running, norms = None, ()
    for i, expert in enumerate(experts):
        merged, found = merge(rule, base, [expert], folder / str(i), running=running, earlier=norms)
        running, norms = folder / str(i) / "running", found.norms.experts
    return merged, found


def tensors(folder: Path) -> Tensors:
    weights = Weights(folder)
    return {n: weights.tensor(n) for n in weights.names}


def norm(values: Any) -> float:
    return sum(float(v.double().norm()) ** 2 for v in values) ** 0.5


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Say whether two models have the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(one[k].reshape(-1).view(torch.uint8), v.reshape(-1).view(torch.uint8)) for k, v in other.items()
    )


def same_files(one: Path, other: Path) -> bool:
    """Say whether two folders hold the same files, byte for byte."""
    ours, theirs = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (one, other))
    return bool(ours) and ours == theirs


def exact(rule: MergeRule, base: Path, experts: Sequence[Path]) -> Tensors:
    """Return what a merge adds to the base, in float64 throughout."""
    wide, vocabulary = {k: v.double() for k, v in tensors(base).items()}, Weights(base).vocabulary
    changes = [{k: v.double() - wide[k] for k, v in tensors(e).items()} for e in experts]
    matrix = {k: is_matrix(k, v.shape, vocabulary) for k, v in wide.items()}
    depths = Weights(base).depths
    state = {k: fold(rule, [c[k] for c in changes], is_matrix=matrix[k], name=k) for k in wide}
    scale = rule.scale(Norms(tuple(norm(c.values()) for c in changes), norm(map(flat, state.values()))))
    last = {k: Weight(k, matrix[k], len(experts), tuple(v.shape), depths.get(k)) for k, v in wide.items()}
    return {k: scale * rule.read_out(s, last[k]) for k, s in state.items()}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A base with an output table of its own, in bfloat16, and two experts."""
    home = tmp_path_factory.mktemp("untied")
    base = toy_llama(home / "base", seed=5, tied=False, dtype=torch.bfloat16)
    return base, *(perturbed(base, home / f"expert{i}", seed=i, size=0.02) for i in (1, 2))


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the base: one on all linear maps, one on some."""
    home = tmp_path_factory.mktemp("adapters")
    some = lora(base_folder, home / "some", seed=2, r=3, target_modules=["q_proj", "down_proj"])
    return [lora(base_folder, home / "all", seed=1), some]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A base that no architecture has: a stack of matrices, a scalar, nothing, integers; two experts."""
    home, draw = tmp_path_factory.mktemp("odd"), torch.Generator().manual_seed(0)
    shapes = {"mlp.experts.up_proj": (3, 12, 8), "attn.weight": (8, 8), "norm": (7,), "scalar": (), "empty": (0, 4)}
    folders = []
    for i in range(3):
        values = {k: torch.randn(s, generator=draw) for k, s in shapes.items()}
        values |= {f"slice{j}.weight": m.clone() for j, m in enumerate(values["mlp.experts.up_proj"])}
        values["table"] = torch.arange(5)
        folder = home / str(i)
        folder.mkdir()
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
        folders.append(folder)
    return tuple(folders)


# What comes out


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("count", [1, 3])
def test_every_rule_equals_a_float64_fold(name, count, base_folder, expert_folders, tmp_path):
    rule, experts, base = get_rule(name), expert_folders[:count], tensors(base_folder)
    wanted = exact(rule, base_folder, experts)
    merged = tensors(merge(rule, base_folder, experts, tmp_path)[0])
    error = norm(merged[k].double() - base[k] - wanted[k] for k in base) / norm(wanted.values())
    assert error <= tolerance(name)


@pytest.mark.parametrize("name", EXACT)
def test_untied_models_in_half_precision(name, untied, tmp_path):
    """Written as float32, so that the last rounding does not hide the arithmetic's."""
    rule, (base_folder, *experts) = get_rule(name), untied
    wanted, base = exact(rule, base_folder, experts), tensors(base_folder)
    assert "lm_head.weight" in wanted
    merged = tensors(merge(rule, base_folder, experts, tmp_path, dtype=torch.float32)[0])
    error = norm(merged[k].double() - base[k] - wanted[k] for k in base) / norm(wanted.values())
    assert error <= tolerance(name)


@pytest.mark.parametrize("name", ["opcm", "average", "random_mix", "null_space"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_expert_taken_whole_is_itself_bit_for_bit(name, dtype, tmp_path):
    base = toy_llama(tmp_path / "base", seed=0, dtype=dtype)
    expert = perturbed(base, tmp_path / "expert", seed=1, size=1.0)  # large: base + (expert - base) would round
    merged = merge(get_rule(name), base, [expert], tmp_path / "out")[0]
    assert same(tensors(merged), tensors(expert))


def test_magmax_at_its_ends(base_folder, expert_folders, tmp_path):
    merged = merge(get_rule("magmax", **{"lambda": 0.0}), base_folder, expert_folders, tmp_path / "a")[0]
    assert same(tensors(merged), tensors(base_folder))
    whole = merge(get_rule("magmax", **{"lambda": 1.0}), base_folder, expert_folders[:1], tmp_path / "b")[0]
    assert same(tensors(whole), tensors(expert_folders[0]))


@pytest.mark.parametrize("variant", ["fusionbench", "block", "paper"])
def test_opcm_moves_as_far_as_the_mean_expert(variant, base_folder, expert_folders, tmp_path):
    out, found = merge(get_rule("opcm", variant=variant), base_folder, expert_folders, tmp_path)
    base = tensors(base_folder)
    norms = [norm(v - base[k] for k, v in tensors(e).items()) for e in expert_folders]
    assert found.norms.experts == pytest.approx(norms, rel=1e-6)
    moved = norm(v.double() - base[k].double() for k, v in tensors(out).items())
    assert moved == pytest.approx(sum(norms) / len(norms), rel=1e-6)


def test_a_tied_table_moves_once(tmp_path):
    """A tied toy whose weights are 1 and experts 1.1: the merge is 1.1, not 1 + 0.1 twice or more."""
    base, expert = toy_llama(tmp_path / "base", seed=0), toy_llama(tmp_path / "expert", seed=0)
    for folder, value in ((base, 1.0), (expert, 1.1)):
        filled = {k: torch.full_like(v, value) for k, v in load_file(folder / "model.safetensors").items()}
        filled["lm_head.weight"] = filled["model.embed_tokens.weight"].clone()  # stored a second time
        save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    out, found = merge(get_rule("opcm"), base, [expert], tmp_path / "out")
    assert all(torch.allclose(v, torch.tensor(1.1)) for v in tensors(out).values())
    once = norm([torch.full_like(v, 0.1) for v in tensors(base).values()])
    assert found.norms.experts[0] == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_that_no_architecture_has(name, odd, tmp_path):
    """Slices of a stack are merged like matrices of their own; scalars and tensors without elements go through."""
    base, *experts = odd
    merged = tensors(merge(get_rule(name), base, experts, tmp_path)[0])
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {
        k: (v.shape, v.dtype) for k, v in tensors(base).items()
    }
    assert torch.equal(merged["table"], torch.arange(5))
    for j, matrix in enumerate(merged["mlp.experts.up_proj"]):
        if name not in ("dare", "random_mix", "ties"):  # drawn by the weight's name; trimmed over the whole weight
            assert torch.equal(matrix, merged[f"slice{j}.weight"])


@pytest.mark.parametrize("name", [n for n in rule_names() if rule_class(n).basis_free])
def test_adapters_are_merged_as_the_models_that_they_make(name, base_folder, adapters, tmp_path):
    rule = get_rule(name)
    models = [perturbed(base_folder, tmp_path / str(i), seed=0, size=0) for i in range(len(adapters))]
    weights = Weights(base_folder)
    for model, folder in zip(models, adapters, strict=True):
        adapter, values = Adapter(folder, weights), tensors(model)
        changed = {n: values[n] + adapter.task_vector(n, values[n]) for n in adapter.names}
        save_file({**values, **changed}, model / "model.safetensors", metadata={"format": "pt"})
    wanted = exact(rule, base_folder, models)
    out, _ = merge(rule, base_folder, adapters, tmp_path / "out")
    base, merged = tensors(base_folder), tensors(out)
    error = norm(merged[k].double() - base[k] - wanted[k] for k in base) / norm(wanted.values())
    assert error <= 1e-5
    assert (out.parent / "running/factors").is_dir()
    assert not (out.parent / "running/model.safetensors").exists()


# What it does not depend on


@pytest.mark.parametrize("name", PLAIN)
def test_one_at_a_time_is_all_at_once(name, base_folder, expert_folders, tmp_path):
    rule = get_rule(name)
    together, found = merge(rule, base_folder, expert_folders, tmp_path / "together")
    last, found_last = one_by_one(rule, base_folder, expert_folders, tmp_path / "each")
    assert found == found_last
    assert same_files(together, last)
    assert same_files(together.parent / "running", last.parent / "running")


@pytest.mark.parametrize("name", [n for n in rule_names() if rule_class(n).basis_free])
def test_one_adapter_at_a_time_is_all_at_once(name, base_folder, adapters, tmp_path):
    rule = get_rule(name)
    """Not bit for bit: the directions of a state in factors are rounded to float32 as often as they are written."""
    together, found = merge(rule, base_folder, adapters, tmp_path / "together")
    last, found_last = one_by_one(rule, base_folder, adapters, tmp_path / "each")
    assert found_last.norms.experts == pytest.approx(found.norms.experts, rel=1e-7)
    base, one, other = tensors(base_folder), tensors(together), tensors(last)
    assert norm(one[k] - other[k] for k in base) <= 1e-6 * norm(one[k] - base[k] for k in base)


@pytest.mark.parametrize("name", PLAIN)
def test_models_and_adapters_in_one_sequence(name, base_folder, expert_folders, adapters, tmp_path):
    """A state in factors becomes a dense one when a full model comes."""
    rule, experts = get_rule(name), [adapters[0], expert_folders[0], adapters[1]]
    together, _ = merge(rule, base_folder, experts, tmp_path / "together")
    last, _ = one_by_one(rule, base_folder, experts, tmp_path / "each")
    base, one, other = tensors(base_folder), tensors(together), tensors(last)
    assert norm(one[k] - other[k] for k in base) <= 1e-5 * norm(one[k] - base[k] for k in base)
    running = Running(last.parent / "running")
    assert all(running.rank(k) is None for k in base)


@pytest.mark.parametrize("name", PLAIN)
def test_pieces_do_not_change_a_bit(name, base_folder, expert_folders, tmp_path, monkeypatch):
    rule = get_rule(name)
    whole, found = merge(rule, base_folder, expert_folders, tmp_path / "whole")
    monkeypatch.setattr(costs, "PIECE", 37)
    cut, found_cut = merge(rule, base_folder, expert_folders, tmp_path / "cut")
    assert same_files(whole.parent / "running", cut.parent / "running")
    assert found_cut.norms.experts == pytest.approx(found.norms.experts, rel=1e-14)  # sums of sums round otherwise
    if not rule.whole_model_scale:
        assert same_files(whole, cut)


@pytest.mark.parametrize("name", PLAIN)
def test_threads_do_not_change_a_byte(name, base_folder, expert_folders, adapters, tmp_path):
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        experts = [*expert_folders[:2], adapters[0]]
        results.append(merge(get_rule(name), base_folder, experts, out, crew=Crew(workers=workers)))
    assert results[0][1] == results[1][1] == results[2][1]
    assert all(same_files(results[0][0].parent, out.parent) for out, _ in results[1:])


def test_shards_do_not_change_the_result(base_folder, expert_folders, tmp_path):
    one, _ = merge(get_rule("opcm"), base_folder, expert_folders, tmp_path / "one")
    many, _ = merge(get_rule("opcm"), base_folder, expert_folders, tmp_path / "many", shard_size=10_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    assert same(tensors(one), tensors(many))


@pytest.mark.parametrize("name", SELECTING)
def test_owners_are_the_stages_whose_values_the_state_holds(name, base_folder, expert_folders, tmp_path):
    out, _ = one_by_one(get_rule(name), base_folder, expert_folders, tmp_path)
    running, base = Running(out.parent / "running"), tensors(base_folder)
    changes = [{k: v - base[k] for k, v in tensors(e).items()} for e in expert_folders]
    for key in base:
        parts, owners = running.state(key), running.owners(key)
        assert parts is not None
        state = parts[""]
        for stage, change in enumerate(changes, 1):
            assert torch.equal(state[owners == stage], change[key][owners == stage])
        assert not state[owners == 0].any()


def test_the_state_that_is_read_stays_as_it_was(base_folder, expert_folders, tmp_path):
    first, found = merge(get_rule("magmax"), base_folder, expert_folders[:1], tmp_path / "first")
    running = first.parent / "running"
    shutil.copytree(running, tmp_path / "copy")
    merge(get_rule("magmax"), base_folder, expert_folders[1:], tmp_path / "then", running=running,
          earlier=found.norms.experts)  # fmt: skip
    assert same_files(running, tmp_path / "copy")


# What is written


def test_only_what_is_asked_for(base_folder, expert_folders, tmp_path):
    """A rule with a scale of the whole model needs its state in between; it does not stay."""
    rule, base = get_rule("opcm"), Weights(base_folder)
    experts = [open_expert(e, base) for e in expert_folders]
    found = merge_experts(rule, base, experts)
    (tmp_path / "merged").mkdir()
    assert merge_experts(rule, base, experts, merged_out=Output(tmp_path / "merged")) == found
    assert merge_experts(rule, base, experts, running_out=tmp_path / "running") == found
    assert {p.name for p in tmp_path.iterdir()} == {"merged", "running"}
    names = {p.name for p in base_folder.iterdir()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == names
    both, _ = merge(rule, base_folder, expert_folders, tmp_path / "both")
    assert same_files(both, tmp_path / "merged")
    assert same_files(both.parent / "running", tmp_path / "running")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_model_is_complete(dtype, base_folder, expert_folders, tmp_path):
    out, _ = merge(get_rule("magmax"), base_folder, expert_folders, tmp_path, dtype=dtype, rounding="nearest")
    wide, _ = merge(get_rule("magmax"), base_folder, expert_folders, tmp_path / "wide")
    assert same(tensors(out), {k: v.to(dtype) for k, v in tensors(wide).items()})
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in out.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["expert", "base"])
@pytest.mark.parametrize("name", ["magmax", "opcm"])
def test_values_that_are_not_finite(bad, where, name, base_folder, expert_folders, tmp_path):
    folders = {"base": base_folder, "expert": expert_folders[0]}
    folders[where] = shutil.copytree(folders[where], tmp_path / where)
    values = load_file(folders[where] / "model.safetensors")
    values["model.norm.weight"][3] = bad
    save_file(values, folders[where] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        merge(get_rule(name), folders["base"], [expert_folders[1], folders["expert"]], tmp_path / "out")
    assert f"model.norm.weight in {folders[where]} has 1 values that are NaN or infinite" in str(error.value)


def test_an_adapter_that_is_not_finite(base_folder, adapters, tmp_path):
    bad = shutil.copytree(adapters[0], tmp_path / "bad")
    values = load_file(bad / "adapter_model.safetensors")
    next(iter(values.values()))[0, 0] = float("nan")
    save_file(values, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"in {bad} has \d+ values that are NaN or infinite"):
        merge(get_rule("opcm"), base_folder, [bad], tmp_path / "out")


def test_a_difference_beyond_float32(base_folder, tmp_path):
    base, expert = (shutil.copytree(base_folder, tmp_path / n) for n in ("base", "expert"))
    for folder, value in ((base, 3e38), (expert, -3e38)):
        values = load_file(folder / "model.safetensors")
        values["model.norm.weight"][0] = value
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.norm.weight: a difference from .*base is too large for float32"):
        merge(get_rule("magmax"), base, [expert], tmp_path / "out")


def test_integer_tensors_must_agree(odd, tmp_path):
    base, expert, _ = odd
    other = shutil.copytree(expert, tmp_path / "other")
    save_file({**load_file(other / "model.safetensors"), "table": torch.arange(5) + 1}, other / "model.safetensors")
    with pytest.raises(ModelError, match="The integer tensor table differs"):
        open_expert(other, Weights(base))


def test_a_floating_weight_must_be_floating_in_the_expert(odd, tmp_path):
    base, expert, _ = odd
    other = shutil.copytree(expert, tmp_path / "other")
    values = load_file(other / "model.safetensors")
    save_file({**values, "attn.weight": values["attn.weight"].to(torch.int8)}, other / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"attn.weight is stored as torch.int8 in {other}, as torch.float32 in {base}"
    ):
        open_expert(other, Weights(base))


def test_an_expert_that_is_the_base(base_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        out, found = merge(get_rule("opcm"), base_folder, [base_folder], tmp_path)
    assert "No expert differs from the base" in caplog.text
    assert found.scale == 0
    assert same(tensors(out), tensors(base_folder))


# Which weights are projected, and what else there is


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (32, 32), True),
        ("model.layers.0.mlp.gate_proj.weight", (64, 32), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 64), True),
        ("model.layers.0.mlp.gate.weight", (8, 32), False),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 32), False),
        ("model.layers.0.mlp.router.weight", (8, 32), False),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 32), False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (64, 32), True),
        ("model.embed_tokens.weight", (384, 32), False),
        ("lm_head.weight", (384, 32), False),
        ("transformer.wte.weight", (384, 32), False),
        ("transformer.wpe.weight", (512, 32), False),
        ("output.weight", (384, 32), False),
        ("model.norm.weight", (32,), False),
    ],
)
def test_what_is_projected(name, shape, expected):
    assert is_matrix(name, shape, 384) is expected


def test_a_vector_between_two_models(base_folder, expert_folders, tmp_path):
    write_sum(base_folder, expert_folders[1], expert_folders[0], tmp_path)
    base, plus, less = (tensors(f) for f in (base_folder, expert_folders[1], expert_folders[0]))
    for name, value in tensors(tmp_path).items():
        wanted = base[name].double() + plus[name].double() - less[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PLAIN)
def test_recipes_for_mergekit_are_valid(name, base_folder, expert_folders):
    rule = get_rule(name)
    text = mergekit_yaml(name, rule, base=base_folder, experts=expert_folders, dtype=None)
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.merge_method == name
    assert [str(m.model.model.path) for m in config.models or []] == [str(e) for e in expert_folders]
    assert rule.parameters().items() <= (config.parameters or {}).items()
