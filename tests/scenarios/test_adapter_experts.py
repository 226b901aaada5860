"""Adapters as experts of a run: LoRAs that are kept as such, adapters that are given, and what is refused."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.loras import loaded, lora
from toys.models import toy_llama, toy_mixture, write_jsonl
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, ResourceError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.loading import load_model
from hf_contmerge.report._public import public_mergekit_recipe
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.score import score_model
from hf_contmerge.training.settings import training_checks

Data = dict[str, Any]
WORDS = "the quick brown fox jumps over lazy dog while red blue green birds sing songs about law medicine and code"
TRAIN = {
    "strategy": "lora", "parameters": {"keep": True, "r": 4}, "max_steps": 3, "per_device_train_batch_size": 2,
    "max_length": 32, "learning_rate": 1.0e-2, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a full expert, an adapter of the base and one of another base, three texts."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    for seed, name in enumerate(("base", "expert", "other")):
        toy_llama(home / name, seed=seed)
    lora(home / "base", home / "adapter", seed=1)
    lora(home / "other", home / "foreign", seed=1)
    for i, name in enumerate("abc"):
        words = WORDS.split()[6 * i : 6 * i + 8]
        write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(words, k=30))} for _ in range(12)])
    return home


def recipe(home: Path, names: str = "ab", *, given: Data | None = None, **changes: Any) -> Data:
    """Return the recipe lora-stream in miniature; `given`: a stage before those that train."""
    stages: list[Data] = [{"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 2}} for n in names]
    return {
        "name": "stream", "base_model": str(home / "base"), "stages": [*([given] if given else []), *stages],
        "train": TRAIN, "merge": ["opcm", "average", {"rule": "magmax"}], **changes,
    }  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A given adapter, then two stages that train, with all rules."""
    given = {"name": "given", "expert": str(home / "adapter")}
    return run_recipe(parse_recipe(recipe(home, given=given)), tmp_path_factory.mktemp("run") / "run", until="merge")


def test_experts_are_adapters_of_the_base(run: Run, home: Path) -> None:
    for t, kind in ((2, "base"), (3, "base"), (2, "previous"), (3, "previous")):
        folder = run.expert(t, kind).model
        assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(home / "base")
        assert settings["r"] == (4 if kind == "base" else 2)  # `previous` goes on with the given adapter


def test_next_stage_goes_on_with_the_same_adapter(run: Run) -> None:
    """Each `previous` starts at the one before: by far nearer to it than two adapters that were begun anew."""
    given, second, third = (load_file(run.expert(t, "previous").model / "adapter_model.safetensors") for t in (1, 2, 3))
    assert given.keys() == second.keys() == third.keys()
    for before, after in ((given, second), (second, third)):
        moved = torch.stack([(after[n] - before[n]).norm() for n in after]).norm()
        assert 0 < moved < 0.5 * torch.stack([t.norm() for t in before.values()]).norm()


def test_scores_are_those_of_base_and_adapter(home: Path, tmp_path: Path) -> None:
    """Of peft's own merged model, saved and scored as a model."""
    run = run_recipe(parse_recipe(recipe(home, "a", merge=["average"])), tmp_path / "run")
    assert run.is_complete()
    place = run.expert(1, "base")
    base = run.base_model.resolve()
    merged = loaded(base, place.model, torch.float32).merge_and_unload()
    shutil.copytree(base, tmp_path / "whole")
    merged.save_pretrained(tmp_path / "whole")
    tasks = [Task(name="a_heldout")]
    _, scores = score_model(tmp_path / "whole", tasks, task_folder=run.tasks, evaluate=Evaluate(), ranks=OneRank())
    assert load_scores(place)["a_heldout"].value == scores["a_heldout"].value


def test_merges_are_those_of_the_folded_adapters(run: Run) -> None:
    """average: base + the mean of the three differences."""
    base = weights(run.base_model.resolve())
    place = run.merged(3, run.recipe.merge[1])
    folders = [run.expert(t, place.record("merge")["start_from"]).model for t in (1, 2, 3)]
    experts = [loaded(run.base_model.resolve(), folder).merge_and_unload() for folder in folders]
    merged = weights(place.model)
    for name, start in base.items():
        mean = sum(e.state_dict()[name].double() - start.double() for e in experts) / 3
        torch.testing.assert_close(merged[name], (start + mean).float(), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_merge_yml_is_for_mergekit(number: int, run: Run, tmp_path: Path) -> None:
    place = run.merged(3, run.recipe.merge[number])
    command = [
        Path(sys.executable).with_name("mergekit-yaml"), place.mergekit_recipe, tmp_path / "out",
        "--lora-merge-cache", tmp_path / "cache", "--no-copy-tokenizer",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(place.model), weights(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_public_recipe_names_no_folder_of_this_machine(run: Run, home: Path) -> None:
    text = public_mergekit_recipe(run, run.recipe.merge[2], 3)
    assert text
    assert str(home) not in text
    assert "base+stages/02-a/experts/previous/expert" in text


def test_full_training_goes_on_from_a_given_adapter(home: Path, tmp_path: Path) -> None:
    """The adapter is merged in, in memory, and what is trained is a whole model."""
    given = {"name": "given", "expert": str(home / "adapter")}
    train = {**TRAIN, "strategy": "full", "parameters": {}, "learning_rate": 0.0}
    changed = recipe(home, "a", given=given, train=train, merge=["magmax"])
    run = run_recipe(parse_recipe(changed), tmp_path / "run", until="train")
    trained = weights(run.expert(2, "previous").model)
    wanted = loaded(home / "base", home / "adapter", torch.float32).merge_and_unload().state_dict()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-7)
    changed = recipe(home, "a", given=given, train={**train, "learning_rate": 1e-2}, merge=["magmax"])
    moved = weights(run_recipe(parse_recipe(changed), tmp_path / "moved", until="train").expert(2, "previous").model)
    assert [name for name, tensor in moved.items() if torch.equal(tensor, wanted[name])] == []


def test_without_keep_the_expert_is_a_model(home: Path, tmp_path: Path) -> None:
    train = {**TRAIN, "parameters": {"r": 4}}
    once = run_recipe(parse_recipe(recipe(home, "a", train=train)), tmp_path / "folded", until="train")
    kept = run_recipe(parse_recipe(recipe(home, "a")), tmp_path / "kept", until="train")
    folded, adapter = once.expert(1, "base").model, kept.expert(1, "base").model
    assert not is_adapter(folded)
    merged = load_model(adapter, home / "base", dtype=torch.float32).state_dict()
    for name, tensor in weights(folded).items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


def test_loaded_model(home: Path) -> None:
    whole = load_model(home / "expert", home / "base", dtype=torch.float32)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in weights(home / "expert").items())
    base = AutoModelForCausalLM.from_pretrained(home / "base").state_dict()
    merged = load_model(home / "adapter", home / "base", dtype=torch.float32)
    assert merged.state_dict().keys() == base.keys()
    going_on = load_model(home / "adapter", home / "base", as_adapter=True, dtype=torch.float32)
    assert {n.split(".")[-3] for n, p in going_on.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_kept_adapters_of_a_mixture_are_merged(home: Path, tmp_path: Path) -> None:
    """all-linear trains stacks in memory; the base's files hold their experts one by one."""
    base = toy_mixture(tmp_path / "mixture", seed=0)
    data = recipe(home, "ab", merge=["average", {"rule": "magmax"}], base_model=str(base))
    run = run_recipe(parse_recipe(data), tmp_path / "run", until="merge")
    assert is_adapter(run.expert(2, "previous").model)
    adapter = run.expert(1, "base").model
    trained = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
    assert {"gate_up_proj", "down_proj"} <= set(trained)
    loaded(base, adapter, torch.float32).merge_and_unload().save_pretrained(tmp_path / "right")
    merged, right, before = (
        weights(run.merged(1, run.recipe.merge[0]).model),
        weights(tmp_path / "right"),
        weights(base),
    )
    assert merged.keys() == right.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], right[name], atol=1e-6, rtol=0)
    assert any(".experts.3.w1." in name and not merged[name].equal(before[name]) for name in merged)


# What is refused


def refused(kind: type[ContmergeError], run: Path, data: Data) -> str:
    with pytest.raises(ContmergeError) as caught:
        run_recipe(parse_recipe(data), run)
    assert type(caught.value) is kind
    assert not list(run.glob("stages/*/experts"))
    return str(caught.value)


def test_adapter_of_another_base(home: Path, tmp_path: Path) -> None:
    given = {"name": "given", "expert": str(home / "foreign")}
    message = refused(ModelError, tmp_path / "run", recipe(home, given=given))
    assert message.startswith(f"{home}/foreign was trained on {home}/other, not on {home}/base: it does not match ")
    assert "write the recipe's name into base_model_name_or_path" in message


@pytest.mark.parametrize(("expert", "minus"), [("adapter", "base"), ("expert", "adapter")])
def test_difference_with_an_adapter(expert: str, minus: str, home: Path, tmp_path: Path) -> None:
    given = {"name": "given", "expert": str(home / expert), "minus": str(home / minus)}
    assert refused(RecipeError, tmp_path / "run", recipe(home, given=given)) == (
        f"Stage given takes the difference of two models, but {home}/adapter is an adapter, already a "
        "difference. Set it as `expert` without `minus`, or merge it into its base first."
    )


def test_damaged_adapter(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    message = refused(
        ModelError, tmp_path / "run", recipe(home, given={"name": "g", "expert": str(tmp_path / "adapter")})
    )
    assert "adapter_model.safetensors is truncated or not a safetensors file" in message


def test_kept_adapter_that_would_start_from_the_merged_model(home: Path, tmp_path: Path) -> None:
    message = refused(RecipeError, tmp_path / "run", recipe(home, merge=["ema"]))
    assert message.startswith(
        "train.parameters.keep: for merge entry ema, stage b starts from the merged model, and its adapter would not "
        "be one of the base."
    )


def test_kept_adapter_that_would_start_from_a_given_model(home: Path, tmp_path: Path) -> None:
    given = {"name": "given", "expert": str(home / "expert")}
    message = refused(RecipeError, tmp_path / "run", recipe(home, given=given, merge=["magmax"]))
    assert message.startswith(
        "train.parameters.keep: for merge entry magmax, stage a starts from the full model of stage given, and"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here, so that qlora may work")
def test_qlora_without_cuda(home: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        [check() for check in training_checks(Train(strategy=("qlora",)), home / "base")]
    assert str(caught.value).startswith("train.strategy: qlora needs CUDA")
    assert "Use `strategy: lora`" in str(caught.value)
