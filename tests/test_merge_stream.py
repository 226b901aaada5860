"""One stage of merging after another, over files: what comes out, what is recorded, what is refused."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file
from toys import perturbed, toy_llama

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import Norms, get_rule, rule_names
from hf_contmerge.merge_stream import is_matrix, merge_stage, mergekit_yaml, write_sum
from hf_contmerge.tensor_files import Weights


def merge(rule, base, experts, folder: Path, **options):
    """Merge experts one stage after another; return the last merged folder and what was found."""
    running, norms = None, ()
    for i, expert in enumerate(experts):
        places = [folder / f"{kind}{i}" for kind in ("running", "merged")]
        for place in places:
            place.mkdir(parents=True)
        found = merge_stage(
            rule, base=base, expert=expert, running=running, earlier=norms,
            running_out=places[0], merged_out=places[1], **options,
        )  # fmt: skip
        running, norms = places[0], found.norms.experts
    return places[1], found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights(folder)
    return {n: weights.tensor(n) for n in weights.names}


def norm(values) -> float:
    return sum(float(v.double().norm()) ** 2 for v in values) ** 0.5


@pytest.mark.parametrize("name", [n for n in rule_names() if n != "opcm"])
@pytest.mark.parametrize("count", [1, 3])
def test_elementwise_rules_equal_float64(name, count, base_folder, expert_folders, tmp_path):
    rule = get_rule(name)
    base = {k: v.double() for k, v in tensors(base_folder).items()}
    running = {k: torch.zeros_like(v) for k, v in base.items()}
    for expert in expert_folders[:count]:
        running = {k: rule.update(running[k], v.double() - base[k], is_matrix=True) for k, v in tensors(expert).items()}
    exact = {k: rule.scale(Norms((1.0,) * count, 1.0)) * v for k, v in running.items()}
    merged = tensors(merge(rule, base_folder, expert_folders[:count], tmp_path)[0])
    error = norm(merged[k].double() - base[k] - exact[k] for k in base) / norm(exact.values())
    assert error <= 1e-5


@pytest.mark.parametrize("name", ["opcm", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_expert_taken_whole_is_itself_bit_for_bit(name, dtype, tmp_path):
    base = toy_llama(tmp_path / "base", seed=0, dtype=dtype)
    expert = perturbed(base, tmp_path / "expert", seed=1, size=1.0)  # large: base + (expert - base) would round
    merged = tensors(merge(get_rule(name), base, [expert], tmp_path)[0])
    assert all(torch.equal(merged[k], v) for k, v in tensors(expert).items())


def test_magmax_at_its_ends(base_folder, expert_folders, tmp_path):
    merged = tensors(merge(get_rule("magmax", **{"lambda": 0.0}), base_folder, expert_folders, tmp_path / "a")[0])
    assert all(torch.equal(merged[k], v) for k, v in tensors(base_folder).items())
    whole = merge(get_rule("magmax", **{"lambda": 1.0}), base_folder, expert_folders[:1], tmp_path / "b")[0]
    assert all(torch.equal(tensors(whole)[k], v) for k, v in tensors(expert_folders[0]).items())


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
    out, found = merge(get_rule("opcm"), base, [expert], tmp_path)
    assert all(torch.allclose(v, torch.tensor(1.1)) for v in tensors(out).values())
    once = norm([torch.full_like(v, 0.1) for v in tensors(base).values()])
    assert found.norms.experts[0] == pytest.approx(once, rel=1e-5)


def test_shards_do_not_change_the_result(base_folder, expert_folders, tmp_path):
    one, _ = merge(get_rule("opcm"), base_folder, expert_folders, tmp_path / "one")
    many, _ = merge(get_rule("opcm"), base_folder, expert_folders, tmp_path / "many", shard_size=10_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    assert all(torch.equal(tensors(many)[k], v) for k, v in tensors(one).items())


def test_merged_model_is_complete(base_folder, expert_folders, tmp_path):
    out, _ = merge(get_rule("magmax"), base_folder, expert_folders, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in tensors(out).values()} == {torch.bfloat16}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["expert", "base"])
def test_values_that_are_not_finite(bad, where, tmp_path):
    folders = {"base": toy_llama(tmp_path / "base", seed=0), "expert": toy_llama(tmp_path / "expert", seed=1)}
    values = load_file(folders[where] / "model.safetensors")
    values["model.norm.weight"][3] = bad
    save_file(values, folders[where] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        merge(get_rule("magmax"), folders["base"], [folders["expert"]], tmp_path / "out")
    assert f"model.norm.weight in {folders[where]} has 1 values that are NaN or infinite" in str(error.value)
    assert not list((tmp_path / "out").glob("merged*/*.safetensors"))


def test_integer_tensors_must_agree(base_folder, expert_folders, tmp_path):
    folders = []
    for i, source in enumerate((base_folder, expert_folders[0])):
        folder = toy_llama(tmp_path / str(i), seed=0)
        table = torch.arange(4) + i
        save_file({**load_file(source / "model.safetensors"), "table": table}, folder / "model.safetensors")
        folders.append(folder)
    with pytest.raises(ModelError, match="The integer tensor table differs"):
        merge(get_rule("magmax"), folders[0], folders[1:], tmp_path / "out")
    out, _ = merge(get_rule("magmax"), folders[0], [folders[0]], tmp_path / "same")
    assert torch.equal(tensors(out)["table"], torch.arange(4))


def test_an_expert_that_is_the_base(base_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        out, found = merge(get_rule("opcm"), base_folder, [base_folder], tmp_path)
    assert "does not differ from the base" in caplog.text
    assert found.scale == 0
    assert all(torch.equal(tensors(out)[k], v) for k, v in tensors(base_folder).items())


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
        exact = base[name].double() + plus[name].double() - less[name].double()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", rule_names())
def test_recipes_for_mergekit_are_valid(name, base_folder, expert_folders):
    rule = get_rule(name)
    text = mergekit_yaml(name, rule, base=base_folder, experts=expert_folders, dtype=None)
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.merge_method == name
    assert [str(m.model.model.path) for m in config.models] == [str(e) for e in expert_folders]
    assert rule.parameters().items() <= (config.parameters or {}).items()
