"""The stock mergekit commands, run as users run them, on toy Llamas; and the way in through `import torch`."""

import gc
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toys.models import perturbed, toy_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.merge_rules import Norms, Weight, get_rule, rule_names
from hf_contmerge.merging.in_mergekit import autoload
from hf_contmerge.merging.in_mergekit.plugin import MergekitRecipeError, RuleMethod
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights

PLUGIN = "hf_contmerge.merging.in_mergekit.plugin"
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
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(recipe))
    command = [str(COMMAND), str(file), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def merge_here(recipe: dict, out: Path) -> dict[str, torch.Tensor]:
    """Do the same in this process, as a notebook does; return the merged tensors."""
    LoaderCache.loaders.clear()  # mergekit keeps files open for good
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    return load_file(out / "model.safetensors")


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


def float64_merge(name, parameters, models, scale=None):
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
    scale = rule.scale(Norms(tuple(norms), total)) if scale is None else scale
    return {k: scale * v for k, v in running.items()}


def literal_update(rule, running, delta, matrix):
    if type(rule).__name__ != "Opcm":
        return rule.update(running, delta, Weight("", matrix, 1))
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
    """Mergekit's result of a case, with what it was made of; by the stock command where the way in may matter."""
    name, parameters, bound = CASES[request.param]
    out = tmp_path_factory.mktemp("out") / "merged"
    recipe = recipe_of(models, name, parameters=parameters)
    if request.param in ("magmax", "opcm"):
        scratch = tmp_path_factory.mktemp("scratch")
        done = mergekit(recipe, out, TMPDIR=str(scratch))
        assert done.returncode == 0, done.stderr[-2000:]
        assert not list(scratch.glob("contmerge-*"))
    else:
        merge_here(recipe, out)
    return name, parameters, bound, out


def test_merged_equals_a_float64_rederivation(merged, models):
    name, parameters, bound, out = merged
    base, result = load_file(models[0] / "model.safetensors"), load_file(out / "model.safetensors")
    expected = float64_merge(name, parameters, models)
    assert set(result) == set(expected)
    error = sum(float((result[k].double() - base[k].double() - expected[k]).norm()) ** 2 for k in expected) ** 0.5
    assert error / sum(float(v.norm()) ** 2 for v in expected.values()) ** 0.5 <= bound


def test_merged_equals_the_loop_bit_for_bit(merged, models, tmp_path):
    name, parameters, _, out = merged
    rule, running, norms, base = get_rule(name, **parameters), None, (), Weights(models[0])
    for i, expert in enumerate(models[1:]):
        places = [tmp_path / f"{kind}{i}" for kind in ("running", "merged")]
        for place in places:
            place.mkdir()
        step = merge_experts(
            rule, base, [open_expert(expert, base)], running=running, earlier=norms,
            running_out=places[0], merged_out=Output(places[1], torch.float32),
        )  # fmt: skip
        running, norms = places[0], step.norms.experts
    ours, theirs = load_file(places[1] / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_half_precision_without_dtype_is_computed_in_float32(models, tmp_path):
    recipe = recipe_of(models, "opcm")
    del recipe["dtype"]
    result, base = merge_here(recipe, tmp_path / "out"), load_file(models[0] / "model.safetensors")
    expected = float64_merge("opcm", {}, models)
    for name, delta in expected.items():
        exact = base[name].double() + delta
        assert result[name].dtype == base[name].dtype
        ulp = torch.finfo(base[name].dtype).eps * exact.abs() + 1e-6
        assert bool(((result[name].double() - exact).abs() <= ulp).all()), name


def test_the_order_of_models_is_the_order_of_stages(models, tmp_path):
    base, first, second, _ = models
    name, tensor = "model.layers.1.mlp.up_proj.weight", load_file(base / "model.safetensors")
    orders = {"forth": [base, first, second], "back": [base, second, first]}
    merged = {o: merge_here(recipe_of(m, "opcm"), tmp_path / o)[name].double() for o, m in orders.items()}
    expected = {o: tensor[name].double() + float64_merge("opcm", {}, m)[name] for o, m in orders.items()}
    apart = float((expected["forth"] - expected["back"]).norm())
    assert all(float((merged[o] - expected[o]).norm()) < 0.01 * apart for o in orders)


@pytest.mark.parametrize("scale", ["tensor", 0.25])
def test_scale_without_the_whole_model(models, tmp_path, scale):
    recipe = recipe_of(models, "opcm", parameters={"scale": scale})
    result, base = merge_here(recipe, tmp_path / "out"), load_file(models[0] / "model.safetensors")
    experts = [load_file(m / "model.safetensors") for m in models[1:]]
    name = "model.layers.0.mlp.up_proj.weight"
    got = float((result[name].double() - base[name].double()).norm())
    norms = [float((e[name].double() - base[name].double()).norm()) for e in experts]
    if scale == "tensor":
        assert got == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    else:
        assert got == pytest.approx(float(float64_merge("opcm", {}, models, scale)[name].norm()), rel=1e-3)


def test_tokenizer_of_the_base_is_allowed(models, tmp_path):
    plain = merge_here(recipe_of(models, "opcm"), tmp_path / "plain")
    result = merge_here(recipe_of(models, "opcm", tokenizer={"source": "base"}), tmp_path / "out")
    assert all(torch.equal(result[k], plain[k]) for k in plain)


@pytest.mark.slow
def test_an_unknown_parameter_is_refused_in_one_line(base_folder, expert_folders, tmp_path):
    recipe = recipe_of([base_folder, *expert_folders], "magmax", parameters={"lamda": 0.7})
    done = mergekit(recipe, tmp_path / "out")
    assert done.returncode == 2
    assert "Error: Unknown parameter 'lamda' in the parameters of the recipe for magmax." in done.stderr
    assert "Did you mean 'lambda'? Known: first_layer, lambda, last_layer, rounding." in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_parameters_of_one_model_are_refused(base_folder, expert_folders, tmp_path):
    recipe = recipe_of([base_folder, *expert_folders], "magmax")
    recipe["models"][1]["parameters"] = {"lambda": 0.2}
    with pytest.raises(MergekitRecipeError, match="magmax has no parameter per model; lambda of model"):
        merge_here(recipe, tmp_path / "out")


@pytest.mark.slow
def test_slices_are_refused_for_a_whole_model_scale(base_folder, expert_folders, tmp_path):
    sources = [{"model": str(m), "layer_range": [0, 1]} for m in (base_folder, *expert_folders)]
    recipe = {"merge_method": "opcm", "base_model": str(base_folder), "slices": [{"sources": sources}]}
    done = mergekit(recipe, tmp_path / "out")
    assert done.returncode == 2
    assert "set `scale: tensor` or a number under `parameters:`" in done.stderr
    assert "Traceback" not in done.stderr
    merge_here({**recipe, "parameters": {"scale": "tensor"}}, tmp_path / "out2")


def test_a_run_leaves_recipes_that_mergekit_takes(base_folder, expert_folders, tmp_path):
    rule = get_rule("task_arithmetic")  # mergekit's own method of that name
    text = mergekit_yaml("task_arithmetic", rule, base=base_folder, experts=expert_folders, dtype=torch.float32)
    result, base = merge_here(yaml.safe_load(text), tmp_path / "out"), load_file(base_folder / "model.safetensors")
    experts = [load_file(e / "model.safetensors") for e in expert_folders]
    for name in base:
        expected = base[name] + 0.3 * sum(e[name] - base[name] for e in experts)
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)


def test_mergekits_own_names_are_left_alone():
    assert not isinstance(registry.get("task_arithmetic"), RuleMethod)
    assert not isinstance(registry.get("ties"), RuleMethod)
    ours = {m.spec.name for m in registry.registered_methods() if isinstance(m, RuleMethod)}
    assert ours == {*rule_names()} - {"task_arithmetic", "ties"}


@pytest.mark.parametrize(
    ("method", "words", "warned"),
    [
        ("task_arithmetic", {"dtype": "bfloat16"}, "bfloat16"),
        ("ties", {"dtype": "float32", "out_dtype": "float16"}, "float16"),
        ("ties", {"dtype": "bfloat16", "out_dtype": "float32"}, "bfloat16"),
        ("task_arithmetic", {"dtype": "float32"}, None),
        ("task_arithmetic", {}, None),
        ("magmax", {"dtype": "bfloat16"}, None),
    ],
)
def test_what_mergekits_own_methods_round_is_warned_of(
    method, words, warned, base_folder, expert_folders, tmp_path, caplog
):
    recipe = recipe_of([base_folder, *expert_folders], method, parameters={} if method == "magmax" else {"weight": 1.0})
    recipe = {word: value for word, value in recipe.items() if word != "dtype"} | words
    merge_here(recipe, tmp_path / "out")
    said = [m for m in caplog.messages if "mergekit's own" in m]
    assert len(said) == bool(warned)
    assert all(f"merge_method {method} is" in m and f"nearest {warned} values" in m for m in said)
    assert (tmp_path / "out" / "rounding.json").is_file() == (method == "magmax")


def test_errors_are_value_errors_for_python_callers():
    assert issubclass(MergekitRecipeError, ValueError)
    assert MergekitRecipeError("so").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("first", ["mergekit.merge_methods", "mergekit.merge_methods.registry", PLUGIN])
def test_rules_are_registered_whatever_is_imported_first(first):
    code = f"import {first}, mergekit.merge_methods as m; print(m.get('magmax').spec.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["magmax"], done.stderr
    assert "Cannot load" not in done.stderr


def test_a_module_may_be_called_model():
    models = [{"model": "b"}, {"model": "e"}]
    module = {"models": models, "parameters": {"lambda": 0.4}}
    recipe = {"merge_method": "magmax", "base_model": "b", "modules": {"vision_model": module}}
    RuleMethod("magmax").check(MergeConfiguration.model_validate(recipe))
    models[1]["parameters"] = {"lambda": 0.4}
    with pytest.raises(ValueError, match="lambda of model e of module vision_model belongs under"):
        RuleMethod("magmax").check(MergeConfiguration.model_validate(recipe))


@pytest.mark.parametrize("stored_by", ["all", "first expert"])
def test_a_tied_head_that_is_stored_counts_once(base_folder, expert_folders, tmp_path, stored_by):
    plain = [base_folder, *expert_folders]
    models = list(plain)
    for i in range(len(models)) if stored_by == "all" else [1]:
        models[i] = shutil.copytree(plain[i], tmp_path / plain[i].name)
        tensors = load_file(models[i] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, models[i] / "model.safetensors", metadata={"format": "pt"})
    expected = merge_here(recipe_of(plain, "opcm"), tmp_path / "plain")
    result = merge_here(recipe_of(models, "opcm"), tmp_path / "stored")
    assert torch.equal(result.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert set(result) == set(expected)
    assert all(torch.equal(result[k], expected[k]) for k in expected)


def test_a_tied_head_that_is_stored_is_drawn_as_the_table_is(base_folder, expert_folders, tmp_path):
    models = [shutil.copytree(m, tmp_path / m.name) for m in (base_folder, *expert_folders)]
    for model in models:
        tensors = load_file(model / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = merge_here(recipe_of(models, "random_mix"), tmp_path / "out")
    assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])


def test_the_union_of_one_vocabulary_is_that_vocabulary(base_folder, expert_folders, tmp_path):
    models = [base_folder, *expert_folders]
    plain = merge_here(recipe_of(models, "opcm"), tmp_path / "plain")
    result = merge_here(recipe_of(models, "opcm", tokenizer={"source": "union"}), tmp_path / "out")
    assert all(torch.equal(result[k], plain[k]) for k in plain)


def test_a_whole_model_scale_takes_one_vocabulary(base_folder, expert_folders, tmp_path):
    model, tokenizer = (kind.from_pretrained(expert_folders[0]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens("<|new|>")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "wider")
    recipe = recipe_of([base_folder, tmp_path / "wider"], "opcm", tokenizer={"source": "union"})
    with pytest.raises(
        MergekitRecipeError, match=r"embed_tokens.weight of .* is not what its files hold .*permuted voc"
    ):
        merge_here(recipe, tmp_path / "out")
    recipe["parameters"] = {"scale": 0.5}
    assert merge_here(recipe, tmp_path / "out2")["model.embed_tokens.weight"].shape[0] == 385


@pytest.mark.slow
def test_adapters_that_mergekit_has_not_merged(base_folder, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(r=2)).save_pretrained(adapter)
    done = mergekit(recipe_of([base_folder, f"{base_folder}+{adapter}"], "magmax"), tmp_path / "out")
    assert done.returncode == 2
    assert f"merges the adapter of {base_folder}+{adapter} into a model first" in done.stderr
    assert "--lora-merge-cache DIR. Or use `contmerge merge from-recipe`" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(
        MergekitRecipeError, match=r"adapter is an adapter\. Write `model: BASE\+.*adapter` and give --lora"
    ):
        merge_here(recipe_of([base_folder, adapter], "opcm"), tmp_path / "out")


@pytest.mark.parametrize("alpha", [[0.2, 0.8], [{"filter": "mlp", "value": 0.2}, {"value": 0.8}]])
def test_a_whole_model_scale_takes_one_alpha(base_folder, expert_folders, tmp_path, alpha):
    recipe = recipe_of([base_folder, *expert_folders], "opcm", parameters={"alpha": alpha})
    with pytest.raises(MergekitRecipeError, match="norms of whole models, for which alpha must be one value"):
        merge_here(recipe, tmp_path / "out")
    recipe["parameters"]["scale"] = "tensor"
    merge_here(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"alhpa": 0.3}, "Did you mean 'alpha'. Known: alpha, first_layer, last_layer, rounding, scale"),
        ({"rounding": "up"}, "Unknown rounding 'up'. Known: nearest, stochastic."),
        ({"variant": "blok"}, "variant must be one of 'block', 'fusionbench', 'paper'; got 'blok'"),
        ({"scale": "both"}, "scale must be model, tensor or a number; got 'both'"),
        ({"scale": float("nan")}, "scale must be model, tensor or a number; got nan"),
        ({"scale": True}, "scale must be model, tensor or a number; got True"),
        ({"scale": [0.1, float("inf")]}, "scale must be model, tensor or a number; got inf"),
        (
            {"alpha": [{"filter": "mlp", "value": float("nan")}, {"value": 0.5}]},
            "alpha must be a finite float; got nan",
        ),
    ],
)
def test_bad_values_are_refused_before_planning(base_folder, expert_folders, tmp_path, parameters, text):
    with pytest.raises(MergekitRecipeError, match=text):
        merge_here(recipe_of([base_folder, *expert_folders], "opcm", parameters=parameters), tmp_path / "out")


def test_a_number_that_yaml_leaves_a_string_is_a_number(base_folder, expert_folders, tmp_path):
    words = yaml.safe_load("{scale: 1e-1, alpha: 4e-1}")
    assert words == {"scale": "1e-1", "alpha": "4e-1"}
    models = [base_folder, *expert_folders]
    read = merge_here(recipe_of(models, "opcm", parameters=words), tmp_path / "a")
    meant = merge_here(recipe_of(models, "opcm", parameters={"scale": 0.1, "alpha": 0.4}), tmp_path / "b")
    assert all(torch.equal(read[k], meant[k]) for k in meant)


def test_an_expert_that_changed_in_place_is_read_again(base_folder, expert_folders, tmp_path):
    first = shutil.copytree(expert_folders[0], tmp_path / "first")
    recipe = recipe_of([base_folder, first, expert_folders[1]], "opcm")
    before = merge_here(recipe, tmp_path / "before")
    with (first / "model.safetensors").open("r+b") as file:
        file.write((expert_folders[2] / "model.safetensors").read_bytes())
    again = merge_here(recipe, tmp_path / "again")
    fresh = merge_here(recipe_of([base_folder, expert_folders[2], expert_folders[1]], "opcm"), tmp_path / "fresh")
    assert all(torch.equal(again[k], fresh[k]) for k in fresh)
    assert not all(torch.equal(again[k], before[k]) for k in before)


def test_a_sweep_keeps_one_set_of_running_tensors(base_folder, expert_folders, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    models = [base_folder, *expert_folders]
    for alpha in (0.2, 0.4, 0.6):
        merge_here(recipe_of(models, "opcm", parameters={"alpha": alpha}), tmp_path / str(alpha))
    gc.collect()
    assert len(list((tmp_path / "tmp").glob("contmerge-*"))) == 1


def test_a_damaged_expert_is_named_and_leaves_no_running_tensors(base_folder, expert_folders, tmp_path):
    (tmp_path / "tmp").mkdir()
    last = shutil.copytree(expert_folders[1], tmp_path / "last")
    tensors = load_file(last / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, last / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of([base_folder, expert_folders[0], last], "opcm")
    done = mergekit(recipe, tmp_path / "out", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 2
    assert "model.norm.weight in" in done.stderr
    assert not list((tmp_path / "tmp").glob("contmerge-*"))


@pytest.mark.slow
def test_an_expert_listed_twice_is_refused(base_folder, expert_folders, tmp_path):
    copy = shutil.copytree(expert_folders[0], tmp_path / "copy")
    for twin, said in ((copy, "has the same weights as"), (expert_folders[0], "is listed twice")):
        recipe = recipe_of([base_folder, *expert_folders, twin], "magmax")
        done = mergekit(recipe, tmp_path / "out")
        assert done.returncode == 2
        assert said in done.stderr


def test_autoload_can_be_turned_off(base_folder, expert_folders, tmp_path):
    done = mergekit(recipe_of([base_folder, *expert_folders], "magmax"), tmp_path / "out", HF_CONTMERGE_AUTOLOAD="0")
    assert done.returncode != 0
    assert "Unimplemented merge method magmax" in done.stderr


def test_a_broken_plugin_breaks_neither_torch_nor_mergekit(tmp_path):
    code = (
        "import sys; sys.modules['hf_contmerge.merging.stream'] = None\n"
        "import torch, mergekit.merge_methods as m\n"
        "print(torch.ones(2).sum().item(), len(m.registered_methods()) > 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2.0", "True"], done.stderr
    assert "Cannot load hf_contmerge's merge methods into mergekit" in done.stderr


def test_autoload_costs_next_to_nothing():
    seconds = []
    before = list(sys.meta_path)
    for _ in range(200):
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_MergekitFinder"]
        start = time.perf_counter()
        autoload.register()
        seconds.append(time.perf_counter() - start)
    sys.meta_path[:] = before
    assert statistics.median(seconds) < 1e-3
