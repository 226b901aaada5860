"""`contmerge plan`: what it finds wrong, what it says a run takes, and how near that is to what the run took."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from datasets import Dataset
from toys.architectures import ARCHITECTURES, build
from toys.hub_server import READ_TOKEN, Hub, Repo, hub_server
from toys.loras import lora
from toys.models import perturbed, toy_llama, toy_mixture, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError
from hf_contmerge.loop.plan import _dry_step
from hf_contmerge.loop.plan._dry_step import scoring_batch
from hf_contmerge.loop.plan._machine import measure_speeds, this_machine
from hf_contmerge.loop.plan._merging import _folding
from hf_contmerge.loop.plan._planned import Host
from hf_contmerge.loop.plan._scoring import _requests
from hf_contmerge.loop.plan._training import _shape
from hf_contmerge.loop.plan.disk import Trained, disk_use
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging import MergeState
from hf_contmerge.models.weights import Weights, WeightsWriter
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.parts import Dataset as DataSpec
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.files import write_choice_task
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.limits import trainer_limits
from hf_contmerge.training.settings import make_strategies

Data = dict[str, Any]
CONTMERGE = Path(sys.executable).parent / "contmerge"
NEAR = pytest.approx(1.0, abs=0.25)
SENTENCE = "the quick brown fox jumps over the lazy dog while green birds sing songs about law and medicine "


def home_of(folder: Path, base: Path) -> Data:
    """Write two texts; return a recipe of two stages."""
    for name in "ab":
        rows = [{"text": f"{name} {i} " + 8 * SENTENCE} for i in range(40)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {
        "name": "plan", "base_model": str(base),
        "stages": [{"name": n, "dataset": {"path": str(folder / f"{n}.jsonl"), "heldout": 4}} for n in "ab"],
        "train": {
            "max_steps": 3, "per_device_train_batch_size": 4, "max_length": 128, "gradient_checkpointing": False,
            "save_strategy": "no",
        },
        "merge": ["magmax", "opcm"], "evaluate": {"batch_size": 4},
    }  # fmt: skip


@pytest.fixture
def recipe(base_folder: Path, tmp_path: Path) -> Data:
    return home_of(tmp_path, base_folder)


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that plans a recipe in this process: exit code, what was printed, what was said to be wrong."""

    def do(recipe: Data, *words: str) -> tuple[int, str, str]:
        (tmp_path / "plan.yml").write_text(yaml.safe_dump(recipe))
        code = main(["plan", str(tmp_path / "plan.yml"), "--run", str(tmp_path / "run"), *words])
        return code, *capsys.readouterr()

    return do


def run_command(*words: object, **env: str) -> str:
    done = subprocess.run(
        [CONTMERGE, *map(str, words)], capture_output=True, text=True, env={**os.environ, **env}, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Against what a run takes


@pytest.fixture(scope="module")
def planned_and_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Path]:
    """A plan, and the run that followed, each phase in a process of its own: peak memory never falls within one."""
    home = tmp_path_factory.mktemp("planned")
    recipe = home_of(home, toy_llama(home / "base", seed=0, hidden=512, layers=5))
    recipe["train"]["max_steps"] = 2
    recipe["stages"] = recipe["stages"][:1]
    (home / "plan.yml").write_text(yaml.safe_dump(recipe))
    found = json.loads(run_command("plan", home / "plan.yml", "--run", home / "run", "--json"))
    for phase in ("train", "merge", "score"):
        run_command("run", home / "plan.yml", "--run", home / "run", "--until", phase)
    return found, home


@pytest.mark.parametrize(
    "train", [{}, {"strategy": "lora", "parameters": {"r": 2, "keep": True}}], ids=["full", "lora"]
)
def test_a_mixture_of_experts(
    train: Data, recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """PyTorch's rule for a grouped product without data takes bfloat16 only."""
    mixture = toy_mixture(tmp_path / "mixture", seed=0)
    recipe |= {"base_model": str(mixture), "train": recipe["train"] | train}
    code, out, _ = plan(recipe, "--json")
    phases = {phase["phase"]: phase for phase in json.loads(out)["phases"]}
    assert code == 0
    weights = sum(file.stat().st_size for file in mixture.glob("*.safetensors"))
    assert phases["train"]["memory_bytes"] > weights * (1 if train else 4)


def test_the_products_of_experts_are_those_of_their_tokens(tmp_path: Path) -> None:
    """Two of four experts see each token, so all products take twice those of one expert, whatever the number is."""
    mixture = toy_mixture(tmp_path / "mixture", seed=0)
    flops = []
    for experts in (4, 2):
        config = json.loads((mixture / "config.json").read_text()) | {"num_local_experts": experts}
        (mixture / "config.json").write_text(json.dumps(config))
        cost = scoring_batch(mixture, batch=2, length=64, init={"dtype": torch.float32, "trust_remote_code": False})
        of_experts = {
            s: n for s, n in cost.work.products.items() if s[:3] in ((256 // experts, 32, 96), (256 // experts, 48, 32))
        }
        flops.append(sum(of_experts.values()))
    assert flops[0] == flops[1] == 2 * 2 * 256 * (32 * 96 + 48 * 32)


@pytest.mark.parametrize(("choices", "rows"), [("abcd", 9), (["a court", "a nurse"], 18)], ids=["a token", "more"])
def test_answers_of_one_token_share_a_row(choices: Sequence[str], rows: int, base_folder: Path, tmp_path: Path) -> None:
    """The planned rows are those that scoring gives the model."""
    words = ("fox", "dog", "law", "hen", "claim", "court", "pulse", "nurse", "list")
    questions = [{"query": f"They refuse the {word}", "choices": list(choices), "gold": 1} for word in words]
    write_choice_task(tmp_path, "choice", questions)
    evaluate = Evaluate(batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    recipe = SimpleNamespace(evaluate=evaluate, trust_remote_code=False)
    planned: Any = SimpleNamespace(recipe=recipe, tasks=tmp_path, tokenizer=tokenizer)
    read: list[int] = []
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    score_loaded(model, tokenizer, ScoreRequest([Task(name="choice")], tmp_path, evaluate), ranks=OneRank())
    assert _requests.__wrapped__(planned, "choice", None).count == sum(read) == rows
    alone = SimpleNamespace(evaluate=evaluate.model_copy(update={"backend": "vllm"}), trust_remote_code=False)
    planned.recipe = alone
    assert _requests.__wrapped__(planned, "choice", None).count == 9 * len(choices)


def test_an_equal_step_is_metered_once(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that cost nothing share a dry step, as copies of a model do; a strategy's own bytes are added."""
    metered: list[object] = []
    meter = _dry_step._meter_training
    monkeypatch.setattr(_dry_step, "_METERED", {})
    monkeypatch.setattr(_dry_step, "_meter_training", lambda *words: metered.append(words) or meter(*words))
    copy = shutil.copytree(base_folder, tmp_path / "copy")

    def held(folder: Path, length: int = 16, **train: Any) -> int:
        made = Train.model_validate({"per_device_train_batch_size": 2} | train)
        settings = SimpleNamespace(
            bf16=False, fp16=False, gradient_accumulation_steps=1, optim="adamw_torch",
            gradient_checkpointing=False, gradient_checkpointing_kwargs=None,
        )  # fmt: skip
        init = {"dtype": torch.float32, "trust_remote_code": False}
        strategies = make_strategies(made)
        return _dry_step.training_step(folder, strategies, settings, batch=2, length=length, init=init).held

    weights = Weights(base_folder).numel()
    full = held(base_folder)
    assert held(copy, learning_rate=0.1) == full
    assert held(copy, strategy=["full", "ewc"]) == full + 8 * weights
    assert len(metered) == 1
    assert held(base_folder, strategy="lora", parameters={"r": 2}) < full
    held(base_folder, strategy="lora", parameters={"r": 4})
    held(base_folder, length=17)
    assert len(metered) == 4


def test_the_time_of_a_step_is_that_of_its_usual_batch(base_folder: Path) -> None:
    """One long example among many sets a step's memory, not the time of all steps."""
    texts = [{"text": SENTENCE * (20 if i == 5 else 1)} for i in range(40)]
    planned: Any = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(base_folder))
    data: Any = SimpleNamespace(train=Dataset.from_list(texts), form="text")
    one, longest = (len(planned.tokenizer(SENTENCE * n)["input_ids"]) for n in (1, 20))
    settings = SimpleNamespace(max_length=4096, per_device_train_batch_size=4, packing=False)
    shape = _shape(planned, data, settings)
    assert shape.length == pytest.approx(longest, abs=1)
    assert shape.usual == pytest.approx((9 * one + longest) / 10, abs=1)
    assert _shape(planned, data, SimpleNamespace(**{**vars(settings), "packing": True})).usual == 4096


@pytest.mark.slow
def test_memory_is_what_each_phase_took(planned_and_run: tuple[Data, Path]) -> None:
    found, home = planned_and_run
    ratios = {}
    for phase in found["phases"]:
        record = json.loads((home / "run/stages" / phase["place"] / f"{phase['phase']}.json").read_text())
        ratios[phase["phase"], phase["place"]] = phase["memory_bytes"] / record["peak_memory_bytes"]
    assert len(ratios) == 7
    assert all(ratio == NEAR for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_disk_is_what_the_run_left(planned_and_run: tuple[Data, Path]) -> None:
    found, home = planned_and_run
    files = [p for p in (home / "run/stages").rglob("*") if p.is_file() and not p.is_symlink()]
    took = sum(p.stat().st_size for p in files if "00-base/model" not in str(p))
    assert found["total"]["disk_kept_bytes"] == pytest.approx(took, rel=0.01)


SDFT = {
    "learn": "sdft", "teacher_model_kind": "ema", "max_completion_length": 4, "num_generations": 2,
    "gradient_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize("train", [{}, {"strategy": "soup"}, SDFT], ids=["plain", "soup", "moving teacher"])
def test_disk_of_a_checkpoint_is_what_it_takes(train: Data, tmp_path: Path) -> None:
    """With a soup's average and a teacher that moves; a guard keeps the weights, and what they are averaged with."""
    base = toy_llama(tmp_path / "base", seed=0, hidden=192)
    count = Weights(base).numel()
    fields = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "optim": "adamw_torch", **train}
    settings = Train.model_validate(fields)
    rows = [{"prompt": f"{i} is", "completion": " a number"} for i in range(8)]
    limits = trainer_limits(settings, base, trust_remote_code=False)
    data = load_stage_data(
        DataSpec(path=str(write_jsonl(tmp_path / "x.jsonl", rows)), heldout=0), seed=0, limits=limits
    )
    job = TrainJob(start=base, base=base, data=data, train=settings, keep=1)
    train_expert(job, tmp_path / "expert", checkpoints=tmp_path / "all", earlier=tmp_path / "earlier")
    state = make_strategies(settings).bytes_in_checkpoints * count
    recipe = {"name": "x", "base_model": str(base), "merge": ["average"], "train": fields,
              "stages": [{"name": "s", "dataset": "x.jsonl"}],
              "guard": {"ladder": [{"do": "earlier", "parameters": {"checkpoints": 1}}]}}  # fmt: skip
    run = SimpleNamespace(recipe=parse_recipe(recipe), stage=lambda _: parse_recipe(recipe).stages[0])
    place = ExpertPlace(tmp_path / "place", "base")
    step = SimpleNamespace(phase="train", place=place, t=1)
    planned = disk_use(step, run, Weights(base), {}, Trained(count, state=state)).at_work  # pyright: ignore
    (last,) = (tmp_path / "all").glob("checkpoint-*")
    (kept,) = (tmp_path / "earlier").glob("checkpoint-*")
    takes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in (last, kept)]
    assert 2 * takes[0] + takes[1] == pytest.approx(planned, rel=0.1)


@pytest.mark.slow
def test_what_is_done_is_not_counted(planned_and_run: tuple[Data, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, home = planned_and_run
    assert main(["plan", str(home / "plan.yml"), "--run", str(home / "run")]) == 0
    assert "All phases are done." in capsys.readouterr().out


@pytest.mark.slow
def test_time_is_what_each_phase_took(tmp_path: Path) -> None:
    """Processor time of a single thread, for other programs on the machine lengthen the time on the clock.

    They come and go, and slow a core's caches between plan and run: one of three comparisons has to be undisturbed.
    """
    base = toy_llama(tmp_path / "base", seed=0, hidden=768, layers=8)
    ratios = list[float]()
    while len(ratios) < 3 and not any(ratio == NEAR for ratio in ratios):
        home = tmp_path / f"{len(ratios)}"
        home.mkdir()
        ratios.append(planned_by_taken(home, base))
    assert any(ratio == NEAR for ratio in ratios), ratios


def planned_by_taken(home: Path, base: Path) -> float:
    """Return the planned time of a training over its processor time."""
    recipe = home_of(home, base)
    recipe |= {"stages": recipe["stages"][:1], "merge": ["opcm"]}
    recipe["train"] |= {"max_steps": 20, "max_length": 256}
    (home / "plan.yml").write_text(yaml.safe_dump(recipe))
    found = json.loads(run_command("plan", home / "plan.yml", "--run", home / "run", "--json"))

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_command("run", home / "plan.yml", "--run", home / "run", "--until", "train")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    took = seconds() - seconds()  # the second finds all done: what a start takes
    return sum(p["seconds"] for p in found["phases"] if p["phase"] == "train") / took


def test_time_has_the_examples_that_are_mixed_in(
    recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """A quarter of the second stage's are its own, and half of the first's."""
    write_jsonl(tmp_path / "general.jsonl", [{"text": SENTENCE}] * 8)
    replay = {"general": str(tmp_path / "general.jsonl"), "general_share": 0.5, "share": 0.25}
    recipe["train"] = {k: v for k, v in recipe["train"].items() if k != "max_steps"} | {
        "num_train_epochs": 200, "strategy": ["full", "replay"], "parameters": {"replay": replay}
    }  # fmt: skip
    recipe["merge"] = [{"rule": "average", "start_from": "previous"}]
    code, printed, _ = plan(recipe, "--json")
    assert code == 0
    first, second = (p["seconds"] for p in json.loads(printed)["phases"] if p["phase"] == "train")
    assert second / first == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["covariance", "iso_c", "opcm"])
def test_time_of_a_merge_is_near_what_it_takes(name: str, tmp_path: Path) -> None:
    """Processor time of one thread. These rules decompose at each stage, at read-out, at later stages."""
    base, *experts = (toy_llama(tmp_path / f"{seed}", seed=seed, hidden=512, layers=2) for seed in range(3))
    weights, rule, crew = Weights(base), get_rule(name), Crew(workers=1)
    host = Host(this_machine(tmp_path), measure_speeds(tmp_path), start=0, processes=1)
    planned = sum(_folding(weights, host, rule, stage) for stage in (1, 2))
    state = MergeState.create(tmp_path / "state", base=base, rule=name)
    start = time.process_time()
    for number, expert in enumerate(experts):
        state.add(expert, crew=crew)
        state.export(tmp_path / f"merged-{number}", crew=crew)
    took = time.process_time() - start
    assert took / 2 < planned < took * 2


def lora_step(name: str, folder: Path) -> Any:
    build(next(tiny for tiny in ARCHITECTURES if tiny.name == name)).save_pretrained(folder)
    settings: Any = SimpleNamespace(
        bf16=False, fp16=False, gradient_accumulation_steps=1, optim="adamw_torch", gradient_checkpointing=False
    )
    init = {"dtype": torch.float32, "trust_remote_code": False}
    strategies = make_strategies(Train(strategy="lora"))
    return _dry_step.training_step(folder, strategies, settings, batch=2, length=8, init=init)


@pytest.mark.parametrize("name", ["GraniteMoeForCausalLM", "Llama4ForCausalLM", "PhimoeForCausalLM"])
def test_step_of_a_mixture(name: str, tmp_path: Path) -> None:
    assert lora_step(name, tmp_path).trained > 0


def test_model_that_trl_cannot_train_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan ended in a traceback, as the training does."""
    monkeypatch.setattr(_dry_step, "_METERED", {})
    monkeypatch.setattr(_dry_step, "complete_names", lambda _: None)  # TRL then finds no inner model
    with pytest.raises(ModelError, match=r"without weights ends with AttributeError: .*Try one step"):
        lora_step("Llama4ForCausalLM", tmp_path)


# What is wrong


def test_all_errors_are_told_at_once(recipe: Data, plan: Callable[..., tuple[int, str, str]]) -> None:
    recipe["merge"] = ["magmx", {"rule": "opcm", "parameters": {"alpa": 1}}]
    recipe["train"]["strategy"] = "fulll"
    recipe["stages"][0]["dataset"]["path"] = "nowhere.jsonl"
    recipe["stages"][1]["dataset"]["text"] = "txt"
    recipe["stages"].append({"name": "c", "expert": "./nothing"})
    code, _, err = plan(recipe)
    assert code == 2
    for part in (
        "Unknown rule 'magmx'", "opcm has no parameter 'alpa'", "Unknown strategy 'fulll'", "There is no file nowhere",
        "Unknown column 'txt'", "There is no model at ./nothing",
    ):  # fmt: skip
        assert part in err, part
    assert [n for n in range(1, 9) if f"\n  {n}. " in err] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow  # lm-eval's own tasks take many seconds to index
def test_an_unknown_task(recipe: Data, plan: Callable[..., tuple[int, str, str]]) -> None:
    recipe["evaluate"]["general_tasks"] = ["hellaswg"]
    code, _, err = plan(recipe)
    assert code == 2
    assert "Unknown task 'hellaswg'" in err


def test_a_base_that_is_no_good(recipe: Data, plan: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = plan({**recipe, "base_model": "./nowhere"})
    assert code == 2
    assert "cannot run: There is no model at ./nowhere" in err


def test_nothing_is_written(recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = plan(recipe)
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "plan.yml"])
    lines = out.splitlines()
    assert lines[-1] == "All checks passed."
    assert [line.split()[0] for line in lines].count("train") == 3  # the first stage's serves both rules


def test_a_changed_recipe_is_told(recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    code, _, err = plan(recipe)
    assert code == 2
    assert "is not empty and holds no run" in err


# Adapters, several strategies, what does not fit


def test_lora_and_given_adapters(recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    given = lora(Path(recipe["base_model"]), tmp_path / "adapter", seed=3)
    recipe["stages"].append({"name": "c", "expert": str(given)})
    recipe["train"] |= {"strategy": ["lora", "replay"], "parameters": {"lora": {"r": 4}, "replay": {"examples": 4}}}
    code, out, err = plan(recipe, "--json")
    assert code == 0, err
    trained = [p for p in json.loads(out)["phases"] if p["phase"] == "train"]
    assert trained[-1]["disk_kept_bytes"] == 0
    assert trained[0]["disk_kept_bytes"] > 0


@pytest.mark.parametrize(
    ("asked", "change", "said"),
    [
        (["inputs"], {"guard": {"max_forgetting": 0.1, "on": "stages", "ladder": [{"rule": "curvature"}]}},
         "guard.ladder.0 needs the statistics 'fisher' of each expert. Add `statistics: [fisher]`"),
        (["adam"], {"guard": {"max_forgetting": 0.1, "on": "stages", "ladder": ["earlier"]},
                    "merge": [{"rule": "curvature", "parameters": {"importance": "adam"}}]},
         "guard.ladder: `earlier` folds checkpoints, which have no moments of Adam, and merge entry curvature needs"),
        (["inputs"], {"merge": ["input_space"], "stages": [{"name": "c", "expert": "given"}]},
         "given lacks the statistics 'inputs', which the rule InputSpace needs: write them with `contmerge statistics"),
        (["inputs"], {"merge": ["input_space"], "stages": [{"name": "c", "expert": "given", "minus": "base"}]},
         "merge entry input_space needs the statistics 'inputs' of each expert, and the stage c (`expert` with"),
    ],
    ids=["rung", "earlier", "given", "sum"],
)  # fmt: skip
def test_statistics_that_a_rule_will_lack_are_missed_before_any_work(
    asked: list[str], change: Data, said: str, recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folders = {"base": recipe["base_model"]}
    folders["given"] = str(perturbed(Path(recipe["base_model"]), tmp_path / "given", seed=1, size=1e-3))
    recipe["train"] |= {"statistics": asked}
    added = [{k: folders.get(v, v) for k, v in stage.items()} for stage in change.get("stages", ())]
    recipe |= {**change, "stages": [*recipe["stages"], *added]}
    code, _, err = plan(recipe)
    assert code == 2
    assert said in err
    assert main(["run", str(tmp_path / "plan.yml"), "--run", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run/stages").exists()


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        (["full", "ewc"], {}),
        pytest.param(["full", "replay"], {"replay": {"examples": 20}}, marks=pytest.mark.slow),
        pytest.param("olora", {"r": 4}, marks=pytest.mark.slow),
        pytest.param("slao", {"r": 4}, marks=pytest.mark.slow),
    ],
    ids=["ewc", "replay", "olora", "slao"],
)
def test_what_strategies_remember_is_counted(
    strategy: Any, parameters: Data, recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe["train"] |= {"strategy": strategy, "parameters": parameters, "max_steps": 1}
    recipe["merge"] = ["magmax"]
    code, out, err = plan(recipe, "--json")
    assert code == 0, err
    assert main(["run", str(tmp_path / "plan.yml"), "--run", str(tmp_path / "run"), "--until", "train"]) == 0
    for phase in json.loads(out)["phases"]:
        if phase["phase"] == "train":
            place = tmp_path / "run/stages" / phase["place"]
            took = sum(p.stat().st_size for name in ("expert", "memory") for p in (place / name).rglob("*.*"))
            assert (place / "memory").is_dir()
            assert phase["disk_kept_bytes"] == pytest.approx(took, rel=0.15)


def test_each_kind_of_statistics_is_counted(
    recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe["train"] |= {"statistics": ["inputs", "fisher", "adam"], "max_steps": 1}
    recipe["merge"] = [{"rule": "curvature", "parameters": {"importance": "adam"}}]
    code, out, err = plan(recipe, "--json")
    assert code == 0, err
    assert main(["run", str(tmp_path / "plan.yml"), "--run", str(tmp_path / "run"), "--until", "train"]) == 0
    for phase in (p for p in json.loads(out)["phases"] if p["phase"] == "train"):
        expert = tmp_path / "run/stages" / phase["place"] / "expert"
        took = sum(p.stat().st_size for p in expert.rglob("*.*"))
        assert took > 3 * (expert / "model.safetensors").stat().st_size
        assert phase["disk_kept_bytes"] == pytest.approx(took, rel=0.15)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        pytest.param(
            {"backend": "vllm"}, "needs vLLM, which is not installed",
            marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed"),
        ),
        ({"parallel": "tensor"}, "spreads each matrix over the ranks of a job; this job has one rank"),
    ],
)  # fmt: skip
def test_plan_and_run_refuse_the_same_scoring(
    evaluate: Data, said: str, recipe: Data, plan: Callable[..., tuple[int, str, str]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe["evaluate"] |= evaluate
    code, out, planned = plan(recipe)
    assert (code, "All checks passed" in out) == (2, False)
    assert main(["run", str(tmp_path / "plan.yml"), "--run", str(tmp_path / "run")]) == 2
    for message in (planned, capsys.readouterr().err):
        assert said in message


def test_scoring_is_checked_for_the_processes_of_the_job(
    recipe: Data, plan: Callable[..., tuple[int, str, str]]
) -> None:
    recipe["evaluate"]["parallel"] = "tensor"
    assert plan(recipe, "--processes", "2")[0] == 0
    recipe["evaluate"]["parallel"] = "layers"
    assert "Start one per machine" in plan(recipe, "--processes", "2")[2]


def test_a_tracker_that_is_unknown(recipe: Data, plan: Callable[..., tuple[int, str, str]]) -> None:
    recipe["train"]["report_to"] = "wandby"
    code, _, err = plan(recipe)
    assert code == 2
    assert "Unknown tracker 'wandby'" in err


def large_base(folder: Path, parameters: int) -> Path:
    """Write a model of about so many parameters, as a hole in a file."""
    hidden, vocabulary = 4096, len(toy_tokenizer())
    layer = 4 * hidden**2 + 3 * hidden * 2 * hidden
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=32,
        num_key_value_heads=32, num_hidden_layers=max(1, parameters // layer), tie_word_embeddings=True,
    )  # fmt: skip
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    plan = [(n, tuple(p.shape), torch.bfloat16) for n, p in model.named_parameters()]
    WeightsWriter(folder, plan, shard_size=2**62).create()
    return folder


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_would(
    recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe["base_model"] = str(large_base(tmp_path / "large", psutil.virtual_memory().total // 8))
    code, out, err = plan({**recipe, "merge": ["magmax"]})
    assert code == 2
    assert "Training stage a needs about" in err
    assert "With `strategy: lora" in err
    assert "train  01-a/experts/base" in out


# The Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        yield hub


@pytest.mark.slow
def test_weights_stay_on_the_hub(recipe: Data, hub: Hub, tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "here", seed=0, hidden=256)
    hub.repos["me/base"] = Repo(private=False)
    files = {p.name: hub.store(p.read_bytes(), lfs=p.suffix == ".safetensors") for p in base.iterdir()}
    hub.commit("me/base", "all", files)
    weights = (base / "model.safetensors").stat().st_size
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": READ_TOKEN, "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    (tmp_path / "hub.yml").write_text(yaml.safe_dump({**recipe, "base_model": "me/base"}))
    there = json.loads(run_command("plan", tmp_path / "hub.yml", "--run", tmp_path / "run", "--json", **env))
    sent = sum(count for path, count in hub.sent.items() if path.endswith("model.safetensors"))
    assert 0 < sent <= 100_001 < weights
    kept = [p["disk_kept_bytes"] for p in there["phases"] if p["phase"] == "train"]
    assert kept[0] == pytest.approx(weights, rel=0.05)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_gguf_base_needs_converting(recipe: Data, tmp_path: Path) -> None:
    (tmp_path / "gguf.yml").write_text(yaml.safe_dump({**recipe, "base_model": "quickstart:smollm2"}))
    out = run_command("plan", tmp_path / "gguf.yml", "--run", tmp_path / "run", HF_HOME=str(tmp_path / "home"))
    assert "is a GGUF file: the run first converts it to bfloat16" in out
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_rows_that_are_left_out(recipe: Data, plan: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The plan notes them by reason, for each stage."""
    rows = [{"prompt": f"b {i} " + i * SENTENCE, "completion": " a bird"} for i in range(12)]
    write_jsonl(tmp_path / "b.jsonl", [*rows, {"prompt": "b"}, None, {"prompt": "b", "completion": ""}])  # pyright: ignore
    code, printed, told = plan(recipe)
    assert code == 0, told
    notes = [line for line in printed.splitlines() if line.startswith("Note: Stage b: ")]
    path = tmp_path / "b.jsonl"
    assert notes[:2] == [
        f"Note: Stage b: 2 of 15 rows of {path} are left out, for they lack prompt or completion.",
        f"Note: Stage b: 1 of 15 rows of {path} are left out, for they have an empty completion.",
    ]
    assert notes[2].endswith(" are left out, for they have no token to learn from within `max_length` (128).")
