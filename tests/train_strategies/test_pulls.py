"""What anchor, ewc, distill and migu do to a step, against the same computed as literally as their papers have it."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.models import toy_tokenizer, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies import Combined, combine, distill
from hf_contmerge.train_strategies.anchor import Anchor
from hf_contmerge.train_strategies.distill import Distill
from hf_contmerge.train_strategies.ewc import Ewc, size_of
from hf_contmerge.train_strategies.migu import Migu
from hf_contmerge.train_strategies.replay import Replay
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

RATE = 1e-3
LIGHT = {
    "per_device_train_batch_size": 4, "max_steps": 6, "max_length": 32, "learning_rate": RATE, "logging_steps": 1,
    "lr_scheduler_type": "constant", "save_strategy": "no", "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    draw, words = random.Random(0), ["a", "court", "may", "refuse", "the", "claim", "of", "party"]
    rows = [{"text": " ".join(draw.choices(words, k=20))} for _ in range(12)]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "x.jsonl", rows)
    return load_stage_data(Dataset(path=str(path), heldout=2), seed=0)


@pytest.fixture
def train(base_folder: Path, data: StageData, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Return a function that trains an expert in `tmp_path/<name>` and returns its weights."""

    def train(
        name: str,
        strategy: str | list[str],
        parameters: dict[str, Any] | None = None,
        *,
        memory: Path | None = None,
        **fields: Any,
    ) -> dict[str, Tensor]:
        (tmp_path / name).mkdir()
        train_expert(
            TrainJob(
                start=base_folder,
                base=base_folder,
                data=data,
                seed=0,
                train=Train(**{**LIGHT, "strategy": strategy, "parameters": parameters or {}, **fields}),
                memory=memory,
            ),
            tmp_path / name,
            checkpoints=tmp_path / f"{name}-checkpoints",
            memory_out=tmp_path / f"{name}-memory",
        )
        return load_file(tmp_path / name / "model.safetensors")

    return train


@pytest.fixture
def model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder)


def moved(model: nn.Module, *, size: float = 0.01) -> dict[str, Tensor]:
    """Move all weights and give each a gradient, as in the middle of training; return the gradients."""
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += size * torch.randn(weight.shape, generator=draw)
        weight.grad = torch.randn(weight.shape, generator=draw)
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def added(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.grad - before[n] for n, w in model.named_parameters() if w.grad is not None}


def batch(*, rows: int = 3, length: int = 20) -> dict[str, Tensor]:
    """Return texts of which the last ones are padded, as the collator does it."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 384, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# What must change nothing


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [("ewc", {"importance": "mas"}), ("gpm", {"energy": 0.5}), ("osf", {"adaptive": True})],
)
def test_padding_is_no_data(
    strategy: str, parameters: dict[str, Any], packing: bool, train: Callable[..., Any], tmp_path: Path
) -> None:
    """What is remembered of texts of some 20 tokens does not depend on what fills them up to 256."""
    still = {"learning_rate": 0.0, "max_steps": 1, "packing": packing}
    for name, fields in (("plain", {}), ("padded", {"pad_to_multiple_of": 256})):
        train(name, strategy, {strategy: parameters}, **still, **fields)
    found, wanted = (
        load_file(next((tmp_path / f"{name}-memory" / strategy).glob("*.safetensors"))) for name in ("padded", "plain")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [("anchor", {"strength": 0.0}), ("ewc", {"strength": 0.0}), ("distill", {"strength": 0.0}),
     ("migu", {"fraction": 1.0})],
)  # fmt: skip
def test_strength_zero_is_plain_training(
    strategy: str, parameters: dict[str, Any], train: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    plain = train("plain", "full")
    if strategy == "ewc":
        train("before", strategy)
    memory = tmp_path / "before-memory"
    found = train("found", strategy, parameters, memory=memory if memory.exists() else None)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7 if strategy == "distill" else 0)


def test_the_listed_order_changes_nothing(
    train: Callable[..., dict[str, Tensor]], base_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Penalties come before what is projected and masked, and averages last: held directions stay as they were."""
    names = ["anchor", "gpm", "soup", "migu"]
    parameters = {"anchor": {"modules": ".", "strength": 10.0}, "soup": {"last": 2}}
    train("before", ["full", *names], parameters)
    memory = tmp_path / "before-memory"
    one, other = (
        train(name, ["full", *order], parameters, memory=memory)
        for name, order in (("one", names), ("other", names[::-1]))
    )
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    directions = load_file(memory / "gpm" / "directions.safetensors")
    start = load_file(base_folder / "model.safetensors")
    for layer, same in json.loads((memory / "gpm" / "directions.json").read_text())["same"].items():
        change = one[f"{layer}.weight"] - start[f"{layer}.weight"]
        assert float((change @ directions[same]).norm() / change.norm()) < 1e-5


# Anchor


def test_anchor_adds_the_gradient_of_its_penalty(model: Any) -> None:
    strategy = Anchor(strength=0.3, modules=["q_proj", "mlp.down"])
    strategy.open(model, None)
    start = {n: w.detach().clone() for n, w in model.named_parameters()}
    before = moved(model)
    strategy.adjust_gradients(model)
    chosen = {n: w for n, w in model.named_parameters() if "q_proj" in n or "mlp.down" in n}
    penalty = 0.3 * sum((w - start[n]).pow(2).sum() for n, w in chosen.items())
    wanted = dict(zip(chosen, torch.autograd.grad(penalty, list(chosen.values())), strict=True))
    for name, tensor in added(model, before).items():
        torch.testing.assert_close(tensor, wanted.get(name, torch.zeros_like(tensor)), rtol=1e-4, atol=1e-6)


def test_anchor_holds_the_attention_unless_told(model: Any) -> None:
    before = [n for n, _ in model.named_parameters()]
    for modules, held in ((None, lambda n: "self_attn" in n), (".", lambda n: True), ("norm", lambda n: "norm" in n)):
        strategy = Anchor(modules=modules) if modules else Anchor()
        strategy.open(model, None)
        assert strategy._start
        assert list(strategy._start.weights) == [n for n in before if held(n)]


def test_anchor_on_nothing(train: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        train("x", "anchor", {"modules": "atn"})
    assert str(caught.value) == (
        "train.parameters: anchor's modules 'atn' is in no weight's name; the names are model.embed_tokens.weight, "
        "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, ... (strategy anchor)"
    )


def test_a_strong_anchor_keeps_the_weights_within_a_few_steps(
    train: Callable[..., dict[str, Tensor]], base_folder: Path
) -> None:
    """Adam's steps are about as long as the learning rate, whatever the gradient: near the start, not at it."""
    start = load_file(base_folder / "model.safetensors")
    held, free = (
        train(f"held{strength:g}", "anchor", {"strength": strength, "modules": "."}, max_steps=30)
        for strength in (1e6, 0.0)
    )
    far, farther = (max(float((e[n] - w).abs().max()) for n, w in start.items()) for e in (held, free))
    assert 0 < far < 2 * RATE
    assert farther > 10 * RATE


# EWC


def log_likelihood(model: Any, text: str, *, length: int) -> tuple[Tensor, int]:
    """Return the sum over the tokens after the first, and their number, of a text as the trainer cuts and ends it."""
    tokenizer = toy_tokenizer()
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:length]])
    logs = model(ids).logits.log_softmax(-1)[0, :-1]
    return logs.gather(1, ids[0, 1:, None]).sum(), ids.shape[1] - 1


@pytest.fixture
def fisher(model: Any, data: StageData) -> dict[str, Tensor]:
    """The diagonal, example by example, at the base's weights."""
    sums, count = {n: torch.zeros_like(w) for n, w in model.named_parameters()}, 0
    for row in data.train.to_list():
        model.zero_grad()
        likelihood, tokens = log_likelihood(model, row["text"], length=32)
        likelihood.backward()
        count += tokens
        for name, weight in model.named_parameters():
            sums[name] += weight.grad**2
    return {n: s / count for n, s in sums.items()}


def test_fisher_is_that_of_a_loop_by_hand(
    train: Callable[..., Any], fisher: dict[str, Tensor], tmp_path: Path
) -> None:  # fmt: skip
    """And the running one is the old times gamma plus the new: here, of the same weights and examples."""
    still = {"learning_rate": 0.0, "max_steps": 1, "packing": False}
    train("one", "ewc", {"gamma": 0.5}, **still)
    train("two", "ewc", {"gamma": 0.5}, memory=tmp_path / "one-memory", **still)
    first, second = (load_file(tmp_path / f"{n}-memory" / "ewc" / "fisher.safetensors") for n in ("one", "two"))
    assert first.keys() == second.keys() == fisher.keys()
    for name, wanted in fisher.items():
        torch.testing.assert_close(first[name], wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))
        torch.testing.assert_close(second[name], 1.5 * first[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("strategy", "parameters"), [("ewc", {}), ("gpm", {}), ("osf", {"adaptive": True})])
def test_examples_of_others_are_not_reviewed(
    strategy: str, parameters: dict[str, Any], packing: bool, train: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    """With as many replayed examples as new ones among them, the memory is the one of the stage's own."""
    old = datasets.Dataset.from_list([{"text": f"the nurse gives {i} tablets"} for i in range(10)])
    (tmp_path / "earlier" / "replay").mkdir(parents=True)
    Replay().remember(model, old, None, tmp_path / "earlier" / "replay")
    still = {"learning_rate": 0.0, "max_steps": 1, "packing": packing}
    train("alone", [strategy], {strategy: parameters}, **still)
    both = {strategy: parameters, "replay": {"share": 0.5}}
    train("mixed", [strategy, "replay"], both, memory=tmp_path / "earlier", **still)
    found, wanted = (
        load_file(next((tmp_path / f"{name}-memory" / strategy).glob("*.safetensors"))) for name in ("mixed", "alone")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_mas_is_that_of_a_loop_by_hand(
    train: Callable[..., Any], model: Any, data: StageData, tmp_path: Path
) -> None:  # fmt: skip
    """|gradient of an example's sum of mean squared logits|, over all tokens, without a look at the labels."""
    train("one", "ewc", {"importance": "mas"}, learning_rate=0.0, max_steps=1, packing=False)
    found = load_file(tmp_path / "one-memory" / "ewc" / "fisher.safetensors")
    sums, count, tokenizer = {n: torch.zeros_like(w) for n, w in model.named_parameters()}, 0, toy_tokenizer()
    for row in data.train.to_list():
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id][:32]])
        model.zero_grad()
        model(ids).logits.square().mean(-1).sum().backward()
        count += ids.shape[1]
        for name, weight in model.named_parameters():
            sums[name] += weight.grad.abs()
    for name, wanted in sums.items():
        torch.testing.assert_close(found[name], wanted / count, rtol=1e-3, atol=1e-5 * float(wanted.max() / count))


def test_mas_of_a_linear_model_is_twice_the_output_times_the_input() -> None:
    """|2 W x x'|, over the outputs."""
    head, x = nn.Linear(4, 3, bias=False), torch.randn(1, 4)
    (found,) = torch.autograd.grad(size_of(head, x), [head.weight])
    torch.testing.assert_close(found, 2 * (head.weight @ x.T) @ x / 3)


def test_ewc_adds_the_gradient_of_its_penalty(model: Any, fisher: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(fisher, tmp_path / "fisher.safetensors")
    strategy = Ewc(strength=7.0)
    strategy.open(model, tmp_path)
    start = {n: w.detach().clone() for n, w in model.named_parameters()}
    before = moved(model)
    strategy.adjust_gradients(model)
    weights = dict(model.named_parameters())
    penalty = 7.0 / 2 * sum((fisher[n] * (w - start[n]).pow(2)).sum() for n, w in weights.items())
    wanted = dict(zip(weights, torch.autograd.grad(penalty, list(weights.values())), strict=True))
    for name, tensor in added(model, before).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-6)


def test_fisher_of_another_model(train: Callable[..., Any], fisher: dict[str, Tensor], tmp_path: Path) -> None:
    memory = tmp_path / "memory" / "ewc"
    memory.mkdir(parents=True)
    save_file({**fisher, "model.norm.weight": torch.ones(5)}, memory / "fisher.safetensors")
    with pytest.raises(RecipeError) as caught:
        train("x", "ewc", memory=memory.parent)
    assert str(caught.value) == (
        f"train.parameters: {memory}/fisher.safetensors has (5,) for model.norm.weight, and the model (32,); train the "
        "earlier stages again (strategy ewc)"
    )


# Distill


@pytest.mark.parametrize("carrier", ["full", "lora"])
def test_distill_is_the_dense_divergence(
    carrier: str, model: Any, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient, over the tokens that count, with chunks that do not divide their number."""
    monkeypatch.setattr(distill, "_LOGITS", 7 * model.config.vocab_size)
    strategies = combine([carrier, "distill"], {"distill": {"strength": 0.5, "temperature": 3.0}})
    opened, inputs = strategies.open(model, None), batch()
    for i, weight in enumerate(w for w in opened.parameters() if w.requires_grad):
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    dense = opened(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    teacher = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        taught = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    p, log_p, log_q = (taught / 3).softmax(-1), (taught / 3).log_softmax(-1), (dense / 3).log_softmax(-1)
    counts = inputs["labels"][:, 1:] != -100
    wanted = 0.5 * 9 * (p * (log_p - log_q)).sum(-1)[:, :-1][counts].sum()
    add_fused_lm_head(model)
    opened(**inputs, use_cache=False, fused_lm_head=True)
    found = strategies.loss(opened, inputs)
    assert found is not None
    assert wanted > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    trained = [w for w in opened.parameters() if w.requires_grad]
    for a, b in zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * float(b.abs().max()))


def test_teacher_of_a_lora_has_no_weights_of_its_own(model: Any) -> None:
    strategies = combine(["lora", "distill"], {})
    opened = strategies.open(model, None)
    strategy = strategies.parts["distill"]
    assert isinstance(strategy, Distill)
    ours, own = (
        {w.data_ptr() for w in opened.parameters()},
        {w.data_ptr(): w.numel() for w in strategy._teachers[0].parameters()},
    )
    assert sum(n for p, n in own.items() if p not in ours) == sum(
        w.numel() for w in opened.parameters() if w.requires_grad
    )


@pytest.mark.parametrize(("teacher", "weight_of_base"), [("start", 0.0), ("base", 1.0), ("both", 0.5)])
def test_distill_has_the_mean_divergence_of_its_teachers(
    teacher: str, weight_of_base: float, model: Any, base_folder: Path
) -> None:
    """The base comes from its own folder, whatever the stage starts from."""
    base, inputs = AutoModelForCausalLM.from_pretrained(base_folder), batch()
    strategies = combine(["full", "distill"], {"distill": {"teacher": teacher, "temperature": 1.0}})
    strategies.begin(2, base_folder)
    moved(model)
    start = copy.deepcopy(model)
    strategies.open(model, None)
    moved(model)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    counts = inputs["labels"][:, 1:] != -100
    with torch.no_grad():
        p, q, r = (m(**ids).logits.log_softmax(-1)[:, :-1][counts] for m in (start, base, model))
    of_start, of_base = ((t.exp() * (t - r)).sum() for t in (p, q))
    model(**inputs, use_cache=False)
    found = strategies.loss(model, inputs)
    torch.testing.assert_close(found, (1 - weight_of_base) * of_start + weight_of_base * of_base, rtol=1e-4, atol=0)
    assert strategies.bytes_per_parameter == 16 + (8 if teacher == "both" else 4)


def test_distill_of_scaled_logits_is_refused() -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    told = "cannot work with GraniteForCausalLM, which caps or scales its logits"
    with pytest.raises(ValueError, match=told):
        Distill().open(GraniteForCausalLM(config), None)
    with torch.device("meta"):
        model = GraniteForCausalLM(config)
    with pytest.raises(ValueError, match=told):
        combine(["full", "distill"], {}).try_open(model)


# MIGU


def linears(model: Any) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def test_migu_masks_all_but_the_loudest_rows(model: Any) -> None:
    """Over two micro-batches, without their padding; each token's output is divided by its sum of absolute values."""
    loud = {name: torch.zeros(layer.out_features) for name, layer in linears(model).items()}
    batches = [batch(), batch(rows=2, length=7)]

    def listen(name: str, mask: Tensor) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            for said in output[mask == 1].detach():
                loud[name] += said.abs() / said.abs().sum()

        return hook

    for inputs in batches:
        handles = [m.register_forward_hook(listen(n, inputs["attention_mask"])) for n, m in linears(model).items()]
        model(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
    plain = {n: w.grad.clone() for n, w in model.named_parameters()}
    model.zero_grad()
    strategy = Migu(fraction=0.25)
    strategy.open(model.train(), None)
    same = {"input_ids": torch.full((4, 50), 7), "labels": torch.full((4, 50), 7)}
    for step in ([same], batches):  # what was said before a step does not count in the next
        model.zero_grad()
        for inputs in step:
            model(**inputs).loss.backward()
        strategy.adjust_gradients(model)
    for name, weight in model.named_parameters():
        layer, wanted = name.removesuffix(".weight"), plain[name]
        if layer in loud:
            quiet = loud[layer].argsort()[: -len(wanted) // 4]
            wanted = wanted.index_fill(0, quiet, 0)
            assert len(quiet) == 3 * len(wanted) // 4
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-7)


def test_rows_that_are_not_chosen_stay_as_they_are(train: Callable[..., dict[str, Tensor]], base_folder: Path) -> None:
    """Bit for bit, in one step without weight decay; a tenth of 32 rows is 3."""
    start = load_file(base_folder / "model.safetensors")
    expert = train("expert", "migu", {"fraction": 0.1}, max_steps=1, weight_decay=0.0)
    for name, tensor in start.items():
        rows = (expert[name] != tensor).any(-1)
        if "proj" in name:
            assert int(rows.sum()) == round(0.1 * len(tensor)), name
        else:
            assert rows.any()


@pytest.mark.parametrize("blocks", [False, True], ids=["mask", "positions"])
def test_migu_counts_no_padding(blocks: bool) -> None:
    """Of a mixture, whose shared experts get all tokens in one row; and of blocks, which have positions and no mask."""
    config = Qwen2MoeConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, num_experts=4, moe_intermediate_size=8,
        shared_expert_intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(config).train()
    strategy, ids = Migu(), torch.randint(5, 384, (1, 12))
    strategy.open(model, None)
    assert sum("shared_expert" in name for name, m in model.named_modules() if m in strategy._sums) == 4
    wanted, found = [], []
    for sums, length in ((wanted, 7), (found, 12)):
        positions, real = torch.arange(12) * (torch.arange(12) < 7), (torch.arange(12) < 7).long()
        told = {"position_ids": positions[None, :length]} if blocks else {"attention_mask": real[None, :length]}
        model(input_ids=ids[:, :length], use_cache=False, **told)
        sums += strategy._sums.values()
        strategy.adjust_gradients(model)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_momentum_moves_rows_that_are_not_chosen_any_more(model: Any) -> None:
    """As in the paper only gradients are masked, so that a part of Adam's steps goes elsewhere; but a small part."""
    strategy, optimizer = Migu(fraction=0.3), torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    strategy.open(model.train(), None)
    elsewhere = whole = 0.0
    for seed in range(10):
        ids = torch.randint(5, 384, (2, 16), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        strategy.adjust_gradients(model)
        before = {layer: layer.weight.detach().clone() for layer in linears(model).values()}
        optimizer.step()
        for layer, weight in before.items():
            steps = (layer.weight.detach() - weight).pow(2).sum(1)
            assert layer.weight.grad is not None
            elsewhere += float(steps[(layer.weight.grad == 0).all(1)].sum())
            whole += float(steps.sum())
    assert 0 < elsewhere / whole < 0.5


def lora_with_migu(model: Any, fraction: float) -> tuple[Combined, Any, dict[str, Any]]:
    """Return both strategies, what they train, and the adapted layers."""
    strategies = combine(["lora", "migu"], {"lora": {"r": 8}, "migu": {"fraction": fraction}})
    torch.manual_seed(0)
    opened = strategies.open(model, None).train()
    return strategies, opened, {n: m for n, m in opened.named_modules() if isinstance(m, LoraLayer)}


def tokens(seed: int) -> Tensor:
    return torch.randint(5, 384, (2, 16), generator=torch.Generator().manual_seed(seed))


def test_migu_chooses_the_rows_of_b_by_the_whole_layer(model: Any) -> None:
    """As the authors do: A by its own output; B by W x + B A x, since B x is zero at first and has no largest row."""
    strategies, opened, layers = lora_with_migu(model, 0.25)
    watched = {(n, m): layer if m == "lora_B" else layer.lora_A["default"]
               for n, layer in layers.items() for m in ("lora_A", "lora_B")}  # fmt: skip
    loud: dict[Any, Tensor] = {}

    def listen(key: Any) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            size = output.detach().abs()
            loud[key] = (size / size.sum(-1, keepdim=True)).mean((0, 1))

        return hook

    for key, module in watched.items():
        module.register_forward_hook(listen(key))
    opened(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    for layer in layers.values():  # A has no gradient while B is zero
        layer.lora_A["default"].weight.grad.normal_()
    strategies.adjust_gradients(opened)
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            gradient, said = getattr(layer, part)["default"].weight.grad, loud[name, part]
            wanted = said.argsort()[-round(0.25 * len(said)) :].sort().values
            assert torch.equal(gradient.any(1).nonzero()[:, 0], wanted), (name, part)


def test_migu_lets_other_rows_of_a_lora_learn_later(model: Any) -> None:
    """The rows that moved first are not the only ones for ever."""
    strategies, opened, layers = lora_with_migu(model, 0.3)
    factors = [layer.lora_B["default"].weight for layer in layers.values()]
    optimizer = torch.optim.AdamW([w for w in opened.parameters() if w.requires_grad], lr=RATE)
    shares = []
    for step in range(60):
        opened(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        strategies.adjust_gradients(opened)
        optimizer.step()
        optimizer.zero_grad()
        shares.append(float(torch.cat([b.any(1) for b in factors]).float().mean()))
    print(f"rows of B that have moved after 1, 10 and 60 steps: {shares[0]:.2f}, {shares[9]:.2f}, {shares[59]:.2f}")
    assert shares[0] == pytest.approx(0.3, abs=0.02)
    assert shares[59] > 0.5


def test_migu_leaves_the_gradient_of_a_layer_that_said_nothing(model: Any) -> None:
    """Of an expert without tokens, or weights that no forward pass of their own uses: no row is the loudest."""
    strategy = Migu()
    strategy.open(model.train(), None)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    strategy.adjust_gradients(model)
    assert all(weight.grad.all() for weight in model.parameters())


def test_migu_finds_nothing_to_choose_from(model: Any) -> None:
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="migu finds no linear layer that is trained"):
        Migu().open(model, None)
