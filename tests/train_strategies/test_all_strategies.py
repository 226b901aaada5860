"""What every training strategy must hold, alone and combined: two stages on a toy Llama, killed training, two ranks.

A new file in hf_contmerge/train_strategies/ is tested here by itself. What only one of them does is in its own tests.
"""

import functools
import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toys.models import toy_llama, write_jsonl
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies import Combined, TrainStrategy, combine, strategy_class, strategy_names
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.settings import training_checks

Row = dict[str, Any]
PAIRS = ("lora replay", "ewc replay", "olora distill", "anchor migu distill")
CASES = (*strategy_names(), *PAIRS)
# A constant rate, or a step too many after resuming would hardly show in the weights.
LIGHT = {
    "per_device_train_batch_size": 4, "max_steps": 6, "max_length": 32, "learning_rate": 1e-2, "logging_steps": 1,
    "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2,
}  # fmt: skip
WORDS = ("the quick brown fox jumps over a lazy dog", "court may refuse the claim of a party who gave no notice")


def settings(case: str, **fields: Any) -> Train:
    return Train(**{"strategy": case.split(), **LIGHT, **fields})


def texts(path: Path, stage: int) -> Path:
    """Write the examples of a stage."""
    draw, words = random.Random(stage), WORDS[stage].split()
    return write_jsonl(path, [{"text": " ".join(draw.choices(words, k=20))} for _ in range(40)])


def data_of(path: Path) -> StageData:
    return load_stage_data(Dataset(path=str(path), heldout=2), seed=0)


def learn(case: str, stage: int, home: Path, name: str, **more: Any) -> Row:
    """Train a stage in the folder `home/name`; its dataset, and what was cached of it, is gone afterwards."""
    path = texts(home / f"{name}.jsonl", stage)
    data = data_of(path)
    (home / name).mkdir()
    record = train(case, stage, home, name, data, **more)
    path.unlink()
    for file in data.train.cache_files:
        shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
    return record


def train(case: str, stage: int, home: Path, name: str, data: StageData, **more: Any) -> Row:
    memory = home / "first-memory" if stage else None
    return train_expert(
        TrainJob(
            start=home / "first" if stage else home / "base",
            base=home / "base",
            data=data,
            train=settings(case, **more),
            seed=0,
            memory=memory if memory and memory.exists() else None,
        ),
        home / name,
        checkpoints=home / f"{name}-checkpoints",
        memory_out=home / f"{name}-memory",
    )


@dataclass(frozen=True)
class Course:
    """Two stages, one after the other, in a folder: base, first, first-memory, second, ..."""

    home: Path
    records: tuple[Row, Row]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Course]]:
    """Return a function that has trained two stages with some strategies, or skips what this machine cannot do."""
    base = toy_llama(tmp_path_factory.mktemp("base") / "base", seed=0)

    @functools.cache
    def course(case: str) -> Course:
        home = tmp_path_factory.mktemp(case.replace(" ", "-"))
        (home / "base").symlink_to(base)
        return Course(home, (learn(case, 0, home, "first"), learn(case, 1, home, "second")))

    gc.collect()
    gc.freeze()  # what the libraries have made need not be gone through again after each training
    yield course
    gc.unfreeze()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return works_here(request.param)


@pytest.fixture(params=strategy_names())
def name(request: pytest.FixtureRequest) -> str:
    return works_here(request.param)


def works_here(case: str) -> str:
    why = refused_here(case)
    if why:
        pytest.skip(why)
    return case


@functools.cache
def refused_here(case: str) -> str | None:
    """Return what a strategy says of a machine that it cannot work on."""
    try:
        combine(case.split(), {})
    except ContmergeError as error:
        return str(error)
    return None


def differing(one: Path, other: Path) -> list[str]:
    """Return the files of two folders that are not the same, byte for byte."""
    files = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} if f.exists() else set() for f in (one, other)]
    return [str(p) for p in files[0] | files[1] if p not in files[0] & files[1] or not equal(one / p, other / p)]


def equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_loss_falls(case: str, course: Callable[[str], Course]) -> None:
    assert not list(course(case).home.glob("*.jsonl"))  # the second stage had no data of the first
    for record in course(case).records:
        losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
        assert len(losses) == LIGHT["max_steps"]
        assert sum(losses[-2:]) < sum(losses[:2])


def test_experts_have_the_names_and_shapes_of_the_base(case: str, course: Callable[[str], Course]) -> None:
    home = course(case).home
    base = weights(home / "base")
    for name, before in (("first", "base"), ("second", "first")):
        expert, start = weights(home / name), weights(home / before)
        assert {n: t.shape for n, t in expert.items()} == {n: t.shape for n, t in base.items()}
        assert all(t.isfinite().all() for t in expert.values())
        assert any(not torch.equal(t, start[n]) for n, t in expert.items())


def test_training_that_was_killed_goes_on(case: str, course: Callable[[str], Course]) -> None:
    """From the checkpoint in the middle to the same bytes, of the expert and of what is remembered."""
    home = course(case).home
    left = home / "broken-checkpoints"
    left.mkdir()
    (home / "second-checkpoints" / "checkpoint-3").rename(left / "checkpoint-3")
    record = learn(case, 1, home, "broken")
    assert differing(home / "broken", home / "second") == []
    assert differing(home / "broken-memory", home / "second-memory") == []
    assert record["loss"] == course(case).records[1]["loss"]


# Two ranks

RANKS = """
import gc, json, sys
from pathlib import Path
from accelerate import PartialState
import peft, trl.trainer.sft_trainer
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_all_strategies import data_of, sharded_step, train

gc.collect()
gc.freeze()
for case, home in json.loads(Path(sys.argv[2]).read_text()).items():
    with PartialState(cpu=True).main_process_first():
        data = data_of(Path(home) / "shared.jsonl")
    train(case, 1, Path(home), "shared", data, per_device_train_batch_size=2)
    (Path(home) / "sharded").write_text(str(sharded_step(case, Path(home))))
"""


def moved(case: str, home: Path) -> tuple[Combined, Any]:
    """Return strategies and what they train, some way into the second stage: the same on each rank."""
    strategies, memory = combine(case.split(), {}), home / "first-memory"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(home / "first").train()
    opened = strategies.open(model, memory if memory.exists() else None)
    for weight in opened.parameters():
        if weight.requires_grad:
            weight.data += 0.01 * torch.randn(weight.shape)
    return strategies, opened


def sharded_step(case: str, home: Path) -> float | None:
    """Return by how much a step on shared-out weights (FSDP2) differs from one on whole weights; None: not for it."""
    if combine(case.split(), {}).not_sharded():
        return None
    ids = torch.randint(5, 384, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    found = []
    for shard in (True, False):
        strategies, model = moved(case, home)
        if shard:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
        model(input_ids=ids, labels=ids).loss.backward()
        if not shard:
            for weight in weights.values():
                assert weight.grad is not None
                dist.all_reduce(weight.grad.div_(dist.get_world_size()))
        with torch.no_grad():
            strategies.adjust_gradients(model)
            torch.optim.SGD(weights.values(), lr=0.1).step()
            strategies.adjust_weights(model)
        found.append([w.full_tensor() if isinstance(w, DTensor) else w for w in weights.values()])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


@pytest.fixture(scope="module")
def shared(course: Callable[[str], Course], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Strategy -> its folder, in which the second stage's expert `shared` is that of two ranks with half the batch."""
    homes = {name: course(name).home for name in strategy_names() if not refused_here(name)}
    for home in homes.values():
        texts(home / "shared.jsonl", 1)
        (home / "shared").mkdir()
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    (folder / "homes.json").write_text(json.dumps({case: str(home) for case, home in homes.items()}))
    start = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run(
        [*start, folder / "ranks.py", Path(__file__).parent, folder / "homes.json"],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return homes


def test_two_ranks_with_half_the_batch_are_one(name: str, shared: dict[str, Path]) -> None:
    """Their gradients differ from those of one rank in the order of the sums only."""
    start, alone, together = (weights(shared[name] / f) for f in ("first", "second", "shared"))
    assert together.keys() == alone.keys()
    learnt = torch.stack([torch.dist(alone[n], start[n]) for n in alone]).norm()
    apart = torch.stack([torch.dist(alone[n], together[n]) for n in alone]).norm()
    assert apart <= 1e-3 * learnt


def test_two_ranks_remember_what_one_does(name: str, shared: dict[str, Path]) -> None:
    one, two = (shared[name] / f"{f}-memory" for f in ("second", "shared"))
    assert [p.relative_to(two) for p in sorted(two.rglob("*"))] == [p.relative_to(one) for p in sorted(one.rglob("*"))]
    for path in one.rglob("*.safetensors"):
        theirs = load_file(two / path.relative_to(one))
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-2, atol=1e-3 * float(tensor.abs().max()))


def test_step_on_shared_out_weights(name: str, shared: dict[str, Path]) -> None:
    """It is that on whole ones, for those that do not say that they need the weights whole."""
    written = (shared[name] / "sharded").read_text()
    assert (written == "None") == (not strategy_class(name).sharded)
    assert written == "None" or float(written) < 1e-6


# What is refused


def refused(base: Path, names: list[str], parameters: Row) -> str:
    with pytest.raises(RecipeError) as caught:
        [check() for check in training_checks(Train(strategy=names, parameters=parameters), base)]
    return str(caught.value)


@pytest.mark.parametrize("name", strategy_names())
def test_unknown_parameter(name: str, base_folder: Path) -> None:
    if not refused_here(name):
        assert "'colour'" in refused(base_folder, [name], {"colour": "red"})


@pytest.mark.parametrize(
    ("names", "parameters", "message"),
    [
        (["anchor"], {"strength": -1.0}, "anchor's strength must be greater than or equal to 0; got -1.0"),
        (["anchor"], {"strength": "much"}, "anchor's strength must be a valid number; got 'much'"),
        (["anchor"], {"modules": "("}, "anchor's modules is no regular expression: '(' (missing ), unterminated subpa"),
        (["ewc"], {"gamma": 1.5}, "ewc's gamma must be less than or equal to 1; got 1.5"),
        (["ewc"], {"examples": 0}, "ewc's examples must be greater than or equal to 1; got 0"),
        (["distill"], {"temperature": float("nan")}, "distill's temperature must be a finite number; got nan"),
        (["migu"], {"fraction": True}, "migu's fraction must be a valid number; got True"),
        (["lora", "full"], {}, "lora and full cannot be combined: each says which tensors are trained; keep one"),
        (["anchor", "anchor"], {}, "the same strategy twice: anchor, anchor"),
        (["lora", "anchor"], {}, "anchor works with full, not with lora"),
        (["ewc", "olora"], {}, "ewc works with full, not with olora"),
    ],
)
def test_what_cannot_be(names: list[str], parameters: Row, message: str, base_folder: Path) -> None:
    of = parameters if len(names) == 1 else {}
    assert refused(base_folder, names, of).startswith(f"train.parameters: {message}")


def test_a_pair_of_carriers_is_refused_whatever_they_are(base_folder: Path) -> None:
    carriers = [n for n in strategy_names() if strategy_class(n).carrier and not refused_here(n)]
    for one, other in itertools.pairwise(carriers):
        assert f"{one} and {other} cannot be combined" in refused(base_folder, [one, other], {})


def test_a_machine_that_lacks_something_is_told_what_to_use_instead() -> None:
    for name in strategy_names():
        assert "Use " in (refused_here(name) or "Use ")


def test_every_strategy_says_what_it_is() -> None:
    """A docstring with the equation, the paper in the file's, and what memory it takes if it carries."""
    for name in strategy_names():
        cls = strategy_class(name)
        assert issubclass(cls, TrainStrategy)
        assert cls.__doc__
        assert name == "full" or "arXiv" in (sys.modules[cls.__module__].__doc__ or cls.__doc__), name
        assert cls.bytes_per_parameter or not cls.carrier, name
