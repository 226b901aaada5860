"""Strategies that weight tokens: their formulas on a table, and a training by each against the same in plain torch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys.models import write_jsonl
from toys.trainings import ACCUMULATED, RATE, Batches, Parts, Row, Training, assert_near, step_loss, texts
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import Combined, get_strategy
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.settings import data_checks

NONE = math.nan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    return texts(tmp_path_factory.mktemp("weighted") / "x.jsonl")


@pytest.fixture
def train(base_folder: Path, data: StageData, tmp_path: Path) -> Training:
    return Training(tmp_path, base_folder, data)


# On a table


@pytest.mark.parametrize(
    ("name", "parameters", "p", "entropy", "weight"),
    [
        ("eaft", {}, 0.1, 0.0, 0.0),
        ("eaft", {}, 0.9, math.log(20) / 4, 0.25),
        ("eaft", {}, 0.9, math.log(20), 1.0),
        ("eaft", {}, 0.001, math.log(50_000), 1.0),
        ("low_perplexity", {}, 0.39, NONE, 0.0),
        ("low_perplexity", {}, 0.41, NONE, 1.0),
        ("low_perplexity", {"threshold": 0.0}, 1e-30, NONE, 1.0),
        ("talr", {}, 0.5, NONE, 1 / math.e),
        ("talr", {}, 0.01, NONE, 1 / math.e),
        ("talr", {"tau": 1.0}, 0.5, NONE, 0.5),
        ("talr", {"tau": 2.0}, 0.25, NONE, 0.5),
        ("talr", {"tau": 0.5}, 0.5, NONE, 0.25),
        ("talr", {"tau": 1.0}, 1e-6, NONE, 0.01),
        ("talr", {"tau": 1.0, "floor": 0.0}, 1e-6, NONE, 1e-6),
        ("asft", {}, 0.3, NONE, 0.3),
    ],
)
def test_weight_of_a_token(name: str, parameters: Row, p: float, entropy: float, weight: float) -> None:
    tokens = torch.tensor([[p]]).log(), torch.tensor([[entropy]]), torch.tensor([[False]]), torch.tensor([[True]])
    assert get_strategy(name, **parameters).token_weights(*tokens).item() == pytest.approx(weight, rel=1e-6)


def test_tau_is_the_median_of_the_texts_mean_losses() -> None:
    """Of the tokens that count; a text without any is none. One large loss does not move it."""
    losses = torch.tensor([[1.0, 3.0, 9.0], [4.0, 0.0, 0.0], [900.0, 900.0, 900.0], [7.0, 7.0, 7.0]])
    counts = torch.tensor([[True, True, False], [True, False, False], [True] * 3, [False] * 3])
    found = get_strategy("talr", floor=0.0).token_weights(-losses, losses, counts, counts)
    expected = torch.exp(-losses / 4.0)  # of 2, 4 and 900
    assert torch.allclose(found[counts], expected[counts])


@pytest.mark.parametrize("name", ["eaft", "talr", "low_perplexity", "asft"])
def test_weights_where_no_token_counts(name: str) -> None:
    """As in a block that is cut out of a prompt: its positions hold zeros, and the loss must stay 0."""
    zeros, none = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert not (get_strategy(name).token_weights(zeros, zeros, none, none) * zeros).any()


def test_weights_of_several_multiply() -> None:
    parts = {name: get_strategy(name, **({"tau": 1.0} if name == "talr" else {})) for name in
             ("eaft", "talr", "low_perplexity")}  # fmt: skip
    tokens = torch.tensor([[0.5, 0.2]]).log(), torch.full((1, 2), 1.0), torch.zeros(1, 2), torch.ones(1, 2)
    assert Combined(parts).token_weights(*tokens).tolist() == [[pytest.approx(0.5 / math.log(20)), 0.0]]


# In training


def test_a_stage_in_which_nothing_is_learnt_is_refused(train: Training) -> None:
    """Its expert would be its start."""
    parts = {name: get_strategy(name) for name in ("eaft", "low_perplexity")}  # to a random model, no token is likely
    with pytest.raises(DataError, match=r"zero in all 2 steps. The strategy eaft and low_perplexity gave no"):
        train("nothing", parts, max_steps=2)
    assert not list((train.home / "nothing").iterdir())


@pytest.mark.parametrize("name", [None, "eaft", "talr", "asft", "distill", "refresh", "migu"])
def test_micro_batches_without_tokens_that_count(name: str | None, train: Training, tmp_path: Path) -> None:
    """Blocks that are cut out of long prompts: steps of such blocks have the loss 0, and the expert is finite."""
    rows = [{"prompt": "the quick brown fox " * 8, "completion": f" the dog {i}"} for i in range(40)]
    data = load_stage_data(Dataset(path=str(write_jsonl(tmp_path / "x.jsonl", rows)), heldout=2), seed=0)
    blocks = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "per_device_train_batch_size": 1}
    parts = {name: get_strategy(name)} if name else {}
    record = train("expert", parts, data=data, **blocks, gradient_accumulation_steps=1, max_steps=6, learning_rate=1e-3)
    losses = [point["loss"] for point in record["log"] if "loss" in point]
    assert 0 in losses
    assert any(losses)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(tensor.isfinite().all() for tensor in train.weights("expert").values())


@pytest.mark.slow
def test_weights_of_one_are_plain_training(train: Training) -> None:
    """The same bytes: a random model is unsure of everything, and the others are told to weight nothing."""
    train("plain", {})
    ones = {"eaft": {}, "low_perplexity": {"threshold": 0.0}, "talr": {"tau": 1e12}}
    for name, parameters in ones.items():
        train(name, {name: get_strategy(name, **parameters)})
        assert train.bytes(name) == train.bytes("plain")


def dft(log_probs: Tensor, *_: Tensor) -> Tensor:
    return log_probs.exp()


Weigh = Callable[[Tensor, Tensor, Tensor], Any]
LITERAL: dict[str, tuple[Row, Weigh]] = {
    "eaft": ({}, lambda _, entropy, __: torch.minimum(entropy / math.log(20), torch.ones(()))),
    "talr": ({"tau": 4.0}, lambda log_probs, *_: (log_probs.exp() ** 0.25).clamp(min=0.01)),
    "low_perplexity": ({"threshold": 0.003}, lambda log_probs, *_: log_probs.exp() > 0.003),
    "asft": ({"strength": 0.0}, dft),
}


def trained_by_hand(folder: Path, batches: Batches, weigh: Weigh) -> Any:
    """Return a model after the same steps on the same micro-batches."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    for step in batches.taken:
        step_loss(model, step, weigh).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
        model.zero_grad()
    return model


SLOW = [
    pytest.param(name, packing, marks=[] if (name, packing) in (("eaft", True), ("asft", False)) else pytest.mark.slow)
    for name in LITERAL
    for packing in (False, True)
]


@pytest.mark.parametrize(("name", "packing"), SLOW)
def test_training_is_that_of_the_logits(name: str, packing: bool, train: Training) -> None:
    """Over two micro-batches a step, of which only the completions count."""
    parameters, weigh = LITERAL[name]
    batches, parts = Batches(), {name: get_strategy(name, **parameters)}
    train("expert", {**parts, "batches": batches}, packing=packing, max_length=64)
    assert all(len(step) == ACCUMULATED for step in batches.taken)
    assert any(("position_ids" in batch) == packing for step in batches.taken for batch in step)
    counted = torch.cat([batch["labels"].flatten() for step in batches.taken for batch in step]) != -100
    assert 0.1 < counted.float().mean() < 0.9
    start = load_file(train.base / "model.safetensors")
    assert_near(train.weights("expert"), trained_by_hand(train.base, batches, weigh), start)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "asft" else pytest.mark.slow) for n in LITERAL])
def test_accumulated_gradients_are_those_of_a_large_batch(name: str, train: Training) -> None:
    parameters, _ = LITERAL[name]
    parameters = {**parameters, **({"strength": 0.1} if name == "asft" else {})}
    start = load_file(train.base / "model.safetensors")
    for rows, times in ((4, 1), (1, 4)):
        parts: Parts = {name: get_strategy(name, **parameters)}
        train(f"{rows}", parts, per_device_train_batch_size=rows, gradient_accumulation_steps=times)
    one, other = train.weights("4"), train.weights("1")
    for weight, tensor in one.items():
        assert torch.dist(other[weight], tensor) <= 1e-3 * torch.dist(tensor, start[weight]) + 1e-6, weight


def test_dft_is_obeyed_and_is_asft_without_its_anchor(train: Training) -> None:
    """`loss_type: dft` weights each token by its probability, as TRL has it."""
    batches = Batches()
    record = train("dft", {"batches": batches}, loss_type="dft")
    plain = train("plain", {})
    start = load_file(train.base / "model.safetensors")
    assert_near(train.weights("dft"), trained_by_hand(train.base, batches, dft), start)
    assert record["log"][0]["loss"] < 0.1 * plain["log"][0]["loss"]
    train("asft", {"asft": get_strategy("asft", strength=0.0)})
    for name, tensor in train.weights("dft").items():
        torch.testing.assert_close(train.weights("asft")[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_smoothed_labels_next_to_dft_are_refused(train: Training) -> None:
    """TRL would leave them out."""
    fields = {"loss_type": "dft", "label_smoothing_factor": 0.1}
    stages = [{"name": "s", "dataset": "x.jsonl"}]
    recipe = parse_recipe({"name": "x", "base_model": "b", "merge": ["average"], "stages": stages, "train": fields})
    with pytest.raises(RecipeError, match=r"label_smoothing_factor has no effect on the loss of `loss_type: dft`\."):
        [check() for check in data_checks(recipe, {"s": train.data})]


def test_asft_stays_closer_to_the_base_than_dft(train: Training, tmp_path: Path) -> None:
    """Over 40 steps of Adam, the divergence pulls back; the teacher is the base."""
    fields: Row = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 40}
    start = load_file(train.base / "model.safetensors")
    far = {}
    for strength in (0.0, 10.0):
        train(f"{strength}", {"asft": get_strategy("asft", strength=strength)}, **fields)
        found = train.weights(f"{strength}")
        far[strength] = sum(float(torch.dist(found[name], start[name])) for name in start)
    assert far[10.0] < 0.7 * far[0.0]
