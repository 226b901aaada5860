"""Strategies that keep new changes out of old directions: what OSF leaves alone, O-LoRA avoids, SLAO goes on in.

The loop below is the trainer's, without the trainer: gradients, the strategy, AdamW, the strategy.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import toy_llama, write_jsonl
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import Combined, TrainStrategy, get_strategy
from hf_contmerge.train_strategies.lora import trained_a
from hf_contmerge.train_strategies.osf import adaptive_shares, cosine, osf_layers
from hf_contmerge.train_strategies.slao import orthonormal_rows
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.settings import data_checks

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


@pytest.mark.parametrize(
    ("rank", "growth", "wanted"),
    [
        (0.5, 0.0, [10] * 6),
        (0.5, 0.1, [10, 12, 14, 16, 18, 19]),  # at most 0.95 of the rank of 20
        (4, 0.25, [4, 9, 14, 19, 19, 19]),
        (0.97, 0.1, [19] * 6),  # what the user asks for stays
        (20, 0.1, [20] * 6),
    ],
)
def test_osf_keeps_more_with_every_stage(rank: float, growth: float, wanted: list[int]) -> None:
    kept = []
    for stage in range(1, 7):
        strategy = get_strategy("osf", effective_rank=rank, growth=growth)
        Combined({"osf": strategy}).begin(stage)
        kept.append(strategy.kept(20))  # pyright: ignore
    assert kept == wanted


def test_osf_grows_in_training(base: Path) -> None:
    """Of layers of rank 16 and 32 half is kept in the first stage, and 0.7 in the third."""
    for stage, share in ((1, 0.5), (3, 0.7)):
        strategy = get_strategy("osf", growth=0.1)
        Combined({"osf": strategy}).begin(stage)
        with warnings.catch_warnings(action="error", category=RuntimeWarning):  # of ranks for layers that are none
            model = strategy.open(load(base), None)
        for layer in osf_layers(model):
            size = min(layer.base_layer.weight.shape)
            assert layer.osf_svd_params["default"]["U_low"].shape[1] == size - int(share * size)


def test_importance_is_the_cosine_of_input_and_output() -> None:
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]])
    torch.testing.assert_close(cosine(x, x), torch.ones(7))
    torch.testing.assert_close(cosine(x, x @ turn.T), torch.zeros(7))
    torch.testing.assert_close(cosine(x, torch.cat([x, 9 * x], 1)), torch.ones(7))  # cut to the shorter one


def test_adaptive_shares_are_the_papers() -> None:
    importance = {f"layer{i}": (0.01, 0.05, 0.3, 0.0)[i] for i in range(4)}
    shares = adaptive_shares(importance, 0.1, 0.8)
    assert shares == pytest.approx({n: 0.1 + 0.7 * i / 0.09 for n, i in importance.items()})
    strategy = get_strategy("osf", adaptive=True)
    kept = [strategy.kept(50, share) for share in shares.values()]  # pyright: ignore
    assert kept == [9, 24, 49, 5]  # the third asks for more than all, and keeps one direction free
    assert 4 * 50 * 0.1 <= sum(kept) <= 4 * 50


def test_importance_of_zero_keeps_the_constant(caplog: pytest.LogCaptureFixture) -> None:
    assert adaptive_shares({"a": 0.0, "b": 1e-9}, 0.1, 0.8) == {}
    assert "osf: no layer's importance is above zero, so that all keep the share effective_rank" in caplog.text
    caplog.clear()
    assert adaptive_shares({}, 0.1, 0.8) == {}  # the first stage
    assert not caplog.text


def test_adaptive_osf_keeps_what_mattered_to_the_stage_before(base: Path, tmp_path: Path) -> None:
    """Measured on the trained model of the first stage, here from the weights and the inputs of each layer."""
    first = get_strategy("osf", adaptive=True)
    model = learn(first, base, steps=3)
    examples = [batch(seed)[:1] for seed in range(4)]
    whole: list[int] = []

    def likelihoods(count: int) -> Iterator[tuple[torch.Tensor, int]]:
        whole.append(count)
        for ids in examples:
            output = model(input_ids=ids, labels=ids)
            yield -output.loss, ids.numel()

    first.review(model, likelihoods)
    memory = remembered(first, model, None, tmp_path / "first")
    closed = first.close(model)
    wanted: dict[str, list[torch.Tensor]] = {}
    linear = {n: m for n, m in closed.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for name, layer in linear.items():

        def note(layer: Any, inputs: Any, output: Any, name: str = name) -> None:
            x, y = inputs[0][0].double(), inputs[0][0].double() @ layer.weight.double().T
            size = min(*layer.weight.shape)
            cut = [torch.nn.functional.normalize(v[:, :size], dim=1) for v in (x, y)]
            wanted.setdefault(name, []).append((cut[0] * cut[1]).sum(1))

        layer.register_forward_hook(note)
    for ids in examples:
        closed(input_ids=ids)
    importance = {name: abs(float(torch.cat(cosines).mean())) for name, cosines in wanted.items()}
    found = load_file(memory / "importance.safetensors")
    assert {name: float(value) for name, value in found.items()} == pytest.approx(importance, abs=1e-6)
    second = get_strategy("osf", adaptive=True, mrr=0.2, trr=0.7)
    opened = second.open(load(base), memory).get_base_model()
    mean = sum(importance.values()) / len(importance)
    ranks = set()
    for name, value in importance.items():
        layer = opened.get_submodule(name)
        size = min(layer.base_layer.weight.shape)
        kept = size - layer.osf_svd_params["default"]["U_low"].shape[1]
        assert kept == min(max(round((0.2 + value / mean * 0.5) * size), 1), size - 1)
        ranks.add(kept / size)
    assert len(ranks) > 3


def test_osf_finds_nothing_to_train(base: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="osf finds no linear layer that peft can decompose"):
        get_strategy("osf").open(small, None)
    with pytest.raises(ValueError, match="osf keeps all directions of all layers, at effective_rank 99"):
        get_strategy("osf", effective_rank=99).open(load(base), None)


def test_osf_warns_of_a_high_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before any work, each rate once, with the stages that have it; the default of TRL is low enough."""
    stages = [{"name": name, "dataset": "x.jsonl"} for name in ("law", "code", "chat")]
    stages[1] = {**stages[1], "train": {"learning_rate": 1e-3}}
    path = write_jsonl(tmp_path / "osf-rates.jsonl", [{"text": f"the fox {i}"} for i in range(9)])
    data = dict.fromkeys(("law", "code", "chat"), load_stage_data(Dataset(path=str(path), heldout=2), seed=0))

    def warned(train: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
        caplog.clear()
        words = {"name": "x", "base_model": "b", "merge": ["average"], "stages": stages, "train": train}
        for check in data_checks(parse_recipe(words), data):
            check()
        return [record.getMessage() for record in caplog.records]

    high = warned({"strategy": "osf", "learning_rate": 5.1e-5}, stages)
    assert [line.partition(": osf moves")[0] for line in high] == [
        "train of law, chat: learning_rate 5.1e-05",
        "train of code: learning_rate 0.001",
    ]
    assert high[0].endswith("Use 1e-5 to 5e-05, and keep 0.7 to 0.8 (effective_rank).")
    assert warned({"strategy": ["osf", "replay"], "learning_rate": 5e-5}, stages[:1]) == []
    assert warned({"strategy": "osf"}, stages[:1]) == []
    assert warned({"strategy": "lora", "learning_rate": 1e-3}, stages) == []


def test_osf_ratios_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"osf's mrr must not be larger than its trr; got 0\.9 and 0\.8"):
        get_strategy("osf", mrr=0.9)
    with pytest.raises(ValueError, match=r"osf's growth must be less than 1; got 1\.5"):
        get_strategy("osf", growth=1.5)


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
