"""Statistics of experts: the second moments against a sum by hand, who writes them, who refuses to merge without."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys.loras import lora
from toys.models import toy_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError, RunError
from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.statistics import Statistics, check_statistics, statistics_digest
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.statistics import check_asked

Q, DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj"))
ROWS = [{"text": f"the quick brown fox {i} sings songs of law" + " and medicine" * (i % 3)} for i in range(9)]


@dataclass(frozen=True)
class Weighed(MergeRule):
    """Adds D times its inputs' second moments: nothing that anybody would want, but it reads them."""

    reference = "https://example.org"
    start_from = "base"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        moments = weight.statistics.get("inputs")
        return running + (task_vector if moments is None else task_vector @ moments)

    def scale(self, norms: Norms) -> float:
        return 1.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    toy_llama(home / "base", seed=0)
    toy_llama(home / "expert", seed=1)
    write_jsonl(home / "texts.jsonl", ROWS)
    return home


def by_hand(folder: Path, base: Path) -> dict[str, Tensor]:
    """Return X'X / n of two weights, example by example, in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    seen: dict[str, list[Tensor]] = {Q: [], DOWN: []}
    for name in seen:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    for row in ROWS:
        model(**tokenizer(row["text"], return_tensors="pt"))
    inputs = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


def test_the_command_against_a_sum_by_hand(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = Path(shutil.copytree(home / "expert", tmp_path / "expert"))
    words = ["statistics", str(expert), "--data", str(home / "texts.jsonl"), "--base", str(home / "base"), "--cpu"]
    assert main(words) == 0
    assert "14 linear maps" in capsys.readouterr().out
    found, wanted = Statistics(expert), by_hand(expert, home / "base")
    for name in (Q, DOWN):
        moments = found.of(name, ["inputs"], torch.device("cpu"))["inputs"]
        torch.testing.assert_close(moments.double(), wanted[name], rtol=1e-3, atol=1e-4)
    assert not found.of("model.norm.weight", ["inputs"], torch.device("cpu"))
    record = json.loads((expert / "statistics/statistics.json").read_text())
    assert record["kinds"]["inputs"]["examples"] == len(ROWS)
    digest = statistics_digest(expert)
    assert digest
    assert main([*words, "--examples", "3"]) == 0
    assert statistics_digest(expert) != digest
    assert main([*words, "--examples", "0"]) == 2
    assert main(["statistics", "owner/model", "--data", "x.jsonl"]) == 2


def test_an_adapter_is_measured_as_the_model_that_it_makes(home: Path, tmp_path: Path) -> None:
    adapter = lora(home / "base", tmp_path / "adapter", seed=1, size=0.3)
    assert main(["statistics", str(adapter), "--data", str(home / "texts.jsonl"), "--cpu"]) == 0
    moments = Statistics(adapter).of(DOWN, ["inputs"], torch.device("cpu"))["inputs"]
    plain = by_hand(home / "base", home / "base")[DOWN]
    assert float((moments - plain).norm() / plain.norm()) > 0.01
    check_statistics(Weighed(), [adapter])


def test_training_writes_them_and_a_rule_gets_them(home: Path, tmp_path: Path) -> None:
    data = load_stage_data(Dataset(path=str(home / "texts.jsonl"), heldout=0), seed=0)
    fields = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "statistics": ["inputs"]}
    out = tmp_path / "expert"
    out.mkdir()
    train_expert(
        TrainJob(start=home / "base", base=home / "base", data=data, train=Train.model_validate(fields), seed=0),
        out,
        checkpoints=tmp_path / "checkpoints",
    )
    base = Weights(home / "base")
    merge_experts(Weighed(), base, [open_expert(out, base)], merged_out=Output(tmp_path))
    merged, (before, after) = load_file(tmp_path / "model.safetensors"), (
        load_file(folder / "model.safetensors") for folder in (home / "base", out)
    )  # fmt: skip
    moments = Statistics(out).of(Q, ["inputs"], torch.device("cpu"))["inputs"]
    torch.testing.assert_close(merged[Q], before[Q] + (after[Q] - before[Q]) @ moments, atol=1e-6, rtol=1e-5)


def test_missing_and_outdated_statistics_are_refused(home: Path, tmp_path: Path) -> None:
    expert, base = Path(shutil.copytree(home / "expert", tmp_path / "expert")), Weights(home / "base")
    with pytest.raises(ModelError, match=r"lacks the statistics 'inputs', .*: write them with `contmerge statistics"):
        merge_experts(Weighed(), base, [open_expert(expert, base)], merged_out=Output(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))
    assert main(["statistics", str(expert), "--data", str(home / "texts.jsonl"), "--cpu"]) == 0
    check_statistics(Weighed(), [expert])
    tensors = load_file(expert / "model.safetensors")
    tensors[Q][0, 0] += 1
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="are of other weights than it holds now"):
        check_statistics(Weighed(), [expert])
    (expert / "statistics/statistics.json").write_text("{")
    with pytest.raises(RunError, match=r"statistics\.json is damaged: .* Remove its folder and measure again"):
        Statistics(expert)


def test_a_recipe_must_ask_for_them() -> None:
    with pytest.raises(RecipeError, match=r"merge entry mine needs the statistics 'inputs' of each expert. Add"):
        check_asked({"merge entry mine": Weighed()}, Train())
    check_asked({"merge entry mine": Weighed()}, Train.model_validate({"statistics": ["inputs"]}))
