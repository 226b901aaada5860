"""Models in memory have the values of a merge in 16 bits; what cannot be loaded is refused; adapters fold once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toys.architectures import ARCHITECTURES, build, moved
from toys.models import toy_llama, toy_mixture, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_contmerge import finetune_stage, run_recipe, score_stage
from hf_contmerge.errors import ModelError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.layout import check_loads
from hf_contmerge.models.loading import fold_adapter, load_model, load_tokenizer
from hf_contmerge.models.survival import Kept
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.scoring.files import write_choice_task

HALVES = [torch.bfloat16, torch.float16]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.view(torch.int16) for name, t in model.state_dict().items() if t.itemsize == 2}


def assert_equal(found: Any, wanted: Any) -> None:
    one, other = bits(found), bits(wanted)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def made(kind: str, folder: Path) -> list[Path]:
    """Write a base and an expert."""
    if kind == "llama":
        return [toy_llama(folder / f"m{seed}", seed=seed) for seed in (0, 1)]
    if kind == "mixtral":
        return [toy_mixture(folder / f"m{seed}", seed=seed) for seed in (0, 1)]
    base = build(next(tiny for tiny in ARCHITECTURES if tiny.name == kind))
    for number, model in enumerate((base, moved(base, 1))):
        model.save_pretrained(folder / f"m{number}")
    return [folder / "m0", folder / "m1"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "GPT2LMHeadModel", "DeepseekV3ForCausalLM", "Gemma3ForConditionalGeneration"]
)
def test_a_float32_merge_in_memory_is_the_one_written_in_16_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, expert = made(kind, tmp_path)
    state = MergeState.create(tmp_path / "state", base=base, rule="task_arithmetic", **{"lambda": 0.5}).add(expert)
    word = str(dtype).removeprefix("torch.")
    wide, half = (state.export(tmp_path / w, dtype=w) for w in ("float32", word))
    loaded = load_model(wide, base, dtype=dtype)
    assert bits(loaded)
    assert_equal(loaded, load_model(half, base, dtype=dtype))
    assert_equal(load_model(half, base, dtype=dtype), AutoModelForCausalLM.from_pretrained(half, dtype=dtype))


def trained_lora(base: Path, **more: Any) -> Any:
    """Return a peft model with an update far below the last bit of bfloat16."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}),
    )
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 2e-4 * torch.randn(weight.shape, generator=draw)
    return model


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"target_parameters": ["mlp.experts.gate_up_proj"]}])
def test_an_adapter_on_16_bits_is_folded_in_once(more: dict[str, Any], tmp_path: Path) -> None:
    base = (
        toy_mixture(tmp_path / "base", seed=0) if "target_parameters" in more else toy_llama(tmp_path / "base", seed=0)
    )
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    opened = trained_lora(base, **more)
    opened.save_pretrained(tmp_path / "adapter")
    plain, kept = fold_adapter(opened)
    assert Kept.sum(kept.values()).survival == pytest.approx(1, abs=0.1)
    assert_equal(load_model(tmp_path / "adapter", base, dtype=torch.bfloat16), plain)
    exact = load_model(tmp_path / "adapter", base, dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    dot = square = 0.0
    for name, tensor in plain.state_dict().items():
        update = (exact[name] - start[name]).double()
        dot += float((update * (tensor.double() - start[name].double())).sum())
        square += float(update.square().sum())
    assert dot / square == pytest.approx(1, abs=0.1)
    by_peft = trained_lora(base, **more).merge_and_unload().state_dict()
    lost = sum(float(((by_peft[n].double() - start[n].double()) * (exact[n] - start[n]).double()).sum()) for n in exact)
    assert lost / square < 0.8


# Tokens and classes that do not fit


def with_rows(folder: Path, rows: int, **tokens: str) -> Path:
    """Write a model whose table has some rows, with a tokenizer of 384 tokens and more."""
    toy_llama(folder, seed=0)
    tokenizer = copy.deepcopy(toy_tokenizer())
    if tokens.pop("added", ""):
        tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens(dict(tokens))
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": rows}))
    return folder


def test_tokens_beyond_the_table_are_refused(tmp_path: Path) -> None:
    """They ended in an IndexError of the embedding, or a failed CUDA kernel, after the base had been measured."""
    with pytest.raises(ModelError, match=r"the tokenizer has '.+' at 96, and the model's table has 96 rows"):
        load_tokenizer(with_rows(tmp_path / "other", 96))
    with pytest.raises(ModelError, match=r"the tokenizer has '<pad>' at 384, and the model's table has 384 rows"):
        load_tokenizer(with_rows(tmp_path / "padded", 384, pad_token="<pad>"))
    assert len(load_tokenizer(with_rows(tmp_path / "resized", 385, pad_token="<pad>"))) == 385
    assert len(load_tokenizer(with_rows(tmp_path / "rounded up", 512))) == 384


def test_added_tokens_that_nothing_uses_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(with_rows(tmp_path / "added", 384, added="yes"))
    assert "the tokenizer has '<image>' at 384, and the model's table has 384 rows. A text with one" in caplog.text


def test_models_of_other_kinds_are_merged_alone(tmp_path: Path) -> None:
    """They ended in transformers' list of all its language models."""
    tiny = next(tiny for tiny in ARCHITECTURES if tiny.name == "Qwen2VLForConditionalGeneration")
    folders = [tmp_path / name for name in ("base", "expert")]
    for seed, folder in enumerate(folders):
        build(tiny, seed).save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
    check_loads(folders[0], trusted=False, language=False)
    message = "is a Qwen2VLForConditionalGeneration, which transformers does not load as a language model"
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox"}] * 4)
    with pytest.raises(ModelError, match=message):
        finetune_stage(folders[0], data, tmp_path / "out")
    write_choice_task(tmp_path, "choice", [{"query": "the", "choices": ["fox", "dog"], "gold": 0}])
    with pytest.raises(ModelError, match=message):
        score_stage(folders[0], ["choice"], tasks_folder=tmp_path)
    recipe = {
        "name": "merged", "base_model": str(folders[0]), "stages": [{"name": "a", "expert": str(folders[1])}],
        "merge": ["average"],
    }  # fmt: skip
    run_recipe(Recipe.model_validate(recipe), tmp_path / "run")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/stages/01-a/merges/average/merged")
    assert type(merged).__name__ == tiny.name
    recipe["stages"] = [{"name": "a", "dataset": {"path": str(data), "heldout": 1}}]
    with pytest.raises(ModelError, match=message):
        run_recipe(Recipe.model_validate(recipe), tmp_path / "trained")
    assert not list((tmp_path / "trained").rglob("*.safetensors"))
