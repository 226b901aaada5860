"""Each hook by a strategy that has nothing else, against the same training written out in plain torch."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import ROOT
from toys.trainings import RATE, STEPS, Batches, Parts, Training, assert_near, pairs, step_loss, texts
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import Combined, Gradient, TrainStrategy, get_strategy
from hf_contmerge.train_strategies.anchor import Anchor
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.train_strategies.replay import Replay
from hf_contmerge.training import settings
from hf_contmerge.training._trainer import _split_groups
from hf_contmerge.training.data import StageData

Row = dict[str, Any]
SAVED = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}


# The strategies


@dataclass
class Rates(TrainStrategy):
    """A tenth for the attention, nothing for the embeddings."""

    def rate(self, name: str) -> float:
        return 0.0 if "embed" in name else 0.1 if "self_attn" in name else 1.0


@dataclass
class Even(TrainStrategy):
    def rate(self, name: str) -> float:
        return 1.0


@dataclass
class Focus(TrainStrategy):
    """Sees all that there is of a token."""

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        assert not any(tensor.requires_grad for tensor in (log_probs, entropy))
        assert not log_probs[~counts].any()
        assert not is_top1[~counts].any()
        return weight_of(log_probs, entropy, is_top1)


def weight_of(log_probs: Tensor, entropy: Tensor, is_top1: Tensor) -> Tensor:
    return log_probs.exp() + entropy / math.log(384) + 0.5 * is_top1


@dataclass
class Halves(TrainStrategy):
    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        return torch.full_like(log_probs, 0.5)


@dataclass
class Ascent(TrainStrategy):
    """Climbs the step's loss first, twice."""

    size: float = RATE / 10

    def before_step(self, model: nn.Module, gradient: Gradient) -> None:
        for _ in range(2):
            slope = gradient()
            for name, weight in model.named_parameters():
                assert weight.grad is None
                if name in slope:
                    weight.add_(slope[name], alpha=self.size)


@dataclass
class Looks(TrainStrategy):
    """Computes each step's gradient and compares it with the one that the step computes itself."""

    found: list[dict[str, Tensor]] = field(default_factory=list)
    seen: int = 0

    def before_step(self, model: nn.Module, gradient: Gradient) -> None:
        self.found.append(dict(gradient()))

    def adjust_gradients(self, model: nn.Module) -> None:
        self.seen += 1
        (found,) = self.found
        own = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        assert own
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in own.items())
        self.found.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    return texts(tmp_path_factory.mktemp("data") / "x.jsonl")


@pytest.fixture
def train(base_folder: Path, data: StageData, tmp_path: Path) -> Training:
    return Training(tmp_path, base_folder, data)


@pytest.fixture
def model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder)


# rate


def test_rates_are_those_of_the_optimizers_groups(train: Training, model: Any) -> None:
    """With moments, weight decay and a schedule; a weight with rate 0 keeps its bytes."""
    batches = Batches()
    fields = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    train("rated", {"rates": Rates(), "batches": batches}, **fields)
    start, found = load_file(train.base / "model.safetensors"), train.weights("rated")
    named, factor = dict(model.named_parameters()), Rates().rate
    groups = [
        {"params": [w], "lr": RATE * factor(n), "factor": factor(n), "weight_decay": 0.1 * (w.dim() > 1)}
        for n, w in named.items()
        if factor(n)
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    for number, step in enumerate(batches.taken):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["factor"] * (1 - number / STEPS)
        step_loss(model, step).backward()
        optimizer.step()
        model.zero_grad()
    frozen = [n for n in named if not factor(n)]
    assert frozen
    assert all(torch.equal(found[n], start[n]) for n in frozen)
    for name, weight in named.items():
        if name not in frozen:
            assert torch.dist(found[name], weight.detach()) <= 2e-3 * torch.dist(weight, start[name]), name


def test_rate_one_is_plain_training(train: Training) -> None:
    """The same bytes, of the expert and of the optimizer's state."""
    fields = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    plain, even = train("plain", {}, **fields), train("even", {"even": Even()}, **fields)
    assert train.bytes("even") == train.bytes("plain")
    assert even["log"] == plain["log"]
    last = f"checkpoint-{STEPS}/optimizer.pt"
    one, other = (torch.load(train.home / f"{n}-checkpoints" / last) for n in ("plain", "even"))
    assert one["param_groups"] == other["param_groups"]
    assert len(one["param_groups"]) == 2


def test_the_logged_rate_is_the_recipes(train: Training) -> None:
    record = train("rated", {"rates": Rates()})
    assert [point["learning_rate"] for point in record["log"] if "loss" in point] == [RATE] * STEPS


def test_killed_training_with_rates_goes_on(train: Training) -> None:
    whole = train("whole", {"rates": Rates(), "ascent": Ascent()}, **SAVED, save_total_limit=2)
    left = train.home / "broken-checkpoints"
    left.mkdir()
    (train.home / "whole-checkpoints" / "checkpoint-2").rename(left / "checkpoint-2")
    broken = train("broken", {"rates": Rates(), "ascent": Ascent()}, **SAVED)
    assert train.bytes("broken") == train.bytes("whole")
    assert broken["log"] == whole["log"]


def test_others_see_a_frozen_weight_as_not_trained(model: Any) -> None:
    anchor = Anchor(modules=".")
    Combined({"full": Full(), "anchor": anchor, "rates": Rates()}).open(model, None)
    assert anchor._start
    assert anchor._start.weights.keys() == {n for n, _ in model.named_parameters() if "embed" not in n}


def test_factors_of_several_strategies_multiply(model: Any) -> None:
    combined = Combined({"full": Full(), "one": Rates(), "other": Rates()})
    combined.open(model, None)
    assert {round(factor, 9) for factor in combined.rates(model).values()} == {0.01, 1.0}


@dataclass
class Always(TrainStrategy):
    factor: float = 0.0

    def rate(self, name: str) -> float:
        return self.factor


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0.0, "always gives every weight the rate 0, so that nothing would be trained"),
        (-1.0, "always gives model.embed_tokens.weight the rate -1.0; a rate must be finite and not negative"),
        (math.nan, "always gives model.embed_tokens.weight the rate nan; a rate must be finite and not negative"),
    ],
)
def test_rate_that_cannot_be(factor: float, message: str, train: Training) -> None:
    with pytest.raises(RecipeError) as caught:
        train("expert", {"always": Always(factor)})
    assert str(caught.value) == f"train.parameters: {message} (strategy full)"


def test_optimizer_without_the_models_weights(model: Any) -> None:
    combined = Combined({"full": Full(), "rates": Rates()})
    combined.open(model, None)
    with pytest.raises(RecipeError, match=r"train\.optim: SGD does not update the model's weights itself, so that"):
        _split_groups(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), combined.rates(model))
    strange = nn.ParameterDict({"flat": nn.Parameter(torch.zeros(1))})
    with pytest.raises(RecipeError, match=r"rates sets learning rates by weight, and flat is none of the model's weig"):
        combined.rates(strange)


# token_weights


def test_token_weights_are_those_of_the_logits(train: Training, model: Any) -> None:
    batches = Batches()
    record = train("focused", {"focus": Focus(), "batches": batches})
    start = load_file(train.base / "model.safetensors")
    assert len(batches.taken) == STEPS
    losses = []
    for step in batches.taken:
        loss = step_loss(model, step, weight_of)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
        model.zero_grad()
    assert_near(train.weights("focused"), model, start)
    assert [point["loss"] for point in record["log"]] == pytest.approx(losses, rel=1e-4)


def test_token_weights_multiply(train: Training) -> None:
    """Twice a half is a quarter, as a quarter of the learning rate is."""
    train("quarter", {"one": Halves(), "other": Halves()})
    train("slow", {}, learning_rate=RATE / 4)
    assert train.bytes("quarter") == train.bytes("slow")


def test_pairs_have_no_token_weights(train: Training) -> None:
    with pytest.raises(RecipeError, match=r"train.strategy: focus needs the tokens of texts, and a stage has preferen"):
        train("expert", {"focus": Focus()}, data=pairs(train.home / "p.jsonl"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"loss_type": "dft"}, "loss_type dft weights tokens by their probability, and focus weights them too. Keep "),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor replaces the loss whose tokens focus weights. Set "),
    ],
)
def test_one_weighting_at_a_time(
    field: Row, message: str, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    recipe = parse_recipe({
        "name": "x", "base_model": "b", "merge": ["average"], "stages": [{"name": "s", "dataset": "x.jsonl"}],
        "train": field,
    })  # fmt: skip
    for check in settings.data_checks(recipe, {"s": data}):
        check()
    monkeypatch.setattr(settings, "make_strategies", lambda train: Combined({"full": Full(), "focus": Focus()}))
    with pytest.raises(RecipeError) as caught:
        [check() for check in settings.data_checks(recipe, {"s": data})]
    assert str(caught.value).startswith(f"train of stage s: {message}")


# before_step


def test_before_step_has_the_gradient_where_the_weights_are(train: Training, model: Any) -> None:
    batches = Batches()
    train("climbed", {"ascent": Ascent(), "batches": batches})
    start = load_file(train.base / "model.safetensors")
    for step in batches.taken:
        for climb in (RATE / 10, RATE / 10, -RATE):
            step_loss(model, step).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight += climb * weight.grad
            model.zero_grad()
    assert_near(train.weights("climbed"), model, start)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "pairs"])
@pytest.mark.parametrize("carrier", [Full(), Lora(r=4, lora_dropout=0.2)], ids=["full", "lora"])
def test_looking_changes_nothing(carrier: TrainStrategy, form: str, train: Training) -> None:
    """The gradient is that of the step itself, dropout and all, and the training is that without a look."""
    looks, rows = Looks(), pairs(train.home / "p.jsonl") if form == "pairs" else train.data
    plain = train("plain", {"carrier": carrier}, data=rows)
    looked = train("looked", {"carrier": carrier, "looks": looks}, data=rows)
    assert looks.seen == STEPS
    assert train.bytes("looked") == train.bytes("plain")
    assert {**looked, "train_seconds": 0} == {**plain, "train_seconds": 0}


def test_refresh_is_a_climb_by_a_share_of_each_norm(train: Training, model: Any) -> None:
    """Then the ordinary step, at the weights so moved; delta 0 is plain training."""
    batches, delta = Batches(), 0.01
    train("refreshed", {"refresh": get_strategy("refresh", delta=delta), "batches": batches})
    start = load_file(train.base / "model.safetensors")
    for step in batches.taken:
        for climbs in (True, False):
            step_loss(model, step).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    climb = delta * weight.norm() / weight.grad.norm()
                    weight += (climb if climbs else -RATE) * weight.grad
            model.zero_grad()
    assert_near(train.weights("refreshed"), model, start)
    train("plain", {})
    train("still", {"refresh": get_strategy("refresh", delta=0.0)})
    assert train.bytes("still") == train.bytes("plain")


# The stage's number


@dataclass
class Counts(TrainStrategy):
    seen: list[int] = field(default_factory=list)

    def open(self, model: Any, memory: Path | None) -> Any:
        self.seen.append(self.stage)
        return model

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        self.seen.append(self.stage)
        return fresh


def test_hooks_know_the_stage(train: Training) -> None:
    counts = Counts()
    train("expert", {"counts": counts}, stage=3, max_steps=1)
    assert counts.seen == [3, 3]


def test_the_stage_is_no_parameter() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stage'"):
        get_strategy("replay", stage=2)
    assert Lora().stage == Replay().stage == 1


# Two ranks

RANKS = """
import sys
from pathlib import Path
from accelerate import PartialState
import peft, trl.trainer.sft_trainer
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch.distributed as dist
from test_hooks import SAVED, SHARED, Training, texts

home, base = map(Path, sys.argv[2:])
with PartialState(cpu=True).main_process_first():
    data = texts(home / "x.jsonl")
train = Training(home, base, data)
for name, parts in SHARED.items():
    train(name, parts(), per_device_train_batch_size=1)
train("whole", SHARED["rates"](), **SAVED, save_total_limit=2)
if dist.get_rank() == 0:
    (home / "broken-checkpoints").mkdir()
    (home / "whole-checkpoints" / "checkpoint-2").rename(home / "broken-checkpoints" / "checkpoint-2")
dist.barrier()
train("broken", SHARED["rates"](), **SAVED, save_total_limit=2)
"""
SHARED: dict[str, Callable[[], Parts]] = {
    "focus": lambda: {"focus": Focus()},
    "ascent": lambda: {"ascent": Ascent()},
    "rates": lambda: {"rates": Rates()},
    "refresh": lambda: {"refresh": get_strategy("refresh", delta=0.01)},
    "all": lambda: {"rates": Rates(), "ascent": Ascent(), "focus": Focus()},
}


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the experts that two ranks with half the batch have trained together."""
    home = tmp_path_factory.mktemp(request.param)
    (home / "ranks.py").write_text(RANKS)
    program = Path(sys.executable).with_name("torchrun" if request.param == "ddp" else "accelerate")
    config = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    words = (
        ["--standalone", "--nproc-per-node", "2", "--"]
        if request.param == "ddp"
        else ["launch", "--config_file", config, "--num_processes", "2"]
    )
    done = subprocess.run(
        [program, *words, home / "ranks.py", Path(__file__).parent, home, base_folder],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_with_half_the_batch_are_one(name: str, ranks: Path, train: Training) -> None:
    train(name, SHARED[name]())
    start, alone = load_file(train.base / "model.safetensors"), train.weights(name)
    together = load_file(ranks / name / "model.safetensors")
    for weight, tensor in alone.items():
        assert torch.dist(together[weight], tensor) <= 1e-4 * torch.dist(tensor, start[weight]), weight


@pytest.mark.slow
def test_two_ranks_with_rates_go_on(ranks: Path) -> None:
    """The optimizer's groups come back from a checkpoint."""
    one, other = (load_file(ranks / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
