"""Strategies that keep new changes out of old directions: what OSF leaves alone, O-LoRA avoids, SLAO goes on in.

The loop below is the trainer's, without the trainer: gradients, the strategy, AdamW, the strategy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.train_strategies import TrainStrategy, get_strategy
from hf_contmerge.train_strategies.lora import trained_a
from hf_contmerge.train_strategies.osf import osf_layers
from hf_contmerge.train_strategies.slao import orthonormal_rows

STEPS = 20
RANK = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights have singular values that differ."""
    return toy_llama(tmp_path_factory.mktemp("base") / "base", seed=3)


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def batch(seed: int) -> torch.Tensor:
    return torch.randint(0, 384, (4, 16), generator=torch.Generator().manual_seed(seed))


def learn(strategy: TrainStrategy, base: Path, memory: Path | None = None, *, steps: int = STEPS) -> Any:
    """Return what a strategy has trained on random tokens, before it is closed."""
    torch.manual_seed(0)
    model = strategy.open(load(base), memory)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        with torch.no_grad():
            strategy.adjust_gradients(model)
            optimizer.step()
            strategy.adjust_weights(model)
        optimizer.zero_grad()
    return model


def remembered(strategy: TrainStrategy, model: Any, memory: Path | None, out: Path) -> Path:
    out.mkdir()
    strategy.remember(model, None, memory, out)
    return out


# OSF


def kept_parts(model: Any, base: Path) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each layer with its weight at the start (m, n), and the U (m, k) and V (k, n) to keep; in float64."""
    start = load(base).state_dict()
    for name, layer in model.get_base_model().named_modules():
        if layer in set(osf_layers(model)):
            weight = start[f"{name}.weight"].double()
            u, _, v = torch.linalg.svd(weight, full_matrices=False)
            kept = min(weight.shape) // 2
            yield layer, weight, u[:, :kept], v[:kept]


@pytest.mark.parametrize("project", [True, False])
def test_osf_leaves_what_it_keeps(project: bool, base: Path) -> None:
    """With its projection to rounding; with projected gradients alone, Adam turns a good part of the change into it."""
    model = learn(get_strategy("osf", project=project), base)
    factors, sides, corner = [], [], []
    for layer, weight, u, v in kept_parts(model, base):
        low = {n: p.detach().double() for n, p in layer.osf_svd_params["default"].items()}
        factors += [(u.T @ low["U_low"]).norm(2), (low["V_low"] @ v.T).norm(2)]
        change = layer.base_layer.weight.double() + layer.get_delta_weight("default").detach().double() - weight
        sides += [(u.T @ change).norm() / change.norm(), (change @ v.T).norm() / change.norm()]
        corner.append((u.T @ change @ v.T).norm() / change.norm())
    found = [float(torch.stack(x).max()) for x in (factors, sides, corner)]
    print(f"project={project}: |U_high' U_low|, |V_low V_high'| {found[0]:.1e}; "
          f"|U_high' dW|, |dW V_high'| {found[1]:.1e}; |U_high' dW V_high'| {found[2]:.1e} of |dW|")  # fmt: skip
    if project:
        assert found[0] < 1e-5
        assert found[1] < 1e-4
    else:
        assert found[0] > 1e-2
        assert found[1] > 1e-2
        assert found[2] > 1e-4


def test_osf_folds_in_what_it_has_trained(base: Path) -> None:
    strategy = get_strategy("osf", effective_rank=5)
    model = learn(strategy, base, steps=3)
    tokens = batch(99)
    before = model(input_ids=tokens).logits
    closed = strategy.close(model)
    torch.testing.assert_close(closed(input_ids=tokens).logits, before, rtol=0, atol=1e-5)
    assert closed.state_dict().keys() == load(base).state_dict().keys()


def test_osf_finds_the_same_parts_again(base: Path) -> None:
    """Signs and all, so that training goes on from a checkpoint where it was; and they are those of the start."""
    one, other = (get_strategy("osf").open(load(base), None) for _ in range(2))
    for a, b in zip(osf_layers(one), osf_layers(other), strict=True):
        for name, buffer in a.named_buffers():
            assert torch.equal(buffer, dict(b.named_buffers())[name])
    tokens = batch(1)
    torch.testing.assert_close(one(input_ids=tokens).logits, load(base)(input_ids=tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 0.0, 1.0, -3])
def test_osf_rank_that_cannot_be(rank: float) -> None:
    with pytest.raises(ValueError, match="osf's effective_rank must be a number of directions from 1 on"):
        get_strategy("osf", effective_rank=rank)


# O-LoRA


def overlap(model: Any, old: dict[str, torch.Tensor]) -> float:
    """Return the mean |cosine| between a row of an old A and a row of a new one."""
    cosines = [
        torch.nn.functional.normalize(old[name]) @ torch.nn.functional.normalize(a.detach()).T
        for name, a in trained_a(model)
    ]
    return float(torch.cat([c.abs().flatten() for c in cosines]).mean())


def test_olora_turns_away_from_earlier_stages(base: Path, tmp_path: Path) -> None:
    first = get_strategy("olora", **RANK)
    memory = remembered(first, learn(first, base), None, tmp_path / "first")
    old = load_file(memory / "a.safetensors")
    found = {
        strength: overlap(learn(get_strategy("olora", strength=strength, **RANK), base, memory, steps=60), old)
        for strength in (0.0, 0.5)
    }
    print(f"mean |cos(A_old, A)|: {found[0.0]:.4f} without the penalty, {found[0.5]:.4f} with it")
    assert found[0.5] < 0.2 * found[0.0]


def test_olora_pull_is_the_gradient_of_its_penalty(base: Path, tmp_path: Path) -> None:
    first = get_strategy("olora", **RANK)
    memory = remembered(first, learn(first, base, steps=1), None, tmp_path / "first")
    second = get_strategy("olora", strength=0.25, **RANK)
    model = second.open(load(base), memory)
    old = load_file(memory / "a.safetensors")
    penalty = 0.25 * torch.stack([(old[name] @ a.T).abs().sum() for name, a in trained_a(model)]).sum()
    wanted = torch.autograd.grad(penalty, [a for _, a in trained_a(model)])
    for _, a in trained_a(model):
        a.grad = torch.zeros_like(a)
    with torch.no_grad():
        second.adjust_gradients(model)
    for (_, a), gradient in zip(trained_a(model), wanted, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(a.grad, gradient, rtol=1e-5, atol=1e-6)


def test_olora_remembers_every_stage(base: Path, tmp_path: Path) -> None:
    memory, models = None, []
    for i in range(3):
        strategy = get_strategy("olora", **RANK)
        models.append(learn(strategy, base, memory, steps=1))
        memory = remembered(strategy, models[-1], memory, tmp_path / str(i))
    assert memory
    for name, rows in load_file(memory / "a.safetensors").items():
        assert torch.equal(rows, torch.cat([dict(trained_a(m))[name].detach() for m in models]))


def test_olora_without_a_past_or_a_penalty_is_lora(base: Path, tmp_path: Path) -> None:
    plain = learn(get_strategy("lora", **RANK), base).state_dict()
    first = get_strategy("olora", **RANK)
    alone = learn(first, base)
    assert all(torch.equal(t, plain[n]) for n, t in alone.state_dict().items())
    memory = remembered(first, alone, None, tmp_path / "first")
    free = get_strategy("olora", strength=0.0, **RANK)
    model = learn(free, base, memory, steps=1)
    gradients = [torch.randn_like(a) for _, a in trained_a(model)]
    for (_, a), gradient in zip(trained_a(model), gradients, strict=True):
        a.grad = gradient.clone()
    with torch.no_grad():
        free.adjust_gradients(model)
    for (_, a), gradient in zip(trained_a(model), gradients, strict=True):
        torch.testing.assert_close(a.grad, gradient, rtol=0, atol=0)


def test_olora_starts_each_stage_elsewhere(base: Path, tmp_path: Path) -> None:
    """All stages have one seed, and an A that starts where an old one did would be as far from orthogonal as can be."""
    first = get_strategy("olora", **RANK)
    memory = remembered(first, learn(first, base, steps=0), None, tmp_path / "first")
    torch.manual_seed(0)
    starts = [get_strategy("olora", **RANK).open(load(base), memory) for _ in range(2)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*map(trained_a, starts), strict=True))
    assert overlap(starts[0], load_file(memory / "a.safetensors")) < 0.25


# SLAO


def test_slao_starts_in_the_directions_of_the_last_stage(base: Path, tmp_path: Path) -> None:
    first = get_strategy("slao", **RANK)
    trained = learn(first, base)
    memory = remembered(first, trained, None, tmp_path / "first")
    second = get_strategy("slao", **RANK)
    model = second.open(load(base), memory)
    for name, a in trained_a(model):
        last, a = dict(trained_a(trained))[name].detach().double(), a.detach().double()
        torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=a.dtype), rtol=0, atol=1e-6)
        torch.testing.assert_close(last @ a.T @ a, last, rtol=0, atol=1e-6)  # the same row space
        assert (torch.linalg.diagonal(last @ a.T) > 0).all()  # R's
    tokens = batch(5)
    assert torch.equal(model(input_ids=tokens).logits, load(base)(input_ids=tokens).logits)


def test_slao_first_stage_is_lora(base: Path) -> None:
    plain = learn(get_strategy("lora", **RANK), base).state_dict()
    assert all(torch.equal(t, plain[n]) for n, t in learn(get_strategy("slao", **RANK), base).state_dict().items())


def test_orthonormal_rows_do_not_depend_on_signs() -> None:
    """Turning the sign of a row of A turns that of one row of the basis, and no other."""
    a = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    flipped = a * torch.tensor([[1.0], [-1.0], [1.0]])
    torch.testing.assert_close(orthonormal_rows(flipped), orthonormal_rows(a) * torch.tensor([[1.0], [-1.0], [1.0]]))


@pytest.mark.parametrize("name", ["olora", "slao"])
def test_folded_strategies_keep_no_adapter(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} folds each stage's LoRA into the model"):
        get_strategy(name, keep=True)


def test_negative_strength() -> None:
    with pytest.raises(ValueError, match="olora's strength must not be negative; got -1"):
        get_strategy("olora", strength=-1.0)
