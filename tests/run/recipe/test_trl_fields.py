"""The table of TRL's fields: it has all of the installed TRL's, equals docs/recipe.md, and refuses by name."""

import dataclasses
from itertools import groupby
from typing import Any

import pytest
from toys import ROOT
from trl.experimental.sdft import SDFTConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.sft_config import SFTConfig

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.run.recipe.trl_fields import TRL_FIELDS, TrlField
from hf_contmerge.training.settings import training_checks

CONFIGS = (SFTConfig, DPOConfig, KTOConfig, GRPOConfig, SDFTConfig)
INSTALLED = [(config.__name__, field) for config in CONFIGS for field in dataclasses.fields(config)]
TOKEN = "hf_" + "abcDEF123" * 4


def recipe(stage: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return parse_recipe({
        "name": "x", "base_model": "b", "merge": ["average"], "train": train,
        "stages": [{"name": "s", "dataset": "s.jsonl", "train": stage or {}}],
    })  # fmt: skip


def refused(stage: dict[str, Any] | None = None, **train: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(stage, **train)
    return str(caught.value).removeprefix("recipe: ")


def test_every_field_of_the_installed_trl_has_a_row() -> None:
    assert {field.name for _, field in INSTALLED} == set(TRL_FIELDS)


@pytest.mark.parametrize(("config", "field"), INSTALLED, ids=[f"{name}.{field.name}" for name, field in INSTALLED])
def test_defaults_pass(config: str, field: dataclasses.Field[Any]) -> None:
    """Who writes down TRL's default asks for nothing new; only what a run sets itself may not be named at all."""
    name, row = field.name, TRL_FIELDS[field.name]
    if row.use == "elsewhere" or name == "do_train":
        return
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # pyright: ignore
    if default is None and None not in (*row.types, *row.harmless):  # only log_level-like words lack null
        return
    assert row.read(name, getattr(default, "value", default)) == default, config


def test_a_field_that_only_a_newer_trl_has_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, base_folder: Any
) -> None:
    """It passes the recipe's reader, which does not load TRL, and no further."""
    monkeypatch.delitem(TRL_FIELDS, "neftune_noise_alpha")  # pyright: ignore
    with pytest.raises(RecipeError, match=r"^train.neftune_noise_alpha is new in TRL .* Remove it, or update "):
        [check() for check in training_checks(Train(neftune_noise_alpha=5), base_folder)]  # pyright: ignore


@pytest.mark.parametrize("name", [name for name, row in TRL_FIELDS.items() if row.use != "obeyed"])
def test_what_cannot_be_obeyed_is_refused_by_name(name: str) -> None:
    for where, message in (("train", refused(**{name: "x"})), ("stages.0.train", refused({name: "x"}))):
        assert message.startswith(f"{where}: {name} is ")
        assert message.count("\n") == 0


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "wandb_api_key", "trackio_secret"])
def test_no_token_is_shown_or_kept(name: str) -> None:
    assert TOKEN not in refused(**{name: TOKEN})
    assert TOKEN not in refused({name: TOKEN})


LOADING = [
    {"weights_only": False},
    {"use_safetensors": False},
    {"trust_remote_code": True},
    {"token": TOKEN},
    {"revision": "x"},
    {"code_revision": "x"},
    {"attn_implementation": "owner/kernel"},
    {"dtype": "int8"},
    {"use_kernels": True},
]


@pytest.mark.parametrize("value", LOADING, ids=[next(iter(value)) for value in LOADING])
def test_no_other_file_and_no_code_by_model_init_kwargs(value: dict[str, Any]) -> None:
    message = refused(model_init_kwargs=value)
    assert message.startswith("train: model_init_kwargs must be a mapping with `attn_implementation`")
    assert TOKEN not in message
    assert recipe(model_init_kwargs={"attn_implementation": "sdpa", "dtype": "bfloat16"})


@pytest.mark.parametrize("name", [name for name, row in TRL_FIELDS.items() if row.whole_run])
def test_what_belongs_to_the_whole_run(name: str) -> None:
    assert refused({name: "x"}) == (f"stages.0.train: {name} applies to the whole run; set it in `train` of the recipe")


READ: list[tuple[str, Any, Any]] = [
    ("max_steps", "1e3", 1000), ("max_steps", "'1e3'", 1000), ("learning_rate", "1e-5", 1e-5),
    ("learning_rate", "'1e-5'", 1e-5), ("packing", "'false'", False), ("packing", "no", False),
    ("save_strategy", "no", "no"), ("save_steps", "1", 1), ("save_steps", "0.5", 0.5), ("max_length", "null", None),
    ("logging_steps", "10", 10), ("bf16", "'no'", False), ("pad_to_multiple_of", "auto", "auto"),
    ("loss_type", "[sigmoid, sft]", ["sigmoid", "sft"]), ("optim_target_modules", "all-linear", "all-linear"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), READ, ids=[f"{name}: {text}" for name, text, _ in READ])
def test_values_are_read_in_their_type(name: str, text: str, value: Any, tmp_path: Any) -> None:
    file = tmp_path / "r.yml"
    file.write_text(
        f"name: x\nbase_model: b\nmerge: [average]\nstages: [{{name: s, dataset: d}}]\ntrain: {{{name}: {text}}}\n"
    )
    found = load_recipe(file).train.sft_fields[name]
    assert (found, type(found)) == (value, type(value))


WRONG = [
    ("max_steps", 2.5, "a whole number from 1 on, or -1; got 2.5"),
    ("max_steps", 0, "a whole number from 1 on, or -1; got 0"),
    ("max_steps", None, "a whole number from 1 on, or -1; got None"),
    ("data_seed", -1, "a whole number from 0 to 4294967295 or null; got -1"),
    ("data_seed", 2**32, "a whole number from 0 to 4294967295 or null; got 4294967296"),
    ("learning_rate", "fast", "a number from 0 on; got 'fast'"),
    ("learning_rate", float("nan"), "a number from 0 on; got nan"),
    ("packing", "perhaps", "true or false; got 'perhaps'"),
    ("per_device_train_batch_size", True, "a whole number from 1 on; got True"),
    ("gradient_accumulation_steps", 0, "a whole number from 1 on; got 0"),
    ("warmup_steps", -1, "a number from 0 on; got -1"),
    ("num_train_epochs", 0, "a positive number; got 0"),
    ("save_strategy", "best", "no, steps or epoch; got 'best'"),
    ("train_sampling_strategy", "by_length", "random, sequential or group_by_length; got 'by_length'"),
    ("ld_alpha", 3, "a number from 0 to 1 or null; got 3"),
    ("lr_scheduler_kwargs", "x", "a mapping or null; got 'x'"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG, ids=[f"{name}={value}" for name, value, _ in WRONG])
def test_values_of_another_type_are_refused_in_one_sentence(name: str, value: Any, words: str) -> None:
    assert refused(**{name: value}) == f"train: {name} must be {words}"


# The page


def page_rows() -> list[str]:
    """Return the page's table, made from ours."""

    def key(item: tuple[str, TrlField]) -> tuple[str, str]:
        row = item[1]
        return ("obeyed; whole run only" if row.whole_run else row.use, row.reason)

    lines = []
    for (use, reason), rows in groupby(sorted(sorted(TRL_FIELDS.items()), key=key), key=key):
        names = ", ".join(f"`{name}`" for name, _ in rows)
        lines.append(
            f"| {use} | {names} | {f'Set by {reason}.' if use == 'elsewhere' else reason[:1].upper() + reason[1:]} |"
        )
    return lines


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith(("| obeyed", "| elsewhere", "| refused"))]
    assert shown == page_rows()
