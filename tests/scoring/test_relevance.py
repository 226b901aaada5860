"""contmerge merge rank: gradients of a text against task vectors, and the real effect of a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.guarded import moved
from toys.loras import loaded, lora
from toys.models import TEXT, perturbed, toy_llama, toy_mixture, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

from hf_contmerge.commands.main import main
from hf_contmerge.merging.mixing import MergedWeights
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.scoring.forgetting.paired import Change
from hf_contmerge.scoring.relevance import Direction, Ranking, Text, effect, group_of, ranked, reduced

LINES = TEXT.strip().splitlines()


def text(*lines: str) -> Text:
    return Text("text", [toy_tokenizer()(line)["input_ids"] for line in lines])


def ranking(base: Path) -> Ranking:
    merged = MergedWeights.of(MergeState.create(base.parent / f"{base.name}-state", base=base, rule="average").merge())
    return Ranking(AutoModelForCausalLM.from_pretrained(base), merged)


def direction(expert: Path, base: Path, start: Path | None = None) -> Direction:
    weights = Weights(base)
    opened = [open_expert(folder, weights, base_names={str(base)}) for folder in (expert, start) if folder]
    return Direction(expert.name, opened[0], weights, *opened[1:])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relevance")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return toy_llama(home / "base", seed=0)


@pytest.fixture(scope="module")
def bench(base: Path) -> Ranking:
    return ranking(base)


@pytest.fixture(scope="module")
def goal(home: Path, base: Path) -> Path:
    return perturbed(base, home / "goal", seed=1, size=0.01)


# Oracles on a quadratic loss, 1/2 |w - w*|^2


def test_a_quadratic_loss_is_predicted_exactly(home: Path, base: Path, goal: Path, bench: Ranking) -> None:
    experts = {
        "goal": goal, "half": moved(base, home / "half", goal, by=0.5), "away": moved(base, home / "away", goal, by=-1),
        "still": moved(base, home / "still", goal, by=0), "other": perturbed(goal, home / "other", seed=2, size=0.02),
    }  # fmt: skip
    wanted = Weights(goal)
    directions = [direction(folder, base) for folder in experts.values()]

    def loss() -> torch.Tensor:
        return torch.stack([
            (each.tensor - wanted.tensor(part.stored)).square().sum() / 2
            for each in bench.tensors for part in each.held.parts
        ]).sum()  # fmt: skip

    parts = reduced(bench.model, bench.tensors, directions, loss)
    start, step = float(loss().detach()), 0.25
    found = {}
    for place, (name, each) in enumerate(zip(experts, directions, strict=True)):

        def gain(a: float, of: Direction = each) -> float:
            names = set(wanted.floating())
            for tensor in bench.tensors:
                tensor.fill(lambda n: bench.merged.tensor(n) + a * of.vector(n), names)
            return start - float(loss().detach())

        found[name] = e = effect(parts, place, step, Change(gain(step), None))
        assert e.slope == pytest.approx(gain(1e-3) / 1e-3, rel=2e-2, abs=1e-3)  # exact in the limit
        assert e.whole == pytest.approx(gain(1.0), abs=2e-4)  # a parabola is known from its slope and one point
        square = sum(p.squares[place] for p in parts.values())
        for a in (
            share * abs(e.slope) / square if square else 1.0 for share in (0.1, 1, 1.9)
        ):  # right in sign as far as the parabola is
            assert not e.slope or (gain(a) > 0) == (e.slope > 0)
    assert found["goal"].relevance == pytest.approx(1, abs=1e-5)  # its change is the negative gradient
    assert found["half"].relevance == pytest.approx(1, abs=1e-5)  # lengths do not matter
    assert found["away"].relevance == pytest.approx(-1, abs=1e-5)
    assert found["goal"].groups == pytest.approx(dict.fromkeys(found["goal"].groups, 1), abs=1e-5)
    assert found["still"].relevance is None
    assert found["still"].verdict == "says nothing"
    order = ranked([{"t": e} for e in found.values()], "t")
    assert [list(found)[i] for i in order][-2:] == ["still", "away"]


# A real loss


@pytest.mark.parametrize("kind", ["tied", "untied", "mixture"])
def test_the_products_are_those_of_the_whole_gradient(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    base = toy_mixture(folder, seed=0) if kind == "mixture" else toy_llama(folder, seed=0, tied=kind == "tied")
    expert = perturbed(base, tmp_path / "e", seed=1, size=0.02)
    bench, of = ranking(base), text(*LINES)
    (found,) = bench.effects([direction(expert, base)], [of], 0.25)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    changed = dict(AutoModelForCausalLM.from_pretrained(expert).named_parameters())
    total, count = torch.zeros(()), 0
    for row in of.rows:  # one by one, without padding
        ids = torch.tensor([row])
        total, count = total + model(input_ids=ids, labels=ids).loss * (len(row) - 1), count + len(row) - 1
    (total / count).backward()
    pairs = [(p.grad.double(), (changed[n] - p).detach().double()) for n, p in model.named_parameters()]
    dot = sum(float((g * v).sum()) for g, v in pairs)
    lengths = [sum(float(x.square().sum()) for x in each) ** 0.5 for each in zip(*pairs, strict=True)]
    assert found["text"].slope == pytest.approx(-dot, rel=1e-4)
    assert found["text"].relevance == pytest.approx(-dot / lengths[0] / lengths[1], rel=1e-4)
    assert all(p.grad is None for p in bench.model.parameters())  # none is kept
    assert not any(module.training for module in bench.model.modules())


def test_small_steps_are_predicted_and_the_model_is_left_alone(base: Path, goal: Path, bench: Ranking) -> None:
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    (found,) = bench.effects([direction(goal, base)], [text(*LINES)], 0.01)
    assert found["text"].predicted == pytest.approx(found["text"].real.mean, rel=0.05)
    bench.effects([direction(goal, base)], [text(*LINES)], 0.25)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())


def test_an_adapter_has_the_effect_of_its_whole_model(home: Path, base: Path, bench: Ranking) -> None:
    adapter = lora(base, home / "lora", seed=3)
    loaded(base, adapter, torch.float32).merge_and_unload().save_pretrained(home / "whole")
    found = bench.effects([direction(adapter, base), direction(home / "whole", base)], [text(*LINES)], 0.25)
    one, other = (each["text"] for each in found)
    assert one.relevance == pytest.approx(other.relevance, rel=1e-3)
    assert one.slope == pytest.approx(other.slope, rel=1e-3)
    assert one.real.mean == pytest.approx(other.real.mean, abs=1e-5)
    assert "embeddings" not in one.groups


def test_a_sequential_expert_is_seen_from_its_start(home: Path, base: Path, goal: Path, bench: Ranking) -> None:
    later = perturbed(goal, home / "later", seed=4, size=0.01)
    moved(base, home / "first", goal, by=1.0)
    of = direction(later, base, start=home / "first")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = Weights(later).tensor(name) - Weights(home / "first").tensor(name)
    torch.testing.assert_close(of.vector(name), wanted, rtol=0, atol=1e-6)
    (found,) = bench.effects([direction(home / "first", base, start=home / "first")], [text(LINES[0])], 0.25)
    assert found["text"].verdict == "says nothing"


@pytest.mark.parametrize(
    ("name", "group"),
    [("model.layers.0.self_attn.q_proj.weight", "attention"), ("model.layers.0.mlp.up_proj.weight", "mlp"),
     ("model.embed_tokens.weight", "embeddings"), ("lm_head.weight", "embeddings"),
     ("model.layers.0.post_attention_layernorm.weight", "other"), ("model.norm.weight", "other"),
     ("transformer.h.0.attn.c_attn.weight", "attention"), ("transformer.h.0.mlp.c_fc.weight", "mlp"),
     ("transformer.h.0.ln_1.weight", "other"), ("transformer.wte.weight", "embeddings"),
     ("gpt_neox.layers.0.attention.dense.weight", "attention"),
     ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "mlp"), ("embed_out.weight", "embeddings"),
     ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "mlp"),
     ("model.decoder.layers.0.fc1.weight", "mlp"), ("model.layers.0.block_sparse_moe.gate.weight", "mlp")],
)  # fmt: skip
def test_weights_belong_to_groups(name: str, group: str) -> None:
    assert group_of(name) == group


# The command


def test_the_command_ranks_and_explains(
    home: Path, base: Path, goal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("calib", "general")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": line} for line in LINES[number::2]])
    MergeState.create(tmp_path / "state", base=base, rule="average").add(
        perturbed(base, tmp_path / "x", seed=8, size=0.01)
    )
    adapter = lora(base, home / "lora2", seed=5)
    on = f"{tmp_path / 'calib.jsonl'},{tmp_path / 'general.jsonl'}"
    words = ["merge", "rank", str(tmp_path / "state"), "--on", on, str(goal), str(adapter)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    relevance = [e["texts"][on.split(",")[0]]["relevance"] for e in found["experts"]]
    assert relevance == sorted(relevance, reverse=True)
    names = [Path(e["expert"]).name for e in found["experts"]]
    assert sorted(names) == ["goal", "lora2"]
    assert found["texts"][on.split(",")[1]]["documents"] == 2
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "only scores of a merge can judge it" in shown
    assert shown.index(names[0]) < shown.index(names[1])
    assert "…" not in shown  # in 80 columns
    for expert in found["experts"]:
        for one in expert["texts"].values():
            assert all(f"{one[word]:+.3f}" in shown for word in ("relevance", "predicted", "real", "at_1"))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--on", "none.jsonl", "{goal}"], "none.jsonl"),
     (["--on", ",", "{goal}"], "--on names no text"),
     (["--on", "{calib}", "{goal}", "{goal}"], "named twice"),
     (["--on", "{calib}", "--step", "2", "{goal}"], "--step 2: expected a number above 0"),
     (["--on", "{calib}", "--examples", "0", "{goal}"], "--examples 0: expected 2 or more"),
     (["--on", "{short}", "{goal}"], "no document with two tokens"),
     (["--on", "{calib}", "missing/expert"], "missing/expert"),
     (["--on", "{calib}", "{wide}"], "must have the same architecture")],
)  # fmt: skip
def test_bad_questions_are_refused(
    words: list[str], said: str, base: Path, goal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "goal": goal, "calib": write_jsonl(tmp_path / "calib.jsonl", [{"text": line} for line in LINES]),
        "short": write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}]),
        "wide": toy_llama(tmp_path / "wide", seed=1, hidden=64, layers=1),
    }  # fmt: skip
    MergeState.create(tmp_path / "state", base=base, rule="average")
    assert main(["merge", "rank", str(tmp_path / "state"), *(word.format(**places) for word in words)]) == 2
    assert said in capsys.readouterr().err
