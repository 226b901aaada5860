"""Combinations of settings that TRL refuses are found by a step on a tiny model, before any work; others pass."""

import copy
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.models import write_jsonl

from hf_contmerge import finetune_stage
from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.models.architecture import find_architecture
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies import Combined, get_strategy
from hf_contmerge.training.data import StageData, load_stage_data

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"the quick brown fox {i}"} for i in range(8)],
    "talk": [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(8)
    ],
    "pairs": [{"prompt": f"say {i}", "chosen": " yes", "rejected": " no"} for i in range(8)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageData]:
    home = tmp_path_factory.mktemp("rehearsed")
    files = {name: write_jsonl(home / f"{name}_rehearsed.jsonl", rows) for name, rows in ROWS.items()}
    return {name: load_stage_data(Dataset(path=str(file), heldout=2), seed=0) for name, file in files.items()}


FOLLOWED: list[tuple[str, dict[str, Any]]] = [
    ("text", {}), ("talk", {}), ("pairs", {}), ("pairs", {"strategy": "lora"}), ("text", {"max_length": None}),
    ("talk", {"max_length": 2}), ("talk", {"packing": True, "per_device_train_batch_size": 64}),
    ("text", {"neftune_noise_alpha": 5, "optim": "adafactor", "lr_scheduler_type": "cosine"}),
    ("talk", {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields"), FOLLOWED, ids=[f"{form} {fields}" for form, fields in FOLLOWED])
def test_settings_that_can_be_followed(
    form: str, fields: dict[str, Any], data: dict[str, StageData], base_folder: Path
) -> None:
    """Random states stay as they were."""
    before, plain = torch.get_rng_state(), random.getstate()
    rehearse(Train(**fields), data[form], base_folder, "train")
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == plain


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("talk", {"packing": True, "max_length": None}, "When packing is enabled, `max_length` can't be `None`."),
    ("talk", {"padding_free": True}, "When `padding_free=True` without packing, `max_length` is not enforced."),
    ("text", {"assistant_only_loss": True}, "You set `assistant_only_loss=True`, but the dataset is not"),
    ("text", {"loss_type": "sigmoid"}, "Invalid `loss_type` sigmoid passed."),
    ("pairs", {"loss_type": "exo_pair"}, "Label smoothing must be greater than 0.0 when using 'exo_pair' loss."),
    ("pairs", {"train_sampling_strategy": "group_by_length"}, "Can only automatically infer lengths for datasets"),
    ("text", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycle": 1}}, "get_cosine_schedule_with_warmup()"),
    ("text", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type reduce_lr_on_plateau requires an eval"),
    ("text", {"gradient_checkpointing_kwargs": {"x": 1}}, "Unexpected keyword arguments: x."),
    ("text", {"adam_beta1": 2}, "Invalid beta parameter at index 0: 2."),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields", "words"), REFUSED, ids=[f"{form} {fields}" for form, fields, _ in REFUSED])
def test_settings_that_trl_refuses(
    form: str, fields: dict[str, Any], words: str, data: dict[str, StageData], base_folder: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        rehearse(Train(**fields), data[form], base_folder, "train of stage x")
    assert str(caught.value).startswith(f"train of stage x cannot be followed: {words}")


def test_what_other_libraries_refuse(data: dict[str, StageData], base_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^train: torch.compile refuses nope: Invalid backend"):
        rehearse(Train(torch_compile_backend="nope"), data["text"], base_folder, "train")  # pyright: ignore
    with pytest.raises(RecipeError, match=r"^train.router_aux_loss_coef is for mixtures of experts"):
        rehearse(Train(router_aux_loss_coef=0.1), data["text"], base_folder, "train")  # pyright: ignore


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_optimizers_without_the_moments_that_are_asked_for(
    optim: str, data: dict[str, StageData], base_folder: Path
) -> None:
    """They were missed after the training, whose expert was lost."""
    fields: dict[str, Any] = {"statistics": {"kinds": ["adam"]}}
    with pytest.raises(RecipeError, match=f"^train.statistics: the optimizer {optim} has no second moments"):
        rehearse(Train(optim=optim, **fields), data["text"], base_folder, "train")
    rehearse(Train(optim="adamw_torch", **fields), data["text"], base_folder, "train")
    rehearse(Train(optim=optim, statistics={"kinds": ["fisher"]}), data["text"], base_folder, "train")  # pyright: ignore


NOT_OF_THIS_MODEL: list[tuple[list[str], dict[str, Any], str]] = [
    (["lora"], {"lora": {"target_modules": ["nothing"]}}, "Target modules {'nothing'} not found in the base model."),
    (["lora"], {"lora": {"bias": "some"}}, "Requested bias: some, is not implemented."),
    (["olora", "migu"], {"olora": {"target_modules": ["nothing"]}}, "Target modules {'nothing'} not found"),
    (["full", "anchor"], {"anchor": {"modules": ["nothing"]}}, "anchor's modules ['nothing'] is in no weight's name"),
    (["full", "rates"], {"rates": {"factors": {"nothing": 0.1}}}, "rates' pattern 'nothing' is in no trained weight"),
    (["lora", "rates"], {"rates": {"factors": {"mlp.*base": 0.1}}}, "rates' pattern 'mlp.*base' is in no trained"),
    (["full", "rates"], {"rates": {"slow": 0.1}}, "rates' `slow` trains the head at the full rate and all else slowly"),
    (["full", "rates"], {"rates": {"factors": {".": 0}}}, "rates gives every weight the rate 0"),
    (["osf"], {"osf": {"target_modules": ["nothing"]}}, "Target modules ['nothing'] not found"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "parameters", "words"), NOT_OF_THIS_MODEL)
def test_strategies_that_do_not_fit_the_model(
    strategy: list[str], parameters: dict[str, Any], words: str, data: dict[str, StageData], base_folder: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        rehearse(Train(strategy=strategy, parameters=parameters), data["text"], base_folder, "train of stage x")
    assert str(caught.value).startswith(f"train.parameters: {words}")


def test_qlora_is_opened_without_quantising(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        there.setattr(importlib.util, "find_spec", lambda _: True)
        good, bad = get_strategy("qlora"), get_strategy("qlora", target_modules=["nothing"])
    architecture = find_architecture(base_folder)
    assert architecture
    Combined({"qlora": good}).try_open(copy.deepcopy(architecture.model))
    with pytest.raises(ValueError, match=r"Target modules {'nothing'} not found"):
        Combined({"qlora": bad}).try_open(copy.deepcopy(architecture.model))


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "eva", "lora_ga"])
def test_adapters_that_start_from_values_are_opened(how: Any, data: dict[str, StageData], base_folder: Path) -> None:
    """On the meta device there are none to decompose."""
    rehearse(Train(strategy="lora", parameters={"init_lora_weights": how}), data["text"], base_folder, "train")


def test_functions_refuse_before_training(base_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "functions_rehearsed.jsonl", ROWS["text"])
    with pytest.raises(RecipeError, match=r"^finetune_stage cannot be followed: You set `assistant_only_loss=True`"):
        finetune_stage(base_folder, file, tmp_path / "expert", assistant_only_loss=True)
    with pytest.raises(RecipeError, match=r"^finetune_stage.report_to: a function has no tracker run"):
        finetune_stage(base_folder, file, tmp_path / "expert", report_to="tensorboard")
    assert not (tmp_path / "expert").exists()
