"""Training on CUDA in bfloat16: every strategy, pairs of answers, statistics, and whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toys.models import toy_llama
from toys.recipes import toy_recipe
from train_strategies.test_all_strategies import MANY, course_of, refused_here, weights

from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.statistics import Statistics
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import StatisticsSettings
from hf_contmerge.testing.course import STEPS, texts_of, write_texts
from hf_contmerge.testing.strategies import falls, losses_of
from hf_contmerge.train_strategies.migu import Migu
from hf_contmerge.training.settings import training_checks
from hf_contmerge.training.statistics import collect_inputs


def learn(case: str, stage: int, home: Path, name: str, **fields: Any) -> dict[str, Any]:
    """Train a stage of a course in `home`, which holds its base."""
    data = texts_of(write_texts(home / f"{name}.jsonl", stage))
    return course_of(case, home).train(stage, name, data, **fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("gpu-base") / "base", seed=0)


@pytest.mark.parametrize("case", MANY)
def test_two_stages_in_bfloat16(case: str, base: Path, tmp_path: Path) -> None:
    if why := refused_here(case):
        pytest.skip(why)
    (tmp_path / "base").symlink_to(base)
    records = [learn(case, stage, tmp_path, name, bf16=True) for stage, name in enumerate(("first", "second"), 1)]
    for stage, record in enumerate(records, 1):
        losses = losses_of(course_of(case, tmp_path), stage, record)
        assert len(losses) in (2, STEPS)
        assert falls(losses)
    expert, start = weights(tmp_path / "second"), weights(tmp_path / "first")
    assert {n: t.shape for n, t in expert.items()} == {n: t.shape for n, t in weights(base).items()}
    assert all(t.isfinite().all() for t in expert.values())
    assert any(not torch.equal(t, start[n]) for n, t in expert.items())


def test_a_layer_that_no_step_calls_leaves_migu_on_the_card(base: Path) -> None:
    """An expert of a mixture, for one, to which no token went."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.uncalled = torch.nn.Linear(4, 4)
    strategy = Migu(fraction=0.25)
    strategy.open(model, None)
    model.to("cuda").train()
    tokens = torch.arange(24, device="cuda").reshape(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    strategy.adjust_gradients(model)
    rows = model.model.layers[0].mlp.up_proj.weight.grad.abs().sum(1) > 0
    assert int(rows.sum()) == round(0.25 * len(rows))


@pytest.mark.parametrize("case", ["full", "lora", "ewc", "migu", "distill"])
def test_training_that_was_killed_goes_on(case: str, base: Path, tmp_path: Path) -> None:
    """To the weights of training that was not: to rounding, as attention adds up its gradients in any order."""
    (tmp_path / "base").symlink_to(base)
    learn(case, 1, tmp_path, "first")
    learn(case, 2, tmp_path, "second")
    (tmp_path / "broken-checkpoints").mkdir()
    (tmp_path / "second-checkpoints/checkpoint-3").rename(tmp_path / "broken-checkpoints/checkpoint-3")
    learn(case, 2, tmp_path, "broken")
    one, other, start = (weights(tmp_path / name) for name in ("broken", "second", "first"))
    moved = torch.stack([torch.dist(other[n], start[n]) for n in start]).norm()
    assert torch.stack([torch.dist(one[n], other[n]) for n in start]).norm() <= 1e-3 * moved


def test_statistics_are_those_of_the_cpu(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    batches = [torch.arange(24).reshape(2, 12), torch.arange(30, 37)[None]]
    found = []
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
        found.append(collect_inputs(model, batches, Weights(base)))
    assert found[0].tokens == found[1].tokens == 31
    for name, moment in found[0].moments.items():
        torch.testing.assert_close(found[1].moments[name].cpu(), moment, rtol=1e-4, atol=1e-5)


def test_a_trained_expert_has_statistics(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    learn("full", 1, tmp_path, "first", statistics=StatisticsSettings(kinds=["inputs"], examples=8))
    name = "model.layers.0.mlp.down_proj.weight"
    moment = Statistics(tmp_path / "first").of(name, ["inputs"], torch.device("cuda"))["inputs"]
    assert moment.shape == (64, 64)
    assert moment.is_cuda
    assert moment.isfinite().all()


def test_the_machine_s_memory_counts_where_training_is_on_the_cpu(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_contmerge.run.recipe.schema import Train

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    for check in training_checks(Train(), base):
        check()


@pytest.mark.parametrize(("name", "stages"), [("magmax-llama", None), ("opcm-llama", 2), ("lora-stream", 2)])
def test_a_shipped_recipe_runs(name: str, stages: int | None, tmp_path: Path) -> None:
    """Texts, conversations or pairs; training, merging and scoring, all on the card."""
    recipe = toy_recipe(name, tmp_path, stages=stages)
    run = run_recipe(recipe, tmp_path / "run")
    last = run.stage_numbers()[-1]
    for entry in recipe.merge:
        place = run.merged(last, entry)
        assert [place.record(phase)["device"] for phase in ("merge", "score")] == ["cuda", "cuda"]
    kind = "previous" if name == "magmax-llama" else "base"
    assert run.expert(last, kind).record("train")["device"] == "cuda"
