"""GPM: what linear maps compute on earlier inputs stays as it was."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.models import toy_mixture
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_contmerge.train_strategies import StageSize, combine
from hf_contmerge.train_strategies.gpm import Gpm, Seen, linear_maps

WIDTH, RANK = 24, 7


class Toy(nn.Module):
    """Two linear maps of one input, and one of their sum; the interface of a causal model."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.last = nn.Linear(width, 5)
        self.head = nn.Linear(5, 3)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.left(x) + self.right(x)))


def inputs(seed: int, *, rank: int = RANK, count: int = 40, width: int = WIDTH) -> Tensor:
    """Return rows in a subspace."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, generator=draw) @ torch.randn(rank, width, generator=draw)


def reading(model: Any, x: Tensor) -> Any:
    """Return the reader of a stage's examples that `review` takes."""

    def draw(count: int) -> Iterator[tuple[Tensor, int]]:
        yield model(x).sum(), len(x)

    return draw


def learn(strategy: Gpm, model: Any, x: Tensor, steps: int = 50) -> None:
    """Take steps of Adam, with weight decay, towards random outputs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    wanted = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        with torch.no_grad():
            strategy.adjust_gradients(model)
            optimizer.step()
            strategy.adjust_weights(model)


def stage(model: Any, x: Tensor, memory: Path | None, out: Path, **parameters: Any) -> Gpm:
    """Train a stage on some inputs, and remember them."""
    strategy = Gpm(**parameters)
    strategy.open(model, memory)
    learn(strategy, model, x)
    strategy.review(model, reading(model, x))
    out.mkdir()
    strategy.remember(model, None, memory, out)
    return strategy


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_outputs_on_earlier_inputs_stay(toy: Toy, tmp_path: Path) -> None:
    """By 1e-6 after 50 steps of Adam, over two later stages; on new inputs they change, and more than a little."""
    old = [inputs(1), inputs(2)]
    stage(toy, old[0], None, tmp_path / "1", energy=1.0)
    for number, x in ((2, old[1]), (3, inputs(3))):
        rows = torch.nn.functional.normalize(torch.cat([*old[: number - 1]]), dim=-1)
        before = [layer(rows).detach() for layer in (toy.left, toy.right)]
        bias = [layer.bias.detach().clone() for layer in (toy.left, toy.right)]
        new = toy.left(x).detach()
        stage(toy, x, tmp_path / f"{number - 1}", tmp_path / f"{number}", energy=1.0)
        for layer, earlier, start in zip((toy.left, toy.right), before, bias, strict=True):
            assert float((layer(rows) - layer.bias - (earlier - start)).abs().max()) <= 1e-6
        assert float((toy.left(x) - new).abs().max()) > 0.01


def test_first_stage_is_plain_training(toy: Toy) -> None:
    strategy = Gpm()
    strategy.open(toy, None)
    torch.manual_seed(0)
    plain = Toy()
    learn(strategy, toy, inputs(1), steps=5)
    learn(Gpm(), plain, inputs(1), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters(), plain.parameters(), strict=True))


def test_directions_are_those_of_the_inputs(toy: Toy, tmp_path: Path) -> None:
    """The maps that read one input share theirs; the head has none; the record has the share of each map in use."""
    x = inputs(1)
    stage(toy, x, None, tmp_path / "1", energy=1.0)
    about = json.loads((tmp_path / "1" / "directions.json").read_text())
    assert about["same"] == {"left": "left", "right": "left", "last": "last"}
    assert about["used"]["left"] == about["used"]["right"] == round(RANK / WIDTH, 4)
    again = Gpm()
    again.open(toy, tmp_path / "1")
    basis = again._bases["right"]
    assert basis is again._bases["left"]
    torch.testing.assert_close(x @ basis @ basis.T, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_as_many_directions_as_hold_the_energy(energy: float) -> None:
    """Of inputs of length 1, whatever their length was: one loud token is one token."""
    x = inputs(1, rank=WIDTH, count=200) * torch.logspace(0, -2, WIDTH)
    x[0] *= 1e6
    seen = Seen(WIDTH, 256, None)
    seen.add(x.view(4, 50, WIDTH))
    basis = seen.enlarged(energy, 256)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    values = torch.linalg.eigvalsh(unit.T @ unit).flip(0)
    wanted = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    assert basis.shape == (WIDTH, wanted)
    assert float((unit @ basis.double()).square().sum()) >= energy * len(unit)


def test_basis_stays_orthonormal_and_keeps_what_it_has() -> None:
    """Over 20 stages, up to the rank."""
    basis = None
    for number in range(20):
        seen = Seen(512, 32, basis)
        seen.add(inputs(number, rank=3, width=512))
        larger = seen.enlarged(1.0, 32)
        assert larger.shape[1] == min(3 * (number + 1), 32)
        assert float((larger.T @ larger - torch.eye(larger.shape[1])).abs().max()) < 1e-5
        if basis is not None:
            torch.testing.assert_close(larger @ (larger.T @ basis), basis, rtol=0, atol=1e-5)
        basis = larger


def test_sketch_of_a_wide_map_finds_its_directions() -> None:
    """300 channels, of which 2 * 20 random products are kept: 20 directions hold nearly what the best do."""
    x = inputs(1, rank=300, count=2000, width=300) * torch.logspace(0, -3, 300)
    seen = Seen(300, 20, None)
    for part in x.split(100):
        seen.add(part)
    assert seen._sketch.shape == (300, 40)
    basis = seen.enlarged(1.0, 20).double()
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    best = torch.linalg.eigvalsh(unit.T @ unit).flip(0)[:20].sum()
    assert float((unit @ basis).square().sum() / best) > 0.9


@pytest.mark.parametrize("rank", [4, 256], ids=["products", "whole moment"])
def test_inputs_are_added_in_float32_under_autocast(rank: int) -> None:
    """A trainer with `bf16` rounds products; wide maps ended in a mismatch of dtypes after the stage's training."""
    x, basis = inputs(1).bfloat16(), torch.linalg.qr(inputs(2).T)[0][:, :3]
    plain, mixed = (Seen(WIDTH, rank, basis) for _ in range(2))
    plain.add(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed.add(x)
    assert torch.equal(mixed._sketch, plain._sketch)
    assert torch.equal(mixed.enlarged(0.9, rank), plain.enlarged(0.9, rank))


def test_full_maps_are_warned_of_and_then_refused(toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stage(toy, inputs(1), None, tmp_path / "1", energy=1.0)
        assert not caplog.messages
        stage(toy, inputs(2, rank=WIDTH), tmp_path / "1", tmp_path / "2", energy=1.0)
    assert caplog.messages[0].startswith("gpm holds 100 % of the input directions of ")
    with pytest.raises(ValueError, match=r"^no direction is left in left and all other maps: earlier stages use"):
        Gpm().open(toy, tmp_path / "2")


def test_memory_of_another_model(toy: Toy, tmp_path: Path) -> None:
    stage(toy, inputs(1), None, tmp_path / "1")
    with pytest.raises(ValueError, match=r"safetensors has directions of width 24 for left, and the model 8;"):
        Gpm().open(Toy(8), tmp_path / "1")  # pyright: ignore[reportArgumentType]


def test_nothing_to_hold(base_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder).requires_grad_(False)
    with pytest.raises(ValueError, match="gpm finds no linear map that is trained"):
        Gpm().open(model, None)


def test_stacked_experts_are_warned_of_once(
    toy: Toy, tmp_path: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first stage, by name; a layer has maps of 3072 parameters in all, experts of 18432, a router of 128."""
    model: Any = AutoModelForCausalLM.from_pretrained(toy_mixture(tmp_path / "mixture", seed=0))
    Gpm().open(model, None)
    (line,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert line == (
        "gpm holds 8 linear maps and not model.layers.0.mlp.experts.down_proj and 5 more weights, which belong to no "
        "torch.nn.Linear: 86 % of the parameters of both change as in plain training."
    )
    caplog.clear()
    Gpm().open(AutoModelForCausalLM.from_pretrained(base_folder), None)
    stage(toy, inputs(1), None, tmp_path / "1")
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_memory_is_counted_by_shapes(toy: Toy) -> None:
    """W0 M and M of each map; on the disk, M."""
    strategies = combine(["full", "gpm"], {"gpm": {"rank": 4}})
    maps = linear_maps(toy).values()
    counted = sum(part.added_bytes(toy) for name, part in strategies.parts.items() if name == "gpm")
    assert counted == sum(4 * 4 * (m.in_features + m.out_features) for m in maps)
    widths = sum(m.in_features for m in maps)
    assert strategies.memory_bytes(StageSize(1, 10, 0, widths, 5, 100.0)) == 4 * 4 * widths


def test_memory_at_the_shapes_of_an_8b_model() -> None:
    """As docs/strategies.md has it; no value of a weight is needed."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert Gpm().added_bytes(model) == 2.5 * 2**30
    widths = sum(layer.in_features for layer in linear_maps(model).values())
    assert Gpm().memory_bytes(StageSize(2, 0, 0, widths, 1, 1.0)) / 2**30 == pytest.approx(1.19, abs=0.01)
