"""Soup: which weights are averaged by which coefficients, what equals plain training, what is refused."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.testing.course import texts_of, write_texts
from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.train_strategies.soup import Soup
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

Row = dict[str, Any]


def soup(**parameters: Any) -> Soup:
    made = get_strategy("soup", **parameters)
    assert isinstance(made, Soup)
    return made


def trajectory(steps: int) -> torch.Tensor:
    return torch.randn(steps + 1, 5, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)


def averaged(strategy: Soup, path: torch.Tensor) -> torch.Tensor:
    """Return what a strategy makes of weights that follow this path."""
    model = nn.Linear(5, 1, bias=False)
    model.weight.data[0] = path[0]
    strategy.open(model, None)  # pyright: ignore
    strategy.steps = len(path) - 1
    with torch.no_grad():
        for strategy.step in range(1, len(path)):
            model.weight[0] = path[strategy.step]
            strategy.adjust_weights(model)
        strategy.finish(model)
    return model.weight.detach()[0].double()


DECAYS = {
    "inverse_sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("steps", "window", "every"), [(12, 0.5, 1), (12, 1.0, 1), (13, 0.5, 3), (7, 0.01, 1)])
def test_a_decay_weighs_the_updates_as_a_falling_rate_would(decay: str, steps: int, window: float, every: int) -> None:
    """W = W_n + sum of w_i (W_i - W_(i-1)), with W_n the weights where the window begins."""
    path = trajectory(steps)
    kept = path[steps % every :: every] if every > 1 else path
    count = max(1, round(window * steps / every))
    tail = kept[-count - 1 :] if len(kept) > count else torch.cat([path[:1], kept])
    wanted = tail[0] + sum(DECAYS[decay]((i - 1) / count) * (tail[i] - tail[i - 1]) for i in range(1, count + 1))
    found = averaged(soup(decay=decay, window=window, every=every), path)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_default_is_inverse_sqrt_over_half_the_stage() -> None:
    path = trajectory(10)
    assert torch.equal(averaged(soup(), path), averaged(soup(decay="inverse_sqrt", window=0.5), path))


@pytest.mark.parametrize("beta", [0.3, 0.9, 0.999])
def test_exponential_average_does_not_depend_on_a_start(beta: float) -> None:
    path = trajectory(9)
    weights = torch.tensor([beta ** (9 - j) for j in range(1, 10)], dtype=torch.float64)
    wanted = (weights[:, None] * path[1:]).sum(0) / weights.sum()
    torch.testing.assert_close(averaged(soup(beta=beta), path), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("last", "every", "places"), [(3, 1, [8, 9, 10]), (3, 2, [6, 8, 10]), (99, 5, [5, 10])])
def test_last_weights(last: int, every: int, places: list[int]) -> None:
    path = trajectory(10)
    found = averaged(soup(last=last, every=every), path)
    torch.testing.assert_close(found, path[places].mean(0), rtol=1e-5, atol=1e-5)


def test_pull_goes_back_to_the_start_every_so_many_steps() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.fill_(1.0)
    strategy = soup(last=1, pull=0.25, pull_every=2)
    strategy.open(model, None)  # pyright: ignore
    strategy.steps, seen = 4, []
    with torch.no_grad():
        for strategy.step in range(1, 5):
            model.weight += 1.0
            strategy.adjust_weights(model)
            seen.append(model.weight[0, 0].item())
    assert seen == [2.0, 2.5, 3.5, 3.625]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{"beta": 0.0}, {"last": 1}, {"decay": "linear", "window": 0.01}])
def test_the_last_weights_alone_are_plain_training(parameters: Row, base_folder: Path, tmp_path: Path) -> None:
    data = texts_of(write_texts(tmp_path / "soup-plain.jsonl", 1))
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, "max_length": 32, "save_strategy": "no"}
    found = []
    for train in ({"strategy": "full"}, {"strategy": ["full", "soup"], "parameters": {"soup": parameters}}):
        out = tmp_path / f"expert-{len(found)}"
        out.mkdir()
        job = TrainJob(start=base_folder, base=base_folder, data=data, train=Train.model_validate({**fields, **train}))
        train_expert(job, out, checkpoints=tmp_path / "checkpoints")
        found.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"beta": 1.0}, "soup's beta must be less than 1; got 1.0"),
        ({"decay": "sqrt"}, "soup's decay must be 'inverse_sqrt', 'linear' or 'cosine'; got 'sqrt'"),
        ({"beta": 0.5, "last": 2}, "soup has beta and last, which set the same weights; keep one of them"),
        ({"last": 2, "window": 0.5}, "soup's window is for `decay`, and it has last; remove one of them"),
        ({"every": 0}, "soup's every must be greater than or equal to 1"),
    ],
)
def test_what_cannot_be(parameters: Row, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        get_strategy("soup", **parameters)
