"""What a stage can be beside texts to train on: preference pairs, settings of its own, a vector with its guards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.models import perturbed, toy_llama, write_jsonl
from toys.recipes import toy_recipe
from transformers import AutoTokenizer

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, RunError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.merging.vectors import check_origin, check_vector, compare_vectors, sampled_cosine, special_rows
from hf_contmerge.models.weights import Weights
from hf_contmerge.report.write import write_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.training.data import StageData, documents, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.settings import data_checks

Data = dict[str, Any]
LIGHT = {
    "max_steps": 6, "per_device_train_batch_size": 2, "max_length": 64, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no",
}  # fmt: skip
LN2 = 0.6931
TALK = [{"role": "user", "content": "what lays eggs"}]


def pairs(path: Path, *, count: int = 20) -> Path:
    asked = (f"Question {i}: what lays eggs? Answer:" for i in range(count))
    return write_jsonl(
        path, [{"prompt": p, "chosen": f" the hen {i}", "rejected": f" the fox {i}"} for i, p in enumerate(asked)]
    )


def texts(path: Path) -> Path:
    return write_jsonl(path, [{"text": f"the quick brown fox number {i} jumps over a lazy dog"} for i in range(20)])


def load(path: Path, **fields: Any) -> StageData:
    return load_stage_data(Dataset(path=str(path), **{"heldout": 3, **fields}), seed=0)


def refused(kind: type[ContmergeError], ask: Callable[[], Any], folder: Path) -> str:
    with pytest.raises(ContmergeError) as caught:
        ask()
    assert type(caught.value) is kind
    return str(caught.value).replace(str(folder), "FOLDER")


# Preference pairs


@pytest.fixture
def train(base_folder: Path, tmp_path: Path) -> Callable[..., Data]:
    """Return a function that trains on pairs, from `start`, and returns the record."""

    def train(name: str, *, start: Path = base_folder, **fields: Any) -> Data:
        (tmp_path / name).mkdir()
        return train_expert(
            TrainJob(
                start=start,
                base=base_folder,
                data=load(pairs(tmp_path / "pairs.jsonl")),
                seed=0,
                train=Train(**{**LIGHT, **fields}),
            ),
            tmp_path / name,
            checkpoints=tmp_path / f"{name}_checkpoints",
        )

    return train


def losses(record: Data) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


LORA = {"strategy": "lora", "parameters": {"r": 4}}
KEPT = {"strategy": "lora", "parameters": {"r": 4, "keep": True}}


@pytest.mark.parametrize(
    "strategy",
    [{}, LORA, {"strategy": "osf"}, {"strategy": ["full", "anchor"]}],
    ids=["full", "lora", "osf", "anchor"],
)
def test_pairs_are_learnt_against_the_stages_start(
    strategy: Data, train: Callable[..., Data], base_folder: Path, tmp_path: Path
) -> None:
    """Before the first step model and reference agree, also where the stage does not start from the base: ln 2."""
    start = perturbed(base_folder, tmp_path / "start", seed=5, size=0.02)
    found = losses(train("expert", start=start, **strategy))
    assert found[0] == pytest.approx(LN2, abs=1e-3)
    assert found[-1] < 0.62
    before, after = (load_file(f / "model.safetensors") for f in (base_folder, tmp_path / "expert"))
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}


def test_kept_adapter_is_the_trained_one_alone(train: Callable[..., Data], tmp_path: Path) -> None:
    train("one", **KEPT)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = losses(train("two", start=tmp_path / "one", **KEPT))
    assert again[0] == pytest.approx(LN2, abs=1e-3)  # the reference is the adapter that the stage starts from


@pytest.mark.parametrize("strategy", [{}, LORA], ids=["full", "lora"])
def test_training_on_pairs_goes_on(strategy: Data, train: Callable[..., Data], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5, **strategy}
    whole = train("whole", **saving)
    shutil.copytree(tmp_path / "whole_checkpoints", tmp_path / "again_checkpoints")
    shutil.rmtree(tmp_path / "again_checkpoints" / "checkpoint-6")
    assert losses(train("again", **saving)) == losses(whole)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_chosen_answer_is_measured(tmp_path: Path) -> None:
    data = load(pairs(tmp_path / "x.jsonl"))
    assert data.form == "preference"
    assert data.train.column_names == ["prompt", "chosen", "rejected"]
    rows = data.heldout.to_list()
    found = documents(data.heldout, data.form, chars=100, render=lambda turns: f"{len(turns)} turns")
    assert found == [row["prompt"] + row["chosen"] for row in rows]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "what lays eggs"}], ids=["no prompt", "prompt in words"])
def test_prompt_inside_of_the_answers(prompt: Data, tmp_path: Path) -> None:
    def answer(text: str) -> list[Data]:
        return [*TALK, {"role": "assistant", "content": text}]

    rows = [{**prompt, "chosen": answer(f"the hen {i}"), "rejected": answer(f"the fox {i}")} for i in range(6)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows))
    first: Data = data.train[0]
    assert first["prompt"] == TALK
    assert [len(first[c]) for c in ("chosen", "rejected")] == [1, 1]
    assert documents(data.heldout, data.form, chars=100, render=lambda turns: f"{len(turns)} turns") == ["2 turns"] * 3


def test_a_held_out_answer_is_not_trained_on_with_another_rival(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 6}?", "chosen": " yes", "rejected": f" no {i}"} for i in range(12)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows))
    assert len(data.train) > 0
    assert not {r["prompt"] for r in data.train.to_list()} & {r["prompt"] for r in data.heldout.to_list()}


# Settings of a stage


def recipe(base: Path, folder: Path, **changes: Any) -> Data:
    """Return a recipe of two stages, texts and pairs."""
    return {
        "name": "two", "base_model": str(base), "train": LIGHT, "merge": ["magmax"],
        "stages": [
            {"name": "texts", "dataset": {"path": str(texts(folder / "texts.jsonl")), "heldout": 3}},
            {"name": "pairs", "dataset": {"path": str(pairs(folder / "pairs.jsonl")), "heldout": 3},
             "train": {"learning_rate": 2e-3, "beta": 0.3}},
        ], **changes,
    }  # fmt: skip


def test_stages_with_settings_of_their_own(base_folder: Path, tmp_path: Path) -> None:
    """They are trained with them, recorded, and a change of one names its stage.

    What a run says of texts alone, packing and a loss of theirs, does not reach its pairs.
    """
    asked = recipe(base_folder, tmp_path, train={**LIGHT, "packing": True, "loss_type": "dft"})
    run = run_recipe(parse_recipe(asked), tmp_path / "run", until="train")
    first, second = run.expert(1, "previous").record("train"), run.expert(2, "previous").record("train")
    assert (first["settings"]["learning_rate"], second["settings"]["learning_rate"]) == (1e-2, 2e-3)
    assert second["settings"]["beta"] == 0.3
    assert second["log"][0]["loss"] == pytest.approx(LN2, abs=1e-3)
    assert len((run.tasks / "pairs_heldout.jsonl").read_text().splitlines()) == 3
    asked["stages"][1]["train"] = {"learning_rate": 1e-3, "beta": 0.3}
    message = refused(RunError, lambda: Run.open(parse_recipe(asked), tmp_path / "run"), tmp_path)
    assert "stages.2.train.learning_rate: 0.002 -> 0.001   used by train of 02-pairs/experts/previous" in message
    assert message.count("used by") == 1


WRONG: dict[str, tuple[Data, Data, str]] = {
    # name: train of the first stage (texts), train of the recipe, what the message says
    "beta for texts": ({"beta": 0.1}, {}, "train of stage texts sets beta. It is for preference pairs"),
    "misspelt": ({"learning_rat": 0.1}, {}, "in train of stage texts. Did you mean 'learning_rate'?"),
    "a word": ({"learning_rate": "high"}, {}, "stages.0.train: learning_rate must be a number from 0 on; got 'high'"),
    "ours": ({"seed": 3}, {}, "stages.0.train: seed is set by `seed` of the recipe; remove it from `train`"),
    "no such value": ({"optim": "now"}, {}, "train of stage texts: now is not a valid OptimizerNames"),
    "loss of pairs": ({}, {"strategy": ["full", "distill"]}, "distill needs the tokens of texts, and a stage has pref"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be(name: str, tmp_path: Path) -> None:
    own, whole, message = WRONG[name]
    asked = recipe(Path("base"), tmp_path, train={**LIGHT, **whole})
    asked["stages"][0]["train"] = own

    def check() -> None:
        parsed = parse_recipe(asked)
        data = {s.name: load(Path(s.dataset.path)) for s in parsed.stages if s.dataset}
        for check in data_checks(parsed, data):
            check()

    assert message in refused(RecipeError, check, tmp_path)


def test_a_loss_of_texts_for_pairs(tmp_path: Path) -> None:
    asked = recipe(Path("base"), tmp_path)
    asked["stages"][1]["train"] = {"loss_type": "dft"}
    parsed = parse_recipe(asked)
    data = {s.name: load(Path(s.dataset.path)) for s in parsed.stages if s.dataset}
    said = refused(RecipeError, lambda: [check() for check in data_checks(parsed, data)], tmp_path)
    assert "train of stage pairs: loss_type dft is for texts, not preference pairs." in said


def test_setting_that_no_stage_uses(tmp_path: Path) -> None:
    asked = recipe(Path("base"), tmp_path, train={**LIGHT, "beta": 0.1})
    parsed = parse_recipe({**asked, "stages": asked["stages"][:1]})
    data = {"texts": load(tmp_path / "texts.jsonl")}
    said = refused(RecipeError, lambda: [check() for check in data_checks(parsed, data)], tmp_path)
    assert said.startswith("train sets beta. It is for preference pairs")
    assert said.endswith("and no stage here has them. Remove it.")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"expert": "a/b", "train": {"max_steps": 1}}, "`train` needs `dataset`: a given expert is not trained"),
        ({"dataset": "x", "train": {"strategy": "lora"}}, "train.strategy applies to the whole run"),
        ({"dataset": {"path": "x", "streaming": True}}, "`streaming` needs `max_examples`: where to stop"),
        (
            {"dataset": {"path": "x", "streaming": True, "max_examples": 3, "split": "train[:9]"}},
            "a stream has no slices such as train[:9]",
        ),
        ({"dataset": {"path": "x", "text": "a", "messages": "b"}}, "`text` and `messages` name two forms"),
        ({"dataset": {"path": "x", "min_chars": 9, "max_chars": 8}}, "at least 9 and at most 8 characters"),
    ],
)
def test_stages_that_contradict_themselves(stage: Data, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        parse_recipe({"name": "x", "base_model": "b", "stages": [{"name": "s", **stage}], "merge": ["magmax"]})


# A vector between two models


@pytest.fixture(scope="module")
def family(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; instruct, made from it, with words of its own at the end of a turn; a stranger; a domain's texts."""
    home = tmp_path_factory.mktemp("family")
    shutil.copytree(base_folder, home / "base")
    perturbed(home / "base", home / "instruct", seed=1, size=0.003)
    change(home / "instruct" / "config.json", eos_token_id=4)
    change(home / "instruct" / "generation_config.json", eos_token_id=[4, 2], temperature=0.6, do_sample=True)
    template = (home / "instruct" / "chat_template.jinja").read_text()
    (home / "instruct" / "chat_template.jinja").write_text("{# the instruct model's #}" + template)
    toy_llama(home / "stranger", seed=9)
    return home


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def finance(home: Path, *overrides: str) -> Recipe:
    """Return recipes/finance.yml with toys; of its two merges one keeps the base's tokenizer."""
    return toy_recipe("finance", home, "merge.1.tokenizer_from=base", *overrides)


@pytest.fixture(scope="module")
def run(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(finance(family), tmp_path_factory.mktemp("run") / "finance")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_instruction_vector_is_put_back(run: Run, family: Path) -> None:
    """merged = domain + (instruct - base), the published sum."""
    sum_, _ = run.recipe.merge
    kind = run.merged(2, sum_).record("merge")["start_from"]
    base, domain, instruct = map(tensors, (family / "base", run.expert(1, kind).model, family / "instruct"))
    merged = tensors(run.merged(2, sum_).model)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, domain[name] + (instruct[name] - base[name]), rtol=0, atol=1e-6)


def test_companions_are_the_instruct_models(run: Run, family: Path) -> None:
    """Of the merge that holds the vector, unless the recipe says otherwise; the one before has the base's."""
    sum_, other = run.recipe.merge
    kind = run.merged(2, sum_).record("merge")["start_from"]
    new, old, early = run.merged(2, sum_).model, run.merged(2, other).model, run.merged(1, sum_).model
    for folder, source in (
        (new, "instruct"), (run.expert(2, kind).model, "instruct"), (old, "base"), (early, "base"),
    ):  # fmt: skip
        for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (family / source / name).read_bytes()
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == (4 if source == "instruct" else 2)
    assert AutoTokenizer.from_pretrained(new).apply_chat_template(TALK, tokenize=False)


def test_how_the_vectors_lie_to_each_other(run: Run, family: Path) -> None:
    kind = run.merged(2, run.recipe.merge[0]).record("merge")["start_from"]
    record = run.expert(2, kind).record("train")["vector"]
    assert list(record["layers"]) == ["embed_tokens", "layer 0", "layer 1", "norm", "all"]
    base, domain, instruct = map(tensors, (family / "base", run.expert(1, kind).model, family / "instruct"))
    learnt, vector = ({n: (m[n] - base[n]).double() for n in base} for m in (domain, instruct))
    for layer, names in {
        "all": list(base), "layer 1": [n for n in base if ".1." in n], "norm": ["model.norm.weight"],
    }.items():  # fmt: skip
        a, b = (torch.cat([m[n].reshape(-1) for n in names]) for m in (vector, learnt))
        assert record["layers"][layer]["cosine"] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-6)
        assert record["layers"][layer]["norm_ratio"] == pytest.approx((a.norm() / b.norm()).item(), rel=1e-6)
    table, rows = base["model.embed_tokens.weight"], vector["model.embed_tokens.weight"]
    assert record["special_tokens"]["<|im_end|>"] == pytest.approx((rows[4].norm() / table[4].norm()).item(), rel=1e-6)


def test_the_report_shows_them(run: Run) -> None:
    folder = write_report(run).parent
    for name in ("report.md", "index.html"):
        text = (folder / name).read_text()
        for words in ("Vector chat", "cosine with finance", "Special tokens of chat"):
            assert words in text
    assert "| layer 1 |" in (folder / "report.md").read_text()


def test_a_changed_word_for_the_tokenizer_is_one_of_merging(run: Run, family: Path) -> None:
    asked = finance(family, "merge.1.tokenizer_from=chat")
    message = refused(RunError, lambda: Run.open(asked, run.folder), family)
    assert "merge.softer.tokenizer_from: 'base' -> 'chat'   used by merge of" in message


def test_tokenizer_from_nowhere(family: Path) -> None:
    with pytest.raises(RecipeError, match=r"must be `base` or a stage with `expert` \(chat\); got finance"):
        finance(family, "merge.1.tokenizer_from=finance")


def test_guards_pass_what_belongs_together(family: Path) -> None:
    base, instruct = family / "base", family / "instruct"
    assert check_vector(base, instruct, base) == [
        f"{instruct} has eos_token_id 4, {base} has 2; a merged model that holds the vector gets 4."
    ]
    assert check_origin(base, instruct, base) == []


def test_another_architecture_is_refused(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "instruct", tmp_path / "other")
    change(tmp_path / "other" / "config.json", num_attention_heads=8, head_dim=4)
    message = refused(ModelError, lambda: check_vector(family / "base", tmp_path / "other", family / "base"), family)
    assert "has head_dim 4 in config.json, FOLDER/base has 8 (also num_attention_heads)" in message
    shutil.copyfile(family / "instruct" / "config.json", tmp_path / "other" / "config.json")
    change(tmp_path / "other" / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert "has rope_parameters.rope_theta 500000.0" in refused(
        ModelError, lambda: check_vector(family / "base", tmp_path / "other", family / "base"), family
    )


def test_rope_however_it_is_spelled(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "instruct", tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    (tmp_path / "old" / "config.json").write_text(json.dumps({**values, "rope_theta": theta, "rope_scaling": None}))
    check_vector(family / "base", tmp_path / "old", family / "base")


@pytest.mark.parametrize("kind", ["moved", "renamed"])
def test_another_tokenizer_is_refused(kind: str, family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "instruct", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    last, before = sorted(vocabulary, key=lambda token: -vocabulary[token])[:2]
    if kind == "moved":
        vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    else:
        vocabulary["<new>"] = vocabulary.pop(last)
    path.write_text(json.dumps(values))
    message = refused(ModelError, lambda: check_vector(family / "base", tmp_path / "other", family / "base"), tmp_path)
    assert message.startswith(f"The tokenizers of FOLDER/other and {family / 'base'} differ: ")
    assert message.endswith("The embedding rows do not correspond. Use models with one tokenizer.")


@pytest.mark.parametrize("field", ["expert", "minus"])
def test_a_stranger_is_refused_before_training(field: str, family: Path, tmp_path: Path) -> None:
    values = finance(family).model_dump()
    values["stages"][1][field] = str(family / "stranger")
    message = refused(ModelError, lambda: run_recipe(parse_recipe(values), tmp_path / "run"), family)
    assert message.startswith("`expert` was not trained from `minus`: the weights of FOLDER/")
    assert not list((tmp_path / "run").rglob("train.json"))


def test_a_base_of_another_origin_is_refused(family: Path) -> None:
    message = refused(
        ModelError, lambda: check_origin(family / "stranger", family / "instruct", family / "base"), family
    )
    assert message.startswith("`minus` and `base_model` are of different origin: the weights of FOLDER/base")


def test_a_far_relative_is_told(family: Path, tmp_path: Path) -> None:
    far = perturbed(family / "base", tmp_path / "far", seed=3, size=0.016)
    [told] = check_origin(family / "base", far, family / "base")
    cosine = sampled_cosine(Weights(far), Weights(family / "base"))
    assert 0.5 < cosine < 0.9
    assert f"have a cosine of {cosine:.3f}, below the usual value" in told


def test_vectors_that_are_nothing(family: Path, tmp_path: Path) -> None:
    """A layer that did not move has no direction: cosine and ratio are 0 and no division fails."""
    from hf_contmerge.models.experts import open_expert

    base = Weights(family / "base")
    same = compare_vectors(base, open_expert(family / "base", base), base, base)
    assert all(x == {"cosine": 0.0, "norm_ratio": 0.0} for x in same.values())
    assert set(special_rows(family / "base", base, base).values()) == {0.0}
    shutil.copytree(family / "base", tmp_path / "blank")
    blank = load_file(tmp_path / "blank" / "model.safetensors")
    save_file({n: torch.zeros_like(t) for n, t in blank.items()}, tmp_path / "blank" / "model.safetensors")
    assert sampled_cosine(base, Weights(tmp_path / "blank")) == 0.0
