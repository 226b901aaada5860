"""The same recipe by this engine and by mergekit: the same weights, or a sentence that says why not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toys import ROOT
from toys.models import perturbed, toy_llama
from toys.rules import PLAIN
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError
from hf_contmerge.merge_rules import get_rule, rule_names
from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe
from hf_contmerge.merging.in_mergekit.replay import carry_out, mergekit_yaml
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.weights import Weights, weights_sha256

PARAMETERS = {"null_space": {"rank": 4}, "ties": {"density": 0.5}, "opcm": {"alpha": 0.4}, "random_mix": {"seed": 3}}
MERGEKITS_OWN = ("task_arithmetic", "ties")
OURS = [name for name in rule_names() if name not in MERGEKITS_OWN]
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module", params=["tied-fp32", "untied-fp32", "tied-bf16", "untied-bf16"])
def models(request, tmp_path_factory):
    """A base and three experts."""
    return make_models(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A base and three experts, tied, bfloat16."""
    return make_models(tmp_path_factory.mktemp("half"), "tied-bf16")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def adapted(request, tmp_path_factory):
    """A base and two LoRA adapters of it, trained by nobody: the factors are random."""
    folder = tmp_path_factory.mktemp(f"adapted-{request.param}")
    base = toy_llama(folder / "base", seed=0, dtype=KINDS[request.param])
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        adapter.save_pretrained(folder / f"a{seed}")
    return folder


def make_models(folder, kind):
    tied, dtype = kind.split("-")
    base = toy_llama(folder / "base", seed=0, tied=tied == "tied", dtype=KINDS[dtype])
    return [base, *(perturbed(base, folder / f"e{i}", seed=i, size=0.02) for i in (1, 2, 3))]


def recipe_of(models, rule, **more):
    base, *experts = models
    parameters = {**PARAMETERS.get(rule, {}), **({"weight": 1.0} if rule in MERGEKITS_OWN else {})}
    words = {
        "merge_method": rule,
        "base_model": str(base),
        "models": [{"model": str(e)} for e in experts],
        "parameters": parameters,
        "dtype": "float32",
        **more,
    }
    return {word: value for word, value in words.items() if value not in (None, {})}


def write(folder, recipe, name="recipe.yml"):
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def by_mergekit(recipe, out, **options):
    """What `mergekit-yaml` does after it has read its words, in this process; return the folder."""
    LoaderCache.loaders.clear()  # mergekit keeps files open for good
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True, **options))
    return out


def by_engine(recipe, out):
    carry_out(read_mergekit_recipe(write(out.parent, recipe, f"{out.name}.yml")), out)
    return out


def both(recipe, folder, **options):
    return by_mergekit(recipe, folder / "theirs", **options), by_engine(recipe, folder / "ours")


def by_command(command, *words):
    words = [str(Path(sys.executable).with_name(command)), *map(str, words), "--quiet"]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def assert_same(theirs, ours):
    assert weights_sha256(theirs) == weights_sha256(ours)


def assert_close(theirs, ours, *, rtol, atol):
    found, expected = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", PLAIN)
def test_every_rule_gives_the_same_weights(models, rule, tmp_path):
    theirs, ours = both(recipe_of(models, rule), tmp_path)
    parameters = {"lambda": 1.0, **PARAMETERS.get(rule, {})} if rule in MERGEKITS_OWN else PARAMETERS.get(rule, {})
    state = MergeState.create(tmp_path / "state", base=models[0], rule=rule, **parameters)
    for expert in models[1:]:
        state.add(expert)
    assert_same(state.export(tmp_path / "exported", dtype="float32"), ours)
    if rule in MERGEKITS_OWN:
        assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    else:
        assert_same(theirs, ours)


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=pytest.mark.slow) for rule in ("iso_c", "ties")])
def test_the_command_itself(half, rule, tmp_path):
    file = write(tmp_path, recipe_of(half, rule))
    done = by_command("mergekit-yaml", file, tmp_path / "theirs")
    assert done.returncode == 0, done.stderr[-2000:]
    carry_out(read_mergekit_recipe(file), tmp_path / "ours")
    if rule == "ties":
        assert_close(tmp_path / "theirs", tmp_path / "ours", rtol=1e-6, atol=1e-7)
    else:
        assert_same(tmp_path / "theirs", tmp_path / "ours")


def test_one_expert_has_its_own_bits(half, tmp_path):
    for rule in ("opcm", "average", "null_space"):
        (tmp_path / rule).mkdir()
        theirs, ours = both(recipe_of(half[:2], rule, out_dtype="bfloat16"), tmp_path / rule)
        assert_same(theirs, ours)
        assert_same(half[1], ours)


def test_large_tensors_and_several_threads(tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("large")
    base = toy_llama(folder / "base", seed=0, hidden=704, layers=1)  # its tables and maps are more than one piece
    models = [base, *(perturbed(base, folder / f"e{i}", seed=i, size=0.02) for i in (1, 2))]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rule in ("ema", "slao", "iso_c", "null_space"):
            (tmp_path / rule).mkdir()
            assert_same(*both(recipe_of(models, rule), tmp_path / rule))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(tmp_path)
        shutil.rmtree(folder)


@pytest.mark.parametrize("rule", ["magmax", "opcm", "iso_c"])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (None, None), (None, "bfloat16"), ("float32", None), ("float32", "float32"), ("float32", "bfloat16"),
        ("float32", "float16"), ("bfloat16", None), ("bfloat16", "bfloat16"), ("torch.float32", "torch.bfloat16"),
    ],
)  # fmt: skip
def test_dtypes_of_half_precision_models(half, rule, dtype, out_dtype, tmp_path):
    assert_same(*both(recipe_of(half, rule, dtype=dtype, out_dtype=out_dtype), tmp_path))


def test_without_dtype_the_widest_input_decides(half, tmp_path):
    wide = [half[0], *(in_dtype(e, tmp_path / e.name, {"": torch.float32}) for e in half[1:3])]
    theirs, ours = both(recipe_of(wide, "opcm", dtype=None), tmp_path)
    assert_same(theirs, ours)
    assert Weights(ours).dtype("model.norm.weight") == torch.float32
    assert json.loads((ours / "config.json").read_text())["dtype"] == "float32"


def test_without_dtype_each_tensor_keeps_its_own(half, tmp_path):
    mixed = [in_dtype(m, tmp_path / m.name, {"norm": torch.float32}) for m in half[:3]]
    theirs, ours = both(recipe_of(mixed, "magmax", dtype=None), tmp_path)
    assert_same(theirs, ours)
    assert Weights(ours).dtype("model.norm.weight") == torch.float32
    with pytest.raises(RecipeError, match=r"would have 2 dtypes, other than the base's\. Set `dtype: float32`, and"):
        by_engine(recipe_of([half[0], *mixed[1:]], "magmax", dtype=None), tmp_path / "out")


@pytest.mark.parametrize(
    ("rule", "dtype", "out_dtype", "text"),
    [
        ("ties", None, None, r"mergekit's own ties would compute .* in torch.bfloat16\. Set `dtype: float32`"),
        ("task_arithmetic", "bfloat16", None, "mergekit's own task_arithmetic would compute"),
    ],
)
def test_rounding_that_mergekit_would_do_is_refused(half, rule, dtype, out_dtype, text, tmp_path):
    with pytest.raises(RecipeError, match=text):
        by_engine(recipe_of(half, rule, dtype=dtype, out_dtype=out_dtype), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("bfloat16", None), ("float16", None), (None, "float16"), ("bfloat16", "float32"), ("bfloat16", "float16")],
)
@pytest.mark.parametrize(("rule", "rounding"), [("magmax", None), ("opcm", "nearest"), ("opcm", "stochastic")])
def test_experts_are_never_rounded_first(base_folder, expert_folders, rule, rounding, dtype, out_dtype, tmp_path):
    """Experts in float32: the update is rounded once, whatever dtype mergekit is asked to compute in."""
    parameters = {**PARAMETERS.get(rule, {}), **({"rounding": rounding} if rounding else {})}
    words = {"parameters": parameters, "dtype": dtype, "out_dtype": out_dtype}
    theirs, ours = both(recipe_of([base_folder, *expert_folders], rule, **words), tmp_path)
    assert_same(theirs, ours)
    state = MergeState.create(tmp_path / "state", base=base_folder, rule=rule, **PARAMETERS.get(rule, {}))
    state.add(*expert_folders)
    loop = state.export(tmp_path / "loop", dtype=out_dtype or dtype, rounding=rounding)
    assert_same(loop, ours)
    kept = [json.loads((folder / "rounding.json").read_text()) for folder in (theirs, ours)]
    assert kept[0] == kept[1] == json.loads((loop / "merge.json").read_text())["stored"]


def test_an_update_smaller_than_the_last_bit(half, tmp_path, caplog):
    """The usual `dtype: bfloat16` on experts in float32: kept on average, or a warning that says what to do."""
    base, experts = half[0], []
    for seed in (1, 2):
        experts.append(in_dtype(base, tmp_path / f"x{seed}", {"": torch.float32}))
        tensors, draw = load_file(experts[-1] / "model.safetensors"), torch.Generator().manual_seed(seed)
        tensors = {n: t + 1e-5 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
        save_file(tensors, experts[-1] / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of([base, *experts], "average", dtype="bfloat16")
    assert_same(*both(recipe, tmp_path))
    assert json.loads((tmp_path / "theirs" / "rounding.json").read_text())["survival"] == pytest.approx(1, abs=0.15)
    assert "rounding" not in caplog.text
    theirs, ours = both(recipe | {"parameters": {"rounding": "nearest"}}, make(tmp_path / "nearest"))
    assert_same(theirs, ours)
    assert json.loads((ours / "rounding.json").read_text())["survival"] < 0.5
    for out in (theirs, ours):
        assert f"{out}: rounding takes part of the update (bfloat16, nearest rounding: " in caplog.text
    assert caplog.text.count("`dtype: float32`, `rounding: stochastic` or a higher learning rate keeps more") == 2


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_what_the_base_holds_in_float32(half, dtype, tmp_path):
    """Beside weights of 16 bits, as routers' biases are: it stays float32, under mergekit too."""
    odd = [in_dtype(m, tmp_path / m.name, {"norm": torch.float32}) for m in half]
    theirs, ours = both(recipe_of(odd, "magmax", dtype=dtype), tmp_path)
    assert_same(theirs, ours)
    for name, tensor in load_file(ours / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if dtype == "float32" or "norm" in name else torch.bfloat16)


def make(folder):
    folder.mkdir()
    return folder


def in_dtype(model, out, dtypes):
    """Copy a model, with the tensors whose names hold a word in that word's dtype."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for word, dtype in dtypes.items():
        tensors = {name: t.to(dtype) if word in name else t for name, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("rule", ["random_mix", "opcm"])
@pytest.mark.parametrize("tokenizer", [{"tokenizer": {"source": "base"}}, {"tokenizer_source": "base"}, "expert"])
def test_tokenizers(models, rule, tokenizer, tmp_path):
    words = {"tokenizer": {"source": str(models[1])}} if tokenizer == "expert" else tokenizer
    theirs, ours = both(recipe_of(models, rule, **words), tmp_path)
    assert_same(theirs, ours)
    plain = by_engine(recipe_of(models, rule), tmp_path / "plain")
    assert_same(plain, ours)
    vocabularies = [json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (theirs, ours)]
    assert vocabularies[0] == vocabularies[1]


def test_tokenizers_with_which_mergekit_would_change_rows(base_folder, expert_folders, tmp_path):
    models = [base_folder, *expert_folders]
    swapped, short, none = (tmp_path / name for name in ("swapped", "short", "none"))
    for folder in (swapped, short, none):
        shutil.copytree(expert_folders[0], folder)
    edit_vocabulary(swapped, lambda v: {**v, "a": v["b"], "b": v["a"]})
    edit_vocabulary(short, lambda v: {t: i for t, i in v.items() if i != max(v.values())})
    (none / "tokenizer.json").unlink()
    for odd, source, text in (
        (swapped, "base", "The tokenizers of .*base and .*swapped differ: mergekit would reorder rows. Remove the"),
        (short, str(short), r"short has 383 tokens, the tables of .*base have 384 rows: mergekit would resize them\."),
        (none, str(none), r"none has no tokenizer.json, so its tokens cannot be compared\."),
    ):
        with pytest.raises(RecipeError, match=text):
            by_engine(recipe_of([base_folder, odd], "magmax", tokenizer={"source": source}), tmp_path / "out")
    shutil.rmtree(none)
    shutil.copytree(expert_folders[0], none, ignore=lambda _f, names: [n for n in names if n.startswith("tokenizer")])
    assert_same(*both(recipe_of([models[0], models[2], none], "magmax", tokenizer={"source": "base"}), tmp_path))


def edit_vocabulary(folder, change):
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = change(values["model"]["vocab"])
    file.write_text(json.dumps(values))


@pytest.mark.slow
def test_two_documents_one_after_the_other(half, tmp_path):
    base, first, second, third = half
    early = recipe_of([base, first, second], "magmax")
    late = recipe_of([base, "early", third], "opcm", out_dtype="bfloat16")
    (tmp_path / "both.yml").write_text(yaml.safe_dump_all([{"name": "early", **early}, late], sort_keys=False))
    done = by_command("mergekit-multi", tmp_path / "both.yml", "-I", tmp_path, "--out-path", tmp_path / "theirs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "early", by_engine(early, tmp_path / "ours1"))
    late["models"][0]["model"] = str(tmp_path / "early")
    assert_same(tmp_path / "theirs", by_engine(late, tmp_path / "ours2"))
    with pytest.raises(RecipeError, match=r"holds 2 recipes\. Put each into its own file, or use `mergekit-multi"):
        read_mergekit_recipe(tmp_path / "both.yml")


@pytest.mark.parametrize("rule", ["average", "opcm", "ema"])
def test_adapters(adapted, rule, tmp_path):
    base = adapted / "base"
    parameters = {"variant": "block"} if rule == "opcm" else {}
    models = [base, f"{base}+{adapted / 'a1'}", f"{base}+{adapted / 'a2'}"]
    recipe = recipe_of(models, rule, parameters=parameters, out_dtype="float32")
    theirs, ours = both(recipe, tmp_path, lora_merge_cache=str(tmp_path / "cache"))
    plain = by_engine(
        {**recipe, "models": [{"model": str(adapted / "a1")}, {"model": str(adapted / "a2")}]}, tmp_path / "p"
    )
    assert_same(plain, ours)
    bits = torch.finfo(Weights(base).dtype("model.norm.weight")).eps
    start, exact, rounded = (load_file(f / "model.safetensors") for f in (base, ours, theirs))
    for name, tensor in exact.items():
        delta = tensor - start[name].float()
        # An adapter merged into a model has the model's precision, once for each expert.
        assert float((rounded[name] - tensor).norm()) <= 2 * bits * float(tensor.norm()) + 1e-6 * float(delta.norm()), (
            name
        )


def test_recipes_of_adapters_are_written_as_mergekit_reads_them(adapted, tmp_path):
    odd = shutil.copytree(adapted, tmp_path / "a+b@c")
    text = mergekit_yaml(
        "average", get_rule("average"), base=odd / "base", experts=[odd / "a1", odd / "a2"], dtype=None
    )
    theirs = by_mergekit(yaml.safe_load(text), tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"was trained on .*, not on"):
        by_engine(yaml.safe_load(text), tmp_path / "ours")  # copied, so under another name than peft wrote down
    carry_out(read_mergekit_recipe(tmp_path / "ours.yml"), tmp_path / "ours", force=True)
    assert_close(theirs, tmp_path / "ours", rtol=0.05, atol=0.02)


@pytest.mark.parametrize("rule", rule_names())
def test_recipes_that_are_written_are_read_again(base_folder, expert_folders, rule, tmp_path):
    made = get_rule(rule, **PARAMETERS.get(rule, {}))
    text = mergekit_yaml(rule, made, base=base_folder, experts=expert_folders, dtype=None)
    read = read_mergekit_recipe(write(tmp_path, yaml.safe_load(text)))
    assert read.rule == rule
    assert get_rule(rule, **read.parameters) == made
    assert (read.base, read.models) == (str(base_folder), tuple(map(str, expert_folders)))
    assert (read.dtype, read.out_dtype) == ("float32", "float32")


def test_relative_paths(half, tmp_path, monkeypatch):
    monkeypatch.chdir(half[0].parent)
    recipe = recipe_of(["base", "e1", "./e2"], "magmax")
    assert_same(*both(recipe, tmp_path, write_model_card=False))  # the card's writer asks the Hub for `e1`


def test_the_base_among_the_models_is_no_expert(half, tmp_path):
    recipe = recipe_of(half, "average")
    plain = by_engine(recipe, tmp_path / "plain")
    recipe["models"].insert(1, {"model": str(half[0])})
    theirs, ours = both(recipe, tmp_path)
    assert_same(theirs, ours)
    assert_same(plain, ours)


def test_per_model_parameters_that_are_alike(half, tmp_path):
    recipe = recipe_of(half, "ties", parameters={"normalize": True, "int8_mask": True, "density": 0.9})
    for entry in recipe["models"]:
        entry["parameters"] = {"weight": 1.0, "density": 0.5}
    recipe["models"].append({"model": str(half[0]), "parameters": {"weight": 7}})  # mergekit reads none of the base's
    theirs, ours = both(recipe, tmp_path)
    assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
    assert_same(ours, by_engine(recipe_of(half, "ties"), tmp_path / "plain"))


@pytest.mark.parametrize("word", ["weight", "take"])
def test_a_models_own_values_hold_with_a_scale_of_the_model(word, half, tmp_path):
    """A linear rule's scale reads no norms: `model`, the default of such rules, changes nothing."""
    recipe = recipe_of(half, "blend", parameters={"scale": "model"})
    for entry, value in zip(recipe["models"], (0.1, 0.9), strict=False):
        entry["parameters"] = {word: value}
    theirs, ours = both(recipe, tmp_path)
    assert_same(theirs, ours)


def test_mergekits_own_defaults_are_not_ours(half, tmp_path):
    words = {"task_arithmetic": {"lambda": 1.0}, "ties": {"lambda": 1.0, "density": 1.0}}
    for rule, expected in words.items():
        read = read_mergekit_recipe(write(tmp_path, recipe_of(half, rule, parameters={"weight": 1})))
        assert read.parameters == expected
        (tmp_path / rule).mkdir()
        theirs, ours = both(recipe_of(half, rule, parameters={"weight": 1}), tmp_path / rule)
        assert_close(theirs, ours, rtol=1e-6, atol=1e-7)


def test_numbers_that_yaml_leaves_strings(half, tmp_path):
    words = yaml.safe_load("{alpha: 4e-1, variant: block, scale: model}")
    assert words["alpha"] == "4e-1"
    assert read_mergekit_recipe(write(tmp_path, recipe_of(half, "opcm", parameters=words))).parameters == {
        "alpha": 0.4, "variant": "block",
    }  # fmt: skip
    read = read_mergekit_recipe(write(tmp_path, recipe_of(half, "null_space", parameters={"rank": "16"})))
    assert read.parameters == {"rank": 16}
    words = {"weight": "1e0", "lambda": "5e-1"}
    read = read_mergekit_recipe(write(tmp_path, recipe_of(half, "task_arithmetic", parameters=words)))
    assert read.parameters == {"lambda": 0.5}
    assert_same(*both(recipe_of(half, "opcm", parameters={"alpha": "4e-1"}), tmp_path))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("owner/model", "owner/model"),
        ("owner/model@main", "owner/model@main"),
        ({"model": "owner/model@main"}, "owner/model@main"),
        ({"model": {"path": "owner/model", "revision": "v1"}}, "owner/model@v1"),
        ({"model": {"path": "c++/x@1"}, "lora": None}, "c++/x@1"),
        ("base+owner/adapter@v2", "owner/adapter@v2"),
        ({"model": {"path": "base"}, "lora": {"path": "a+b"}}, "a+b"),
    ],
)
def test_how_models_are_spelled(given, read, tmp_path):
    recipe = {"merge_method": "magmax", "base_model": "base", "models": [{"model": given}]}
    assert read_mergekit_recipe(write(tmp_path, recipe)).models == (read,)
    MergeConfiguration.model_validate(recipe)


GOOD = {"merge_method": "magmax", "base_model": "base", "models": [{"model": "e1"}, {"model": "e2"}]}


def changed(**more):
    return {**GOOD, **more}


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (["a"], "is not a mergekit recipe: expected a mapping with merge_method, base_model and models"),
        (None, "is not a mergekit recipe"),
        (changed(merge_method=None), "lacks 'merge_method'. A merge needs"),
        (changed(base_model=""), "lacks 'base_model'"),
        (changed(models=[]), "lacks 'models'"),
        (changed(models={"model": "e1"}), "models must be a list; got {'model': 'e1'}"),
        (changed(models=["e1"]), "an entry of `models` must be `- model: NAME`; got 'e1'"),
        (changed(models=[{"model": "e1", "weight": 1}]), "an entry of `models` must be `- model: NAME`; got {'model'"),
        (changed(models=[{"model": "e1", "parameters": [1]}]), "an entry of `models` must be `- model: NAME`"),
        (changed(models=[{"model": "base"}]), "lists no model besides base_model"),
        (changed(models=[{"model": None}]), "a model must be `NAME`, `NAME@REVISION`, `BASE.ADAPTER`, or"),
        (changed(models=[{"model": "a+b+c"}]), r"got 'a\+b\+c'"),
        (changed(models=[{"model": "a@b@c"}]), "a model must be .*; got 'a@b@c'"),
        (changed(models=[{"model": "a@"}]), "a model must be .*; got 'a@'"),
        (changed(models=[{"model": {"path": "e1"}}]), "a model must be .*; got {'path': 'e1'}"),
        (changed(models=[{"model": {"model": {"revision": "x"}}}]), "a model must be .*; got {'revision': 'x'}"),
        (
            changed(models=[{"model": {"model": "e1", "override_architecture": "X"}}]),
            "a model must be .*; got {'model'",
        ),
        (changed(models=[{"model": "e1+a1"}]), r"e1\+a1 adds an adapter to e1, which is not base_model base\. Use one"),
        (changed(base_model="base+a1"), r"base_model base\+a1 has an adapter\. Merge it into a model first"),
        (changed(base_model={"path": "base"}), "a model must be .*; got {'path': 'base'}"),
        (
            changed(models=[{"model": ".@v1"}]),
            r"\.@v1 has revision 'v1', but \. is a local folder without revisions",
        ),
        (changed(slices=[]), "uses 'slices', supported only by mergekit. Use `mergekit-yaml .* OUT`"),
        (changed(modules={}), "uses 'modules', supported only by mergekit"),
        (changed(chat_template="auto"), "uses 'chat_template', supported only by mergekit"),
        (changed(model="e1"), "Unknown word 'model' in .*Did you mean 'models'"),
        (changed(merge_method="linear"), "Unknown rule 'linear' in .*recipe.yml"),
        (changed(parameters=[0.5]), "parameters must be a mapping; got"),
        (changed(parameters={"lamda": 1}), "Unknown parameter 'lamda' in .* for magmax. Did you mean 'lambda'"),
        (changed(parameters={"lambda": [0, 1]}), "lambda must be one value for all tensors; got .0, 1.. Use `mergekit"),
        (changed(parameters={"lambda": {"value": 1}}), "lambda must be one value for all tensors"),
        (changed(parameters={"lambda": "half"}), "recipe.yml: magmax's lambda must be a finite float; got 'half'"),
        (changed(parameters={"scale": "model"}), "Unknown parameter 'scale'"),
        (changed(parameters={"weight": 1.0}), "Unknown parameter 'weight'"),
        (changed(merge_method="opcm", parameters={"scale": "tensor"}), "scale must be `model` here; `mergekit-yaml"),
        (changed(merge_method="opcm", parameters={"variant": "blok"}), "variant must be one of 'block', 'fusionbench'"),
        (changed(merge_method="ties", parameters={"density": 0}), "ties: density must be above 0"),
        (
            changed(merge_method="ties", parameters={"weight": 0.5}),
            "weight must be 1.0 here; `mergekit-yaml .* takes 0.5",
        ),
        (changed(merge_method="ties", parameters={"normalize": False}), "normalize must be True here"),
        (changed(merge_method="task_arithmetic", parameters={"normalize": True}), "normalize must be False here"),
        (changed(merge_method="task_arithmetic", parameters={"density": 0.5}), "density must be 1.0 here"),
        (changed(dtype="int4"), "recipe.yml, dtype: Unknown dtype 'int4'. Known: bfloat16, float16, float32"),
        (changed(dtype="float64"), "dtype: Unknown dtype 'float64'"),
        (changed(out_dtype=32), "out_dtype: Unknown dtype '32'"),
        (changed(tokenizer="base"), "tokenizer must be a mapping; got 'base'"),
        (
            changed(tokenizer={"source": "union"}),
            "tokenizer setting 'union' may change the vocabulary, supported only",
        ),
        (changed(tokenizer={}), "the tokenizer setting 'union' may change the vocabulary"),
        (changed(tokenizer_source="union"), "the tokenizer setting 'union' may change the vocabulary"),
        (changed(tokenizer={"source": "base", "pad_to_multiple_of": 8}), "setting 'pad_to_multiple_of' may change"),
        (changed(tokenizer={"source": "base", "tokens": {}}), "setting 'tokens' may change"),
        (changed(tokenizer={"source": "base"}, tokenizer_source="base"), "has both tokenizer and tokenizer_source"),
        (changed(tokenizer_source="base+a1"), r"the tokenizer source base\+a1 is an adapter\. Use a model"),
    ],
)
def test_what_is_no_recipe_for_this_engine(recipe, text, tmp_path):
    with pytest.raises(RecipeError, match=text):
        read_mergekit_recipe(write(tmp_path, recipe))


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({"model": "e1", "parameters": {"lambda": 0.2}}, "magmax"),
        ({"model": "e1", "parameters": {"lambda": 1.0}}, "task_arithmetic"),
        ({"model": "e1", "parameters": {"density": 0.2}}, "ties"),
        ({"model": "e1", "parameters": {"weight": [0, 1]}}, "ties"),
    ],
)
def test_what_one_model_alone_is_given(entry, rule, tmp_path):
    recipe = {**GOOD, "merge_method": rule, "models": [entry, {"model": "e2"}]}
    if rule != "magmax":
        recipe["parameters"] = {"weight": 1.0}
    with pytest.raises(
        RecipeError, match=f"of e1 is a parameter of one model, but {rule} treats all experts equally. Remove"
    ):
        read_mergekit_recipe(write(tmp_path, recipe))


def test_files_that_are_no_yaml(tmp_path):
    for content in (b"a: [", b"\xff\xfe", b""):
        (tmp_path / "recipe.yml").write_bytes(content)
        with pytest.raises(RecipeError, match=r"recipe\.yml"):
            read_mergekit_recipe(tmp_path / "recipe.yml")
    with pytest.raises(RecipeError, match=r"Cannot read .*absent\.yml"):
        read_mergekit_recipe(tmp_path / "absent.yml")


def test_models_that_do_not_fit(half, adapted, tmp_path):
    other = toy_llama(tmp_path / "other", seed=0, layers=1)
    for models, error, text in (
        (
            [half[0], half[1], half[1].parent / "." / "e1" / "..", "x"],
            ContmergeError,
            "has no config.json|no .*safetensors",
        ),
        ([half[0], half[1], half[1].parent / "base" / ".." / "e1"], ModelError, "is listed twice"),
        ([half[0], other], ModelError, "does not fit"),
        ([half[0], tmp_path / "absent"], ModelError, "There is no model at"),
        ([half[0], adapted / "a1"], ModelError, "was trained on .*, not on"),
    ):
        with pytest.raises(error, match=text):
            by_engine(recipe_of(models, "magmax"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_recipes_that_we_publish():
    for name, rule in (("magmax", "magmax"), ("opcm", "opcm")):
        read = read_mergekit_recipe(RECIPES / f"{name}.yml")
        assert (read.rule, read.dtype, read.out_dtype) == (rule, "float32", "bfloat16")
        assert len(read.models) == 3
        assert get_rule(rule, **read.parameters) == get_rule(rule)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{"cuda": True}, {"multi_gpu": True}, {"gpu_rich": True}])
@pytest.mark.parametrize("rule", OURS)
def test_mergekit_on_cuda(half, rule, options, tmp_path):
    theirs, ours = both(recipe_of(half, rule), tmp_path, **options)
    assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
