"""End of text, padding and chat template of a recipe: in the files of experts, adapters and merges, or refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from toys.models import CHATML, toy_llama, toy_tokenizer, write_jsonl
from transformers import AutoTokenizer, GenerationConfig

from hf_contmerge import finetune_stage, merge_stage
from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.tokenizer import Token, TokenizerChange, tokenizer_change
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.training.tokenizer import stage_change, stage_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
LIGHT = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 64, "save_strategy": "no"}
END = "<|im_end|>"
RATES = {"one": 1e-3, "two": 2e-3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template, a template's file, conversations."""
    home = tmp_path_factory.mktemp("endings")
    toy_llama(home / "bare", seed=0)
    (home / "bare" / "chat_template.jinja").unlink()
    (home / "own.jinja").write_text(TEMPLATE)
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}] for i in range(12)]
    write_jsonl(home / "talk_endings.jsonl", [{"messages": talk} for talk in turns])
    return home


def check_ending(folder: Path) -> None:
    """Assert that a model or an adapter ends with `END` and has the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.chat_template) == (END, TEMPLATE)
    number = tokenizer.convert_tokens_to_ids(END)
    if (folder / "config.json").is_file():
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == number
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert isinstance(ends, list)
        assert ends[0] == number
        assert len(ends) == 2  # the base's end stops a generation too


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True], ids=["whole", "adapter"])
def test_experts_and_merges_of_a_run_have_it(keep: bool, home: Path, tmp_path: Path) -> None:
    data = {"path": str(home / "talk_endings.jsonl"), "heldout": 2}
    strategy = {"strategy": "lora", "parameters": {"keep": True, "r": 2}} if keep else {}
    recipe = parse_recipe({
        "name": "x", "base_model": str(home / "bare"), "merge": [{"rule": "average", "start_from": "base"}],
        "stages": [{"name": name, "dataset": data, "train": {"learning_rate": rate}} for name, rate in RATES.items()],
        "train": {**LIGHT, **strategy, "eos_token": END, "chat_template_path": str(home / "own.jinja")},
    })  # fmt: skip
    run = run_recipe(recipe, tmp_path / "run", until="merge")
    for t in (1, 2):
        check_ending(run.expert(t, "base").model)
        check_ending(run.merged(t, recipe.merge[0]).model)
    heldout = [json.loads(line)["text"] for line in (run.tasks / "one_heldout.jsonl").read_text().splitlines()]
    assert all(text.startswith("<|im_start|>say ") and text.endswith(f"yes{END}") for text in heldout)
    assert not (home / "bare" / "chat_template.jinja").exists()


def test_a_merge_by_functions_has_it_when_the_expert_is_gone(home: Path, tmp_path: Path) -> None:
    fields: Any = {**LIGHT, "eos_token": END, "chat_template_path": str(home / "own.jinja")}
    expert = finetune_stage(home / "bare", home / "talk_endings.jsonl", tmp_path / "expert", **fields)
    check_ending(expert.folder)
    state = merge_stage(tmp_path / "state", expert, rule="average")
    expert.folder.rename(tmp_path / "elsewhere")
    check_ending(state.export(tmp_path / "merged"))
    plain = state.export(tmp_path / "plain", tokenizer_from=str(home / "bare"))
    assert AutoTokenizer.from_pretrained(plain).eos_token != END


def test_an_expert_from_elsewhere_changes_nothing(home: Path, tmp_path: Path) -> None:
    """Its template may be anybody's; `tokenizer_from` takes it."""
    other = toy_llama(tmp_path / "other", seed=1)
    assert tokenizer_change(home / "bare", other) == TokenizerChange(chat_template=CHATML)
    merged = merge_stage(tmp_path / "state", other, base=home / "bare", rule="average").export(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template is None


def test_a_change_without_effect_writes_nothing(home: Path) -> None:
    own = AutoTokenizer.from_pretrained(home / "bare").eos_token
    assert not stage_change(home / "bare", Train(eos_token=own))  # pyright: ignore
    assert not stage_change(home / "bare", Train())


def test_a_change_is_kept_as_json() -> None:
    change = TokenizerChange(Token("<end>", 3), None, "{{ 'ü' }}")
    assert TokenizerChange.read(json.loads(json.dumps(change.to_json()))) == change


def test_padding(home: Path, tmp_path: Path) -> None:
    change = stage_change(home / "bare", Train(pad_token=END))  # pyright: ignore
    toy_llama(tmp_path / "copy", seed=0)
    change.write(tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").pad_token == END
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["pad_token_id"] == change.pad.number  # pyright: ignore


def test_a_template_of_another_tokenizer(home: Path, tmp_path: Path) -> None:
    """With the same tokens, it and its end are taken."""
    other = copy.deepcopy(toy_tokenizer())
    other.eos_token = END
    other.save_pretrained(tmp_path / "other")
    tokenizer = stage_tokenizer(home / "bare", Train(chat_template_path=str(tmp_path / "other")))  # pyright: ignore
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, END)


def _added(folder: Path) -> None:
    other = copy.deepcopy(toy_tokenizer())
    other.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    other.save_pretrained(folder)


def _plain(folder: Path) -> None:
    other = copy.deepcopy(toy_tokenizer())
    other.chat_template = None
    other.save_pretrained(folder)


WRONG = {
    "tokens that would be added": (
        _added,
        "{} has 2 tokens that the tokenizer of {base} lacks ('<|user|>', '<|end|>').",
    ),
    "no template": (_plain, "the tokenizer of {} has no chat template. Name another."),
    "no tokenizer": (Path.mkdir, "{} has no tokenizer. Give a .jinja file, or a tokenizer."),
    "no file.jinja": (lambda _: None, "there is no file {}. Give a .jinja file, or a tokenizer."),
    "wrong.jinja": (lambda file: file.write_text("{% for m in %}"), "{} is no Jinja template: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_templates_that_are_refused(name: str, home: Path, tmp_path: Path) -> None:
    make, words = WRONG[name]
    make(tmp_path / name)
    with pytest.raises(RecipeError) as caught:
        stage_tokenizer(home / "bare", Train(chat_template_path=str(tmp_path / name)))  # pyright: ignore
    words = words.format(tmp_path / name, base=home / "bare")
    assert str(caught.value).startswith(f"train.chat_template_path: {words}")
