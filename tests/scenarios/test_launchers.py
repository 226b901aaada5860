"""Every launcher: config files, weights that are shared out (FSDP2), ranks that die, trackers, what is missing.

Real processes: `accelerate launch` and `torchrun` with gloo between two ranks on processor cores.
"""

import importlib.util
import json
import os
import random
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from toys import ROOT
from toys.models import TEXT, write_jsonl

from hf_contmerge.errors import RecipeError, ResourceError
from hf_contmerge.loop.trackers import check_trackers
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.changes import changes
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import load_recipe
from hf_contmerge.runtime.launching import join_ranks
from hf_contmerge.train import main
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

SCRIPT = ROOT / "hf_contmerge" / "train.py"
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
PROGRAMS = Path(sys.executable).parent
RANKS = {**os.environ, "ACCELERATE_USE_CPU": "true"}
TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "logging_steps": 1,
    "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def torchrun(*words: str | Path) -> list[str]:
    return list(map(str, [PROGRAMS / "torchrun", "--standalone", "--nproc-per-node", "2", "--", *words]))


def done(command: list[str], env: dict[str, str] = RANKS, *, code: int | None = 0) -> str:
    """Run a command to its end; return what it said."""
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    said = ended.stdout + ended.stderr
    assert ended.returncode == code if code is not None else ended.returncode, said
    return said


@pytest.fixture(scope="module")
def recipe(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage; each test trains as much of it as it needs."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    rows = [{"text": " ".join(draw.choices(TEXT.split(), k=30))} for _ in range(40)]
    path = write_jsonl(home / "a.jsonl", rows)
    stage = {"name": "a", "dataset": {"path": str(path), "heldout": 3}}
    fields = {
        "name": "launched", "base_model": str(base_folder), "stages": [stage], "train": TRAIN, "merge": ["magmax"],
        "evaluate": {"dtype": "float32"},
    }  # fmt: skip
    (home / "a.yml").write_text(yaml.safe_dump(fields))
    return home / "a.yml"


# Config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_one_of_accelerate(path: Path) -> None:
    """Its own loader takes every word, and its launcher starts as many processes as the file says."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    words = ["--config_file", str(path), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == config.num_processes == {"cpu2": 2, "two-nodes": 16}.get(path.stem, 8)
    assert (args.use_deepspeed, args.use_fsdp) == (path.stem == "zero3", path.stem in ("fsdp2", "two-nodes"))
    assert args.num_machines == (2 if path.stem == "two-nodes" else 1)


def test_configs_that_the_readme_promises() -> None:
    assert [path.stem for path in CONFIGS] == ["cpu2", "ddp", "fsdp2", "two-nodes", "zero3"]


# Shared out weights


def expert(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / "01-a" / "experts" / "base" / "expert" / "model.safetensors")


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], base: Path) -> None:
    """The names, shapes and dtypes are those of the base; the change is the same but for rounding."""
    start = load_file(base / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in start.items()}
    for name, tensor in wanted.items():
        assert torch.dist(found[name], tensor) <= 1e-4 * torch.dist(tensor, start[name]), name


def launched(config: str, recipe: Path, run: Path, *words: str) -> list[str]:
    start = [PROGRAMS / "accelerate", "launch", "--config_file", ROOT / "recipes" / "accelerate" / f"{config}.yaml"]
    return list(map(str, [*start, "--num_processes", 2, SCRIPT, recipe, "--run", run, "--until", "train", *words]))


def alone(recipe: Path, folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    """Return the expert of one process, whose batch is that of two ranks."""
    fields = load_recipe(recipe, [f"train.strategy={strategy}", "train.per_device_train_batch_size=4"])
    spec = fields.stages[0].dataset
    assert spec
    (folder / "expert").mkdir(parents=True)
    train_expert(
        TrainJob(
            start=Path(fields.base_model),
            base=Path(fields.base_model),
            data=load_stage_data(spec, seed=0),
            seed=0,
            train=fields.train,
        ),
        folder / "expert",
        checkpoints=folder / "checkpoints",
    )
    return load_file(folder / "expert" / "model.safetensors")


@pytest.mark.slow
def test_a_strategy_that_needs_whole_weights_is_refused_before_any_work(recipe: Path, tmp_path: Path) -> None:
    command = launched("fsdp2", recipe, tmp_path / "run", "--set", "train.strategy=[full, distill]")
    said = done(command, code=None)
    assert "Error: train of stage a: distill cannot work where the weights are shared out among ranks" in said
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert not list((tmp_path / "run").rglob("scores.json"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_fsdp2_trains_the_expert_of_one_process(strategy: str, recipe: Path, base_folder: Path, tmp_path: Path) -> None:
    """Also when it is killed after a checkpoint, and goes on from there. (DDP: see test_ranks.)"""
    command = launched("fsdp2", recipe, tmp_path / "run", "--set", f"train.strategy={strategy}")
    checkpoint = tmp_path / "run/stages/01-a/experts/base/checkpoints/checkpoint-2"
    kill_a_rank(command, (checkpoint / "trainer_state.json").exists)
    assert checkpoint.exists()
    done(command)
    assert_near(expert(tmp_path / "run"), alone(recipe, tmp_path / "alone", strategy), base_folder)
    log = json.loads((tmp_path / "run/stages/01-a/experts/base/train.json").read_text())["log"]
    assert [point["step"] for point in log] == [1, 2, 3, 4]


SAMPLED = {
    "max_completion_length": 24, "per_device_train_batch_size": 4, "optim": "adamw_torch", "save_steps": 2,
    "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 1.0e-2, "save_strategy": "steps",
}  # fmt: skip
LEARNT: dict[str, dict[str, Any]] = {
    "grpo": {"learn": "grpo", "rewards": {"repetition": {"n": 1}}, "num_generations": 4}, "sdft": {"learn": "sdft"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("learn", LEARNT)
def test_sampled_answers_under_fsdp2_are_those_of_ddp(
    learn: str, recipe: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Also where a kill after a checkpoint ended the first of two runs."""
    rows = [{"prompt": f"say {i}: ", "completion": "the quick brown fox"} for i in range(40)]
    data = write_jsonl(tmp_path / "sampled-on-two-ranks.jsonl", rows)
    stages = [{"name": "a", "dataset": {"path": str(data), "heldout": 4}}]
    fields = {**yaml.safe_load(recipe.read_text()), "stages": stages, "train": {**SAMPLED, **LEARNT[learn]}}
    file = tmp_path / "sampled.yml"
    file.write_text(yaml.safe_dump(fields))
    broken = launched("cpu2", file, tmp_path / "cpu2")
    checkpoint = tmp_path / "cpu2/stages/01-a/experts/base/checkpoints/checkpoint-2"
    kill_a_rank(broken, (checkpoint / "trainer_state.json").exists)
    done(broken)
    done(launched("fsdp2", file, tmp_path / "fsdp2"))
    assert_near(expert(tmp_path / "fsdp2"), expert(tmp_path / "cpu2"), base_folder)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu2", "fsdp2"])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_resumed_run_of_two_ranks_is_the_unbroken_one(
    config: str, strategy: str, recipe: Path, tmp_path: Path
) -> None:
    words = ["--set", f"train.strategy={strategy}"]
    done(launched(config, recipe, tmp_path / "unbroken", *words))
    command = launched(config, recipe, tmp_path / "killed", *words)
    kill_a_rank(command, (tmp_path / "killed/stages/01-a/experts/base/checkpoints/checkpoint-2").exists)
    done(command)
    unbroken, resumed = expert(tmp_path / "unbroken"), expert(tmp_path / "killed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


# Rank 1 is slow to write its part of the second checkpoint, and killed in the middle of it.
SLOW = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from hf_contmerge.train import main

save = torch.save

def slow(what, file, *more, **options):
    if str(file).endswith("checkpoint-4/rng_state_1.pth"):
        open(file, "w").close()
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(what, file, *more, **options)

torch.save = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_checkpoint_is_whole_when_all_ranks_have_written_theirs(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = [recipe, "--run", tmp_path / "run", "--until", "train", "--set", "train.max_steps=6"]
    done(torchrun(tmp_path / "slow.py", *words), code=1)
    checkpoints = tmp_path / "run/stages/01-a/experts/base/checkpoints"
    assert sorted(p.parent.name for p in checkpoints.glob("*/trainer_state.json")) == ["checkpoint-2"]
    assert (checkpoints / "checkpoint-4/rng_state_1.pth").stat().st_size == 0
    done(torchrun(SCRIPT, *words))
    done(torchrun(SCRIPT, recipe, "--run", tmp_path / "unbroken", *words[3:]))
    unbroken, resumed = expert(tmp_path / "unbroken"), expert(tmp_path / "run")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


# Ranks that die


def kill_a_rank(command: list[str], when: Any, rank: int = 1) -> tuple[float, str]:
    """Start a job, kill one rank as soon as `when` says so; return after how many seconds all ended, and what was said.

    The job must have failed.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=RANKS) as job:
        ranks = list[int]()
        end = time.monotonic() + 200
        while not (when() and (ranks := ranks_of(job.pid))):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        said = job.communicate(timeout=100)[0]
    assert job.returncode != 0
    return time.monotonic() - killed, said


def ranks_of(launcher: int) -> list[int]:
    """Return the processes that a launcher has started as ranks, in their order; none until all are there."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = dict(w.split("=", 1) for w in (folder / "environ").read_text().split("\0") if "=" in w)
        except (OSError, UnicodeDecodeError, ValueError):  # it has ended
            continue
        if parent == launcher and "LOCAL_RANK" in words:
            found[int(words["LOCAL_RANK"])] = int(folder.name)
    return [found[i] for i in sorted(found)] if len(found) == 2 else []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_is_killed_takes_the_job_down(rank: int, recipe: Path, tmp_path: Path) -> None:
    """In the middle of a long training: the others wait for it in a collective operation."""
    run = tmp_path / "run"
    words = [SCRIPT, recipe, "--run", run, "--set", "train.max_steps=100000", "--set", "train.save_steps=3"]
    checkpoints = run / "stages/01-a/experts/base/checkpoints"
    seconds, said = kill_a_rank(torchrun(*words), lambda: any(checkpoints.glob("checkpoint-*")), rank)
    assert seconds < 60
    assert re.search(rf"rank +: {rank} .*\n.*exitcode +: -9|Signal 9 \(SIGKILL\) received", said), said


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_merge_takes_the_job_down(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    merge = run / "stages/01-a/merges/magmax/.running"
    command = torchrun(SCRIPT, recipe, "--run", run)
    seconds, _ = kill_a_rank(command, merge.exists)
    assert seconds < 60
    done(command)
    assert Run.load(run).is_complete()


# Rank 1 alone has little memory left when it begins to compute.
HUNGRY = f"""
import os, resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from transformers import LlamaForCausalLM
from hf_contmerge.train import main

def limit(module, args):
    if os.environ["RANK"] == "1" and isinstance(module, LlamaForCausalLM):
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, resource.RLIM_INFINITY))

torch.nn.modules.module.register_module_forward_pre_hook(limit)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_without_memory_says_so_and_ends_the_job(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    data = write_jsonl(tmp_path / "many.jsonl", ({"text": f"{i} " + TEXT[:100]} for i in range(5000)))
    wide = ["--set", "train.per_device_train_batch_size=2000", "--set", "train.gradient_checkpointing=false"]
    words = [*wide, "--set", f"stages.0.dataset.path={data}", "--until", "train"]
    begun = time.monotonic()
    said = done(torchrun(tmp_path / "hungry.py", recipe, "--run", tmp_path / "run", *words), code=None)
    assert time.monotonic() - begun < 120
    assert "Error on rank 1: Out of memory (train 01-a/experts/base)" in said


def test_time_limits_are_the_recipes(recipe: Path) -> None:
    """One process needs none, and takes whatever the recipe says."""
    joined, crew = join_ranks({**TRAIN, "ddp_timeout": 30})
    assert (joined.num_processes, crew.ranks.size) == (1, 1)


# What is missing


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is here")
def test_deepspeed_that_is_not_here(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"train.deepspeed \(ds.json\) asks for DeepSpeed, which is not installed"):
        join_ranks({"deepspeed": "ds.json"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ResourceError, match=r"pip install 'hf_contmerge\[deepspeed\]'"):
        join_ranks()
    assert main([str(recipe), "--run", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_unknown_or_not_here(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check_trackers(Train()) == check_trackers(Train.model_validate({"report_to": "none"})) == []
    with pytest.raises(RecipeError, match=r"Unknown tracker 'wandby' in train.report_to. Did you mean 'wandb'\?"):
        check_trackers(Train.model_validate({"report_to": ["wandby"]}))
    for name in ("tensorboard", "trackio", "wandb"):
        if importlib.util.find_spec(name) is None:
            words = [str(recipe), "--run", str(tmp_path / "run"), "--set", f"train.report_to={name}"]
            assert main(words) == 2
            assert f"train.report_to names {name}, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_trackers_can_be_changed_in_the_middle(recipe: Path) -> None:
    watched = load_recipe(recipe, ["train.report_to=wandb", "train.ddp_timeout=60"])
    assert list(changes(load_recipe(recipe), watched)) == []
    assert [c.field for c in changes(load_recipe(recipe), load_recipe(recipe, ["train.strategy=[lora, replay]"]))] == [
        "train.strategy"
    ]


# Trackers


def png_size(file: Path) -> tuple[int, int]:
    """Return a picture's width and height."""
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_shows_one_run(recipe: Path, tmp_path: Path) -> None:
    """Stopped after training and started again, it goes on; undone, it starts anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

    words = [str(recipe), "--run", str(tmp_path / "run"), "--set", "train.report_to=tensorboard"]
    stages = [*yaml.safe_load(recipe.read_text())["stages"]]
    stages.append({**stages[0], "name": "b", "dataset": {**stages[0]["dataset"], "heldout": 5}})
    words += ["--set", f"stages={json.dumps(stages)}"]
    assert main([*words, "--until", "train"]) == 0
    assert main(words) == 0
    assert main(words) == 0
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "launched"))
    events.Reload()

    def steps(tag: str) -> list[int]:
        return [point.step for point in events.Scalars(tag)]

    assert steps("01-a/base/loss") == [1, 2, 3, 4]
    assert steps("02-b/previous/loss") == [5, 6, 7, 8]
    assert steps("01-a/magmax/scale") == [4]
    assert steps("02-b/magmax/running_norm") == [8]
    run = Run.load(tmp_path / "run")
    losses = [point["loss"] for point in run.expert(2, "previous").record("train")["log"]]
    assert [point.value for point in events.Scalars("02-b/previous/loss")] == pytest.approx(losses, rel=1e-6)
    curve = events.Scalars("over stages/a_heldout/magmax")
    assert [p.step for p in curve] == [0, 1, 2]
    scores = [place.record("score")["tasks"]["a_heldout"]["value"] for place in
              (run.base, *(run.merged(t, run.recipe.merge[0]) for t in (1, 2)))]  # fmt: skip
    assert [p.value for p in curve] == pytest.approx(scores, rel=1e-6)
    assert steps("over stages/b_heldout/previous") == [0, 2]
    picture = events.Images("report/forgetting")
    assert [(p.width, p.height) for p in picture] == [png_size(run.folder / "report" / "forgetting.png")]
    (table,) = events.Tensors("report/scores/text_summary")
    assert "| merges/magmax | 2 | b | a_heldout | perplexity |" in table.tensor_proto.string_val[0].decode()
    found = events.Scalars("02-b/magmax/b_heldout/word_perplexity")
    score = run.merged(2, run.recipe.merge[0]).record("score")["tasks"]["b_heldout"]
    assert [(p.step, p.value) for p in found] == [(8, pytest.approx(score["value"], rel=1e-6))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline_shows_one_run(recipe: Path, tmp_path: Path) -> None:
    """Without an account; each process writes a file of the same run, as `wandb sync` sends them."""
    watch(recipe, tmp_path / "run", "wandb", {"WANDB_MODE": "offline"})
    files = sorted((tmp_path / "run" / "trackers").glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1
    points = [point for file in files for point in wandb_history(file)]
    losses = {p["step"]: p["01-a/base/loss"] for p in points if "01-a/base/loss" in p}
    run = Run.load(tmp_path / "run")
    log = run.expert(1, "base").record("train")["log"]
    assert losses == {point["step"]: pytest.approx(point["loss"], rel=1e-6) for point in log}
    curve = {p["stages"]: p["over stages/a_heldout/magmax"] for p in points if "over stages/a_heldout/magmax" in p}
    scores = [place.record("score")["tasks"]["a_heldout"]["value"] for place in
              (run.base, run.merged(1, run.recipe.merge[0]))]  # fmt: skip
    assert curve == dict(enumerate(pytest.approx(x, rel=1e-6) for x in scores))
    assert any("report/forgetting" in p for p in points)


def watch(recipe: Path, run: Path, tracker: str, env: dict[str, str]) -> None:
    """Train, merge and score in a second process, and give the command a third time."""
    words = [PROGRAMS / "contmerge", "run", recipe, "--run", run, "--set", f"train.report_to={tracker}"]
    for more in (["--until", "train"], [], []):
        done(list(map(str, [*words, *more])), {**os.environ, **env})


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Return the points that an offline run would send.

    The file is LevelDB's log: blocks of 32 KiB, with parts of records behind 7 bytes of checksum, length and kind.
    """
    from wandb.proto import wandb_internal_pb2  # pyright: ignore

    data, at, whole, points = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            items, whole = record.history.item, b""
            points += [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items}] if items else []
    return points


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_trackio_shows_one_run(recipe: Path, tmp_path: Path) -> None:
    """In a database on this machine."""
    watch(recipe, tmp_path / "run", "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    run = Run.load(tmp_path / "run")
    points = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = {step: point["01-a/base/loss"] for step, point in points if "01-a/base/loss" in point}
    log = run.expert(1, "base").record("train")["log"]
    assert losses == {point["step"]: pytest.approx(point["loss"], rel=1e-6) for point in log}
    assert any("report/forgetting" in point for _, point in points)
