"""The stock mergekit commands, run as users run them, on toy Llamas; and the way in through `import torch`."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.merge_methods import registry
from safetensors.torch import load_file
from toys import perturbed, toy_llama

from hf_contmerge import _autoload
from hf_contmerge.merge_rules import Norms, get_rule
from hf_contmerge.merge_stream import is_matrix, merge_stage, mergekit_yaml
from hf_contmerge.mergekit_plugin import MergekitRecipeError, RuleMethod

COMMAND = Path(sys.executable).with_name("mergekit-yaml")
CASES = {
    "magmax": ("magmax", {}, 1e-4),
    "ema": ("ema", {"beta": 0.3}, 1e-4),
    "opcm": ("opcm", {}, 1e-3),
    "opcm-block": ("opcm", {"variant": "block"}, 1e-4),
    "opcm-paper": ("opcm", {"variant": "paper", "alpha": 0.4}, 1e-3),
}


def mergekit(recipe: dict, out: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    """Run the stock command on a recipe."""
    import os

    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(recipe))
    command = [str(COMMAND), str(file), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def recipe_of(models, method, **more):
    base, *experts = models
    listed = [{"model": str(e)} for e in experts]
    return {"merge_method": method, "base_model": str(base), "models": listed, "dtype": "float32", **more}


@pytest.fixture(scope="module", params=["tied-fp32", "untied-bf16"])
def models(request, tmp_path_factory):
    """A base and three experts."""
    tied, dtype = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    base = toy_llama(folder / "base", seed=0, tied=tied == "tied", dtype=kind)
    return [base, *(perturbed(base, folder / f"e{i}", seed=i, size=0.02) for i in (1, 2, 3))]


def float64_merge(name, parameters, models):
    """Re-derive a merge in float64 from whole tensors: base tensor and merged - base, by name."""
    rule = get_rule(name, **parameters)
    base, *experts = [{k: v.double() for k, v in load_file(m / "model.safetensors").items()} for m in models]
    running = {k: torch.zeros_like(v) for k, v in base.items()}
    norms = []
    for expert in experts:
        norms.append(sum(float((expert[k] - base[k]).norm()) ** 2 for k in base) ** 0.5)
        for k in base:
            matrix = is_matrix(k, base[k].shape, base["model.embed_tokens.weight"].shape[0])
            running[k] = literal_update(rule, running[k], expert[k] - base[k], matrix)
    total = sum(float(v.norm()) ** 2 for v in running.values()) ** 0.5
    return {k: rule.scale(Norms(tuple(norms), total)) * v for k, v in running.items()}


def literal_update(rule, running, delta, matrix):
    if type(rule).__name__ != "Opcm":
        return rule.update(running, delta, is_matrix=matrix)
    if not matrix or not running.any():
        return running + delta
    u, s, vh = torch.linalg.svd(running, full_matrices=True)
    a = u.T @ delta @ vh.T
    share = s.cumsum(0) / s.sum()
    if rule.variant == "paper":
        r = int((share < rule.alpha).sum()) + 1
        a[:r] = 0
        a[:, :r] = 0
    else:
        r = int((share <= rule.alpha).sum())
        a[:r, :r] = 0
    if rule.variant != "block":
        a.diagonal().zero_()
    return running + u @ a @ vh


@pytest.fixture(scope="module", params=CASES)
def merged(request, models, tmp_path_factory):
    """The stock command's result of a case, with what it was made of."""
    name, parameters, bound = CASES[request.param]
    out = tmp_path_factory.mktemp("out") / "merged"
    done = mergekit(recipe_of(models, name, parameters=parameters), out)
    assert done.returncode == 0, done.stderr[-2000:]
    return name, parameters, bound, out


def test_stock_command_equals_a_float64_rederivation(merged, models):
    name, parameters, bound, out = merged
    base, result = load_file(models[0] / "model.safetensors"), load_file(out / "model.safetensors")
    expected = float64_merge(name, parameters, models)
    assert set(result) == set(expected)
    error = sum(float((result[k].double() - base[k].double() - expected[k]).norm()) ** 2 for k in expected) ** 0.5
    assert error / sum(float(v.norm()) ** 2 for v in expected.values()) ** 0.5 <= bound


def test_stock_command_equals_the_loop_bit_for_bit(merged, models, tmp_path):
    name, parameters, _, out = merged
    rule, running, norms = get_rule(name, **parameters), None, ()
    for i, expert in enumerate(models[1:]):
        places = [tmp_path / f"{kind}{i}" for kind in ("running", "merged")]
        for place in places:
            place.mkdir()
        step = merge_stage(
            rule, base=models[0], expert=expert, running=running, earlier=norms,
            running_out=places[0], merged_out=places[1], dtype=torch.float32,
        )  # fmt: skip
        running, norms = places[0], step.norms.experts
    ours, theirs = load_file(places[1] / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_half_precision_without_dtype_is_computed_in_float32(models, tmp_path):
    recipe = recipe_of(models, "opcm")
    del recipe["dtype"]
    assert mergekit(recipe, tmp_path / "out").returncode == 0
    result, base = load_file(tmp_path / "out/model.safetensors"), load_file(models[0] / "model.safetensors")
    expected = float64_merge("opcm", {}, models)
    for name, delta in expected.items():
        exact = base[name].double() + delta
        assert result[name].dtype == base[name].dtype
        ulp = torch.finfo(base[name].dtype).eps * exact.abs() + 1e-6
        assert bool(((result[name].double() - exact).abs() <= ulp).all()), name


def test_the_order_of_models_is_the_order_of_stages(models, tmp_path):
    base, *experts = models
    for out, order in (("forth", experts), ("back", experts[::-1])):
        assert mergekit(recipe_of([base, *order], "opcm"), tmp_path / out).returncode == 0
    forth, back = (load_file(tmp_path / o / "model.safetensors") for o in ("forth", "back"))
    assert any(not torch.equal(forth[k], back[k]) for k in forth)


@pytest.mark.parametrize("scale", ["tensor", 0.25])
def test_scale_without_the_whole_model(models, tmp_path, scale):
    recipe = recipe_of(models, "opcm", parameters={"scale": scale})
    assert mergekit(recipe, tmp_path / "out").returncode == 0
    result, base = load_file(tmp_path / "out/model.safetensors"), load_file(models[0] / "model.safetensors")
    experts = [load_file(m / "model.safetensors") for m in models[1:]]
    name = "model.layers.0.mlp.up_proj.weight"
    got = float((result[name].double() - base[name].double()).norm())
    norms = [float((e[name].double() - base[name].double()).norm()) for e in experts]
    whole = float(float64_merge("opcm", {}, models)[name].norm())
    if scale == "tensor":
        assert got == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    else:
        assert got != pytest.approx(whole, rel=1e-3)


def test_tokenizer_of_the_base_is_allowed(models, tmp_path):
    done = mergekit(recipe_of(models, "opcm", tokenizer={"source": "base"}), tmp_path / "out")
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parameters": {"alhpa": 0.3}}, "Unknown parameter 'alhpa' in the parameters of the recipe for opcm. "
                                         "Did you mean 'alpha'? Known: alpha, scale, variant."),
        ({"parameters": {"variant": "blok"}}, "variant must be one of 'fusionbench', 'block', 'paper'; got 'blok'"),
        ({"parameters": {"scale": "both"}}, "scale must be model, tensor or a number; got 'both'"),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused_in_one_line(base_folder, expert_folders, tmp_path, change, text):
    done = mergekit(recipe_of([base_folder, *expert_folders], "opcm", **change), tmp_path / "out")
    assert done.returncode != 0
    assert text in " ".join(done.stderr.split()) or text in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_parameters_of_one_model_are_refused(base_folder, expert_folders, tmp_path):
    recipe = recipe_of([base_folder, *expert_folders], "magmax")
    recipe["models"][1]["parameters"] = {"lambda": 0.2}
    done = mergekit(recipe, tmp_path / "out")
    assert done.returncode == 2
    assert "magmax has no parameter per model; lambda of model" in done.stderr
    assert "Traceback" not in done.stderr


def test_slices_are_refused_for_a_whole_model_scale(base_folder, expert_folders, tmp_path):
    sources = [{"model": str(m), "layer_range": [0, 1]} for m in (base_folder, *expert_folders)]
    recipe = {"merge_method": "opcm", "base_model": str(base_folder), "slices": [{"sources": sources}]}
    done = mergekit(recipe, tmp_path / "out")
    assert done.returncode == 2
    assert "set `scale: tensor` or a number under `parameters:`" in done.stderr
    assert mergekit({**recipe, "parameters": {"scale": "tensor"}}, tmp_path / "out2").returncode == 0


def test_a_run_leaves_recipes_that_mergekit_takes(base_folder, expert_folders, tmp_path):
    rule = get_rule("task_arithmetic")  # mergekit's own method of that name
    text = mergekit_yaml("task_arithmetic", rule, base=base_folder, experts=expert_folders, dtype=torch.float32)
    done = mergekit(yaml.safe_load(text), tmp_path / "out")
    assert done.returncode == 0, done.stderr[-1500:]
    result, base = load_file(tmp_path / "out/model.safetensors"), load_file(base_folder / "model.safetensors")
    experts = [load_file(e / "model.safetensors") for e in expert_folders]
    for name in base:
        expected = base[name] + 0.3 * sum(e[name] - base[name] for e in experts)
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)


def test_mergekits_own_names_are_left_alone():
    assert not isinstance(registry.get("task_arithmetic"), RuleMethod)
    assert {m.spec.name for m in registry.registered_methods() if isinstance(m, RuleMethod)} == {
        "magmax", "opcm", "average", "ema",
    }  # fmt: skip


def test_errors_are_value_errors_for_python_callers():
    assert issubclass(MergekitRecipeError, ValueError)
    assert MergekitRecipeError("so").exit_code == 2


def test_autoload_can_be_turned_off(base_folder, expert_folders, tmp_path):
    done = mergekit(recipe_of([base_folder, *expert_folders], "magmax"), tmp_path / "out", HF_CONTMERGE_AUTOLOAD="0")
    assert done.returncode != 0
    assert "Unimplemented merge method magmax" in done.stderr


def test_a_broken_plugin_breaks_neither_torch_nor_mergekit(tmp_path):
    code = (
        "import sys; sys.modules['hf_contmerge.merge_stream'] = None\n"
        "import torch, mergekit.merge_methods as m\n"
        "print(torch.ones(2).sum().item(), len(m.registered_methods()) > 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2.0", "True"], done.stderr
    assert "could not be loaded into mergekit" in done.stderr


def test_autoload_costs_next_to_nothing():
    seconds = []
    before = list(sys.meta_path)
    for _ in range(200):
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_MergekitFinder"]
        start = time.perf_counter()
        _autoload.register()
        seconds.append(time.perf_counter() - start)
    sys.meta_path[:] = before
    assert statistics.median(seconds) < 1e-3
