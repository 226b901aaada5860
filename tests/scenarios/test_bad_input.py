"""Bad input ends with exit code 2, one clear sentence, and not a stage begun."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets  # noqa: F401  (its log handler writes to the stderr of the moment it is imported, so not inside a test)
import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file
from toys.models import toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.merge_rules import rule_names
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.train_strategies import strategy_names
from hf_contmerge.training.data import load_stage_data

Data = dict[str, Any]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, experts that fit it or do not, and texts that are fit to train on or not."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    for seed, name in enumerate(("base", "expert", "other")):
        toy_llama(home / name, seed=seed)
    toy_llama(home / "deep", seed=3, layers=3)
    toy_llama(home / "wide", seed=3, hidden=64)
    rows = [{"text": " ".join(draw.choices(["law", "code", "fox", "bird"], k=30))} for _ in range(20)]
    write_jsonl(home / "a.jsonl", rows)
    write_jsonl(home / "null.jsonl", [*rows, {"text": None}])
    write_jsonl(home / "blank.jsonl", [{"text": ""}] * 20)
    write_jsonl(home / "chat.jsonl", [{"messages": [{"role": "user", "content": r["text"]}]} for r in rows])
    write_jsonl(home / "gold.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 2}])
    (home / "empty.jsonl").write_text("")
    (home / "broken.jsonl").write_text("{not json\n")
    (home / "folder").mkdir()
    (home / "file").write_text("notes")
    return home


@pytest.fixture
def recipe(home: Path) -> Data:
    """One stage to train and one given expert."""
    return {
        "name": "bad",
        "base_model": str(home / "base"),
        "stages": [
            {"name": "a", "dataset": {"path": str(home / "a.jsonl"), "heldout": 4}},
            {"name": "b", "expert": str(home / "expert")},
        ],
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"},
        "merge": [{"rule": "magmax"}],
    }


@pytest.fixture
def given(recipe: Data, home: Path) -> Data:
    """Two given experts: a run that takes no time."""
    recipe["stages"] = [{"name": "a", "expert": str(home / "expert")}, {"name": "b", "expert": str(home / "other")}]
    return recipe


@pytest.fixture
def refused(tmp_path: Path, recipe: Data, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs the recipe in vain, and gives the message without the word Error."""

    def refused(*words: str, text: str | None = None, run: Path | None = None, begun: bool = False) -> str:
        folder, path = run or tmp_path / "run", tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(recipe) if text is None else text)
        capsys.readouterr()
        assert main(["run", str(path), "--run", str(folder), *words]) == 2
        printed = capsys.readouterr().err
        assert printed.count("Error: ") == 1
        assert "Traceback" not in printed
        assert begun or not folder.is_dir() or not (folder / "stages").exists()
        message = printed.partition("Error: ")[2].rstrip("\n")
        return message.replace(f"{path}", "RECIPE").replace(str(folder), "RUN")

    return refused


def to(*settings: str) -> list[str]:
    """Return `--set` before each setting."""
    return [word for setting in settings for word in ("--set", setting)]


# The recipe: words


WORDS = {
    "evaluate.general_task=[x]": "RECIPE: Unknown field 'general_task' in evaluate. Did you mean 'general_tasks'? "
    "Known: backend, batch_size, cache, chat_template, dtype, general_tasks, include_path, limit, matrix, max_length, "
    "parallel, relevance, routed, same_within, shots, validation.",
    "stages.0.dataset.helduot=3": "RECIPE: Unknown field 'helduot' in stages.0.dataset. Did you mean 'heldout' or "
    "'heldout_split'? Known: config, heldout, heldout_chars, heldout_split, labels, license, max_chars, max_examples, "
    "messages, min_chars, mix, path, revision, split, streaming, text.",
    "merge.0.rule=magmx": "Unknown rule 'magmx' in merge entry magmx. Did you mean 'magmax'? "
    f"Known: {', '.join(rule_names())}.",
    "merge.0.parameters.lamda=0.5": "merge entry magmax: magmax has no parameter 'lamda'; it has: lambda",
    "merge.0.parameters.lambda=high": "merge entry magmax: magmax's lambda must be a finite float; got 'high'",
    "merge.0.parameters.lambda=.nan": "merge entry magmax: magmax's lambda must be a finite float; got nan",
    "train.strategy=lorra": "Unknown strategy 'lorra' in train. Did you mean 'lora' or 'qlora'? "
    f"Known: {', '.join(strategy_names())}.",
    "train.seed=1": "RECIPE: train: seed is set by `seed` of the recipe; remove it from `train`",
    "train.save_strategy=sometimes": "RECIPE: train: save_strategy must be no, steps or epoch; got 'sometimes'",
    "train.eval_strategy=steps": "RECIPE: train: eval_strategy is refused: a stage is not evaluated while it trains, "
    "because the run measures every expert and merge. Use `evaluate`.",
    "train.eos_token=<|stop|>": "train.eos_token: the tokenizer of BASE has no token '<|stop|>'. Name one of its "
    "tokens; another would need a larger embedding, and the expert could not be merged.",
    "train.assistant_only_loss=true": "train of stage a cannot be followed: You set `assistant_only_loss=True`, but "
    "the dataset is not conversational. This option is only supported for conversational datasets. (ValueError of TRL "
    "or transformers)",
    "trust_remote_code=true": "`trust_remote_code: true` lets BASE run its own code, which happens only if you say so "
    "too: read that code, then add `--trust-remote-code` (in Python: run_recipe(..., trust_remote_code=True)).",
    "stages.1.dataset=x.jsonl": "RECIPE: stages.1: a stage needs either `dataset` (to train on) or `expert` "
    "(a trained model)",
    "stages.0.minus=x": "RECIPE: stages.0: `minus` needs `expert`: the stage's task vector is expert - minus",
    "base_model=''": "RECIPE: base_model: String should have at least 1 character (got '')",
    "output=''": "RECIPE: output: String should have at least 1 character (got '')",
    "base_model=nowhere": "There is no model at nowhere. Give a folder, a .gguf file, or a Hub id (owner/model).",
    "merge.9.rule=ema": "--set merge.9.rule=ema: the recipe has no path 'merge.9.rule'",
    "merge.0.rule": "--set expects path=value, such as merge.0.rule=opcm; got 'merge.0.rule'",
}


@pytest.mark.parametrize("setting", WORDS)
def test_word(setting: str, refused: Refused, recipe: Data) -> None:
    assert refused(*to(setting)).replace(recipe["base_model"], "BASE") == WORDS[setting]


def test_unknown_training_field(refused: Refused) -> None:
    message = refused(*to("train.learning_rat=1"))
    start = "Unknown field 'learning_rat' in train. Did you mean 'learning_rate'?"
    assert message.startswith(start)


def test_training_field_of_the_wrong_type(refused: Refused) -> None:
    assert "learning_rate" in refused(*to("train.learning_rate=fast"))


def test_unknown_parameter_of_a_strategy(refused: Refused) -> None:
    message = refused(*to("train.strategy=lora", "train.parameters.rnk=4"))
    assert message.startswith("train.parameters:")
    assert "'rnk'" in message


@pytest.mark.slow
def test_unknown_task(refused: Refused) -> None:
    message = refused(*to("evaluate.general_tasks=[hella_swag]"))
    assert message.startswith("Unknown task 'hella_swag'. Did you mean 'hellaswag'")


def test_two_of_one_name(refused: Refused, recipe: Data) -> None:
    assert refused(*to("stages.1.name=a")).endswith("two stages are named a; give each a different `name`")
    assert refused(*to("merge=[ema, ema]")).endswith("two merge entries are named ema; give each a different `name`")


def test_task_named_like_held_out_text(refused: Refused, recipe: Data, home: Path) -> None:
    """It would take the place of the stage's own file of held-out text."""
    task = {"name": "a_heldout", "kind": "perplexity", "dataset": str(home / "a.jsonl")}
    recipe["evaluate"] = {"general_tasks": [task]}
    assert "a_heldout" in refused()


TEXTS = {
    "merge_method: magmax\nbase_model: x\n": "RECIPE is a mergekit recipe (it has `merge_method`). Run it with "
    "`mergekit-yaml RECIPE OUT`; a recipe for contmerge has `stages` and `merge`.",
    "": "RECIPE must hold a mapping with name, base_model, stages and merge; got None",
    "- a": "RECIPE must hold a mapping with name, base_model, stages and merge; got ['a']",
    "{name: x, base_model: x, stages: [{name: a, expert: e}]}": "RECIPE: merge is missing.",
}


@pytest.mark.parametrize("text", TEXTS)
def test_not_a_recipe(text: str, refused: Refused) -> None:
    assert refused(text=text) == TEXTS[text]


def test_not_yaml(refused: Refused) -> None:
    assert refused(text="a: [").startswith("RECIPE is not YAML: while parsing a flow node")


def test_no_recipe_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "no.yml")]) == 2
    wanted = (
        f"Error: Cannot read the recipe {tmp_path}/no.yml: No such file or directory. Give the path of a YAML file.\n"
    )
    assert capsys.readouterr().err == wanted


def test_our_recipe_given_to_mergekit(recipe: Data, tmp_path: Path) -> None:
    """Not ours to word, but it must fail, and say which field it missed."""
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    command = [Path(sys.executable).with_name("mergekit-yaml"), tmp_path / "recipe.yml", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "merge_method" in done.stderr
    assert not (tmp_path / "out").exists()


# Data


DATASETS = {
    "empty.jsonl": "HOME/empty.jsonl (split train) is empty.",
    "broken.jsonl": "HOME/broken.jsonl, line 1: this is no JSON (Expecting property name enclosed in double quotes). "
    "Correct the file.",
    "blank.jsonl": "HOME/blank.jsonl (split train) is empty.",
    "folder": "There is no dataset HOME/folder, here or on the Hub: The directory at HOME/folder doesn't contain any "
    "data files",
}


@pytest.mark.parametrize("name", DATASETS)
def test_dataset(name: str, refused: Refused, home: Path) -> None:
    message = refused(*to(f"stages.0.dataset.path={home / name}"))
    assert message.replace(str(home), "HOME") == DATASETS[name]


def test_dataset_is_nowhere(refused: Refused) -> None:
    wanted = f"There is no file nowhere.jsonl. Give a path from {Path.cwd()}, or an absolute one."
    assert refused(*to("stages.0.dataset.path=nowhere.jsonl")) == wanted


def test_unknown_column(refused: Refused, home: Path) -> None:
    wanted = f"Unknown column 'body' in {home / 'a.jsonl'}. Known: text."
    assert refused(*to("stages.0.dataset.text=body")) == wanted


def test_too_few_examples(refused: Refused, home: Path) -> None:
    assert refused(*to("stages.0.dataset.heldout=20")) == (
        f"{home / 'a.jsonl'} has 20 examples, but 20 are to be held out and none would be left to train on. Give more "
        "examples, or set `heldout` to a smaller number."
    )


def test_row_without_text_is_left_out(home: Path) -> None:
    data = load_stage_data(Dataset(path=str(home / "null.jsonl"), heldout=4), seed=0)
    assert len(data.train) + len(data.heldout) == 20


def test_bad_conversation_in_a_later_stage(refused: Refused, recipe: Data, home: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl(tmp_path / "talk.jsonl", [*({"messages": turns} for _ in range(9)), {"messages": "hi"}])
    recipe["stages"][1] = {"name": "b", "dataset": {"path": str(path), "heldout": 2}}
    assert refused() == (
        f"{path}, line 10: the column messages must hold conversations, lists of turns with `role` and `content`; got "
        "'hi'."
    )


def test_conversations_without_a_chat_template(refused: Refused, home: Path, tmp_path: Path) -> None:
    folder = changed(home, tmp_path / "mute", lambda f: (f / "chat_template.jinja").unlink())
    message = refused(*to(f"base_model={folder}", f"stages.0.dataset.path={home / 'chat.jsonl'}"))
    assert "has no chat template" in message


def test_answer_outside_the_choices(refused: Refused, recipe: Data, home: Path) -> None:
    path = str(home / "gold.jsonl")
    recipe["evaluate"] = {"general_tasks": [{"name": "mc", "kind": "multiple_choice", "dataset": path}]}
    assert refused() == f"{path}, line 1: gold must be the right choice or its index; got 2 for 2 choices."


# Models


def changed(home: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(home / "expert", folder)
    change(folder)
    return folder


def with_value(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def test_expert_of_another_depth(refused: Refused, home: Path) -> None:
    assert refused(*to(f"stages.1.expert={home / 'deep'}")) == (
        f"{home / 'deep'} does not fit {home / 'base'}: it has model.layers.2.input_layernorm.weight and 8 more "
        "tensors, which the base lacks. Both must have the same architecture."
    )


def test_expert_of_another_width(refused: Refused, home: Path) -> None:
    message = refused(*to(f"stages.1.expert={home / 'wide'}"))
    vocabulary = load_file(home / "base/model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert message == (
        f"model.embed_tokens.weight has shape ({vocabulary}, 64) in {home / 'wide'}, ({vocabulary}, 32) in "
        f"{home / 'base'}. Both must have the same architecture and size."
    )


def test_expert_of_another_vocabulary(refused: Refused, home: Path, tmp_path: Path) -> None:
    size = json.loads((home / "base/config.json").read_text())["vocab_size"]

    def widen(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "vocab_size": size + 8}))

    folder = changed(home, tmp_path / "vocabulary", widen)
    assert refused(*to(f"stages.1.expert={folder}")) == (
        f"{folder} has a vocabulary of {size + 8}, {home / 'base'} of {size}: their rows do not correspond. Train the "
        "expert with the base's tokenizer, without new tokens."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_no_number(value: float, refused: Refused, given: Data, home: Path, tmp_path: Path) -> None:
    """The file must be read to see it: the merge stops, and leaves no record."""
    folder = changed(home, tmp_path / "expert", with_value(value))
    message = refused(*to(f"stages.1.expert={folder}"), "--until", "merge", begun=True)
    assert message == (
        f"model.norm.weight in {folder} has 1 values that are NaN or infinite. The training diverged or the file is "
        "damaged: lower learning_rate and train that stage again, or fetch the model again. Nothing was merged."
    )
    merge = tmp_path / "run/stages/02-b/merges/magmax"
    assert not (merge / "merge.json").exists()
    assert not (merge / "merged").exists()


def test_truncated_weights(refused: Refused, home: Path, tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    folder = changed(home, tmp_path / "cut", cut)
    message = refused(*to(f"stages.1.expert={folder}"))
    assert message.startswith(f"{folder}/model.safetensors is truncated or not a safetensors file (")
    assert message.endswith("). Fetch or write it again.")


def test_pickled_weights(refused: Refused, home: Path, tmp_path: Path) -> None:
    def pickle(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    folder = changed(home, tmp_path / "pickled", pickle)
    assert refused(*to(f"stages.1.expert={folder}")) == (
        f"{folder} holds no *.safetensors of a model: expected model.safetensors or model.safetensors.index.json. It "
        "has pytorch_model.bin, which is not read. Pickled weights (.bin, .pt) are not read: load the model once with "
        "transformers and call save_pretrained."
    )


def test_model_without_config(refused: Refused, home: Path, tmp_path: Path) -> None:
    folder = changed(home, tmp_path / "bare", lambda f: (f / "config.json").unlink())
    assert refused(*to(f"base_model={folder}")) == (
        f"{folder} has no config.json. Give a folder written by `save_pretrained`."
    )


def test_base_without_tokenizer(refused: Refused, home: Path, tmp_path: Path) -> None:
    def drop(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()

    folder = changed(home, tmp_path / "mute", drop)
    message = refused(*to(f"base_model={folder}"))
    assert str(folder) in message
    assert "tokenizer" in message


def test_same_expert_twice(refused: Refused, given: Data, home: Path, tmp_path: Path) -> None:
    folder = changed(home, tmp_path / "copy", lambda _: None)
    assert refused(*to(f"stages.1.expert={folder}"), "--until", "merge", begun=True) == (
        "Stage b has the same weights as Stage a; an expert must not be folded twice. Leave it out, or name the right "
        "one. Nothing was merged."
    )
    assert not (tmp_path / "run/stages/02-b/merges/magmax/merge.json").exists()


# The run folder


def test_run_made_by_another_recipe(refused: Refused, given: Data, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(given))
    assert main(["run", str(path), "--run", str(tmp_path / "run"), "--until", "merge"]) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    message = refused(*to("merge.0.dtype=float16"), begun=True)
    assert message.splitlines()[0] == "RUN was made by another recipe:"
    assert message.splitlines()[1].strip() == (
        "merge.magmax.dtype: 'auto' -> 'float16'   used by merge of 01-a/merges/magmax, 02-b/merges/magmax"
    )
    assert "`contmerge redo RUN merge`" in message
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    assert main(["redo", str(tmp_path / "run"), "merge"]) == 0
    assert (
        main(["run", str(path), "--run", str(tmp_path / "run"), "--until", "merge", *to("merge.0.dtype=float16")]) == 0
    )


def test_folder_with_other_things_in_it(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").write_text("mine")
    assert refused() == "RUN is not empty and holds no run (no recipe.yml). Name another with --run."
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"]


def test_run_folder_is_a_file(refused: Refused, home: Path) -> None:
    assert "RUN" in refused(run=home / "file")
    assert refused(run=home / "file" / "run") == (
        "Cannot write the run folder RUN: Not a directory. Name another with --run."
    )


@pytest.mark.parametrize("command", [["status"], ["report"], ["redo", "merge"]])
def test_folder_that_is_no_run(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    assert capsys.readouterr().err == (
        f"Error: {tmp_path} holds no run (no recipe.yml). Give the folder that `contmerge run` wrote, such as "
        "runs/quickstart.\n"
    )


def test_folder_that_cannot_be_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path} holds no run, no merge state, and no record of a ")


def test_run_in_use(refused: Refused, given: Data, tmp_path: Path) -> None:
    run = Run.open(parse_recipe(given), tmp_path / "run")
    frozen = (tmp_path / "run/recipe.yml").read_text()
    with FolderLock(run.folder):
        message = refused("--set", "seed=7")
    assert message == "RUN is in use by another process. Wait for it, or name another folder."
    assert (tmp_path / "run/recipe.yml").read_text() == frozen


# The machine


def test_too_little_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40, free=1000))
    message = refused()
    assert message.startswith("This run still needs about ")
    assert message.endswith("Free some space, choose another disk with --run, or use fewer merge entries.")


def test_too_little_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=1000))
    message = refused()
    assert message.endswith("Use `strategy: lora`, a smaller model, or more GPUs.")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 900 KiB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_disk(refused: Refused, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert refused(run=disk / "run") == (
        "Cannot write the run folder RUN: Read-only file system. Name another with --run."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_folder_without_permission(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert refused(run=tmp_path / "locked" / "run") == (
        "Cannot write the run folder RUN: Permission denied. Name another with --run."
    )


CLI = [sys.executable, "-m", "hf_contmerge.commands.main"]


def command(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.slow
def test_disk_that_fills_up(recipe: Data, home: Path, disk: Path, tmp_path: Path) -> None:
    """Somebody else fills it while a stage is trained; with room, the same command ends what it began."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    recipe["stages"][1] = {**recipe["stages"][0], "name": "b"}
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    words = [*CLI, "run", str(path), "--run", str(disk / "run"), "--until", "merge"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if line.startswith("train 01-"))
        with contextlib.suppress(OSError):  # the run may write at the same time, so that less is free
            (disk / "theirs").write_bytes(bytes(shutil.disk_usage(disk).free))
        last = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == 2, last
    assert last.startswith("Error: ")
    full = r"(the disk is full\.|which has \d+\.\d MiB free\.) Free some space"  # refused, or foreseen by the merge
    assert re.search(full + r".*The unfinished phases need about [\d.]+ MiB in /\S+; ", last)
    assert "rerun the command" in last
    (disk / "theirs").unlink()
    done = command("run", path, "--run", disk / "run", "--until", "merge")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (disk / "run/stages/02-b/merges/magmax/merge.json").exists()


@pytest.mark.slow
def test_tasks_of_a_hub_that_does_not_answer(recipe: Data, tmp_path: Path) -> None:
    """The first one is asked for again and again, for some 20 seconds; that must do for all."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe, "evaluate": {"general_tasks": ["hellaswag", "piqa", "arc_easy"]}}))
    silent = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = command("run", path, "--run", tmp_path / "run", **silent)
    assert done.returncode == 2
    assert done.stderr.count("Retrying") == 5
    assert done.stderr.splitlines()[-1] == (
        "Error: The datasets of 3 tasks are missing, and the Hub cannot be reached: hellaswag, piqa, arc_easy. "
        "Check the network and HF_HUB_OFFLINE, or remove these tasks."
    )


@pytest.mark.slow
def test_hub_without_network(recipe: Data, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe, "base_model": "owner/model"}))
    done = command("run", path, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: Cannot fetch owner/model: it is not a local folder, and the Hub is unreachable "
        "(LocalEntryNotFoundError). Check the network and HF_HUB_OFFLINE, or name a local folder."
    )
    assert not (tmp_path / "run/stages").exists()
