"""`contmerge extract-lora`: peft's merge_and_unload of the adapter is the truncation of the difference in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.architectures import ARCHITECTURES, CONV1D, DENSE, GROUPED, HYBRID, MIXTURE, Tiny, build, moved
from toys.loras import loaded, lora
from toys.models import perturbed, toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merging.extraction import Extraction, extract_adapter, truncated
from hf_contmerge.models.experts import DenseExpert
from hf_contmerge.models.lora.reader import Adapter
from hf_contmerge.models.weights import Weights

Tensors = dict[str, torch.Tensor]
FEW = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "GptOssForCausalLM", "MambaForCausalLM")
CAUSAL = [t for t in ARCHITECTURES if t.kind in (DENSE, GROUPED, MIXTURE, HYBRID, CONV1D)]
EXACT = 1e-5


def pair(tiny: Tiny, folder: Path) -> tuple[Any, Any, Path, Path]:
    """Save a random model and an expert of it."""
    base = build(tiny)
    fine = moved(base, seed=1)
    for model, name in ((base, "base"), (fine, "fine")):
        model.save_pretrained(folder / name)
    return base, fine, folder / "base", folder / "fine"


def cut(change: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def wanted(base: Any, fine: Any, record: dict[str, Any], rank: int) -> Tensors:
    """Return what the adapter should make of each parameter in memory, by the record's sorts."""
    after = dict(fine.named_parameters())
    found = {}
    for name, before in base.named_parameters():
        change = after[name].double() - before.double()
        if name in record["weights"]:
            change = cut(change, rank)
        elif name in record["lost"]:
            change = torch.zeros_like(change)
        else:
            assert name in record["saved"] or not change.any()
        found[name] = before.double() + change
    return found


@pytest.mark.parametrize(
    "tiny", [pytest.param(t, marks=() if t.name in FEW else pytest.mark.slow, id=t.name) for t in CAUSAL]
)
def test_peft_merges_the_truncation(tiny: Tiny, tmp_path: Path) -> None:
    base, fine, before, after = pair(tiny, tmp_path)
    kept = extract_adapter(after, before, tmp_path / "lora", Extraction(rank=3))
    record = json.loads((tmp_path / "lora" / "extraction.json").read_text())
    oracle = wanted(base, fine, record, 3)
    made = dict(loaded(before, tmp_path / "lora").merge_and_unload().named_parameters())
    for name, expected in oracle.items():
        assert torch.allclose(made[name].double(), expected, atol=EXACT), name
    total = sum(
        float((a.double() - b.double()).detach().square().sum())
        for a, b in zip(fine.parameters(), base.parameters(), strict=True)
    )
    lost = sum(float((v - a.double()).square().sum()) for v, a in zip(oracle.values(), fine.parameters(), strict=True))
    assert kept.energy == pytest.approx(1 - lost / total, abs=1e-6)
    matrices = {n for n, p in base.named_parameters() if p.ndim in (2, 3)}
    assert len(record["weights"]) > len(matrices) / 3  # most of the model is low-rank, not saved whole
    ours = Adapter(tmp_path / "lora", Weights(before))  # our own reader agrees with peft
    assert set(ours.names) <= set(Weights(before).names)


def test_energy_keeps_the_smallest_ranks(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, hidden=64, tied=False)
    fine = perturbed(base, tmp_path / "fine", seed=1, size=0.01)
    kept = extract_adapter(fine, base, tmp_path / "lora", Extraction(energy=0.8))
    for name, weight in kept.to_json()["weights"].items():
        change = DenseExpert(fine, Weights(base)).weights.tensor(name).double() - Weights(base).tensor(name).double()
        shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert shares[weight["rank"] - 1] >= 0.8 > shares[weight["rank"] - 2]
        assert weight["energy"] == pytest.approx(float(shares[weight["rank"] - 1]), abs=1e-9)
    assert kept.energy > 0.8
    whole = extract_adapter(fine, base, tmp_path / "all", Extraction(energy=1.0))
    assert whole.energy == pytest.approx(1.0, abs=1e-12)


def test_an_adapter_is_found_again(tmp_path: Path) -> None:
    """The difference that a LoRA made has its rank, whatever more is allowed."""
    base = toy_llama(tmp_path / "base", seed=0, tied=False)
    merged = loaded(base, lora(base, tmp_path / "law", seed=1), torch.float64).merge_and_unload()
    merged.save_pretrained(tmp_path / "fine")
    kept = extract_adapter(tmp_path / "fine", base, tmp_path / "lora", Extraction(rank=16))
    assert set(kept.ranks.values()) == {2}
    assert (kept.saved, kept.dropped) == ([], [])
    assert kept.energy == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_norms(tied: bool, tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, tied=tied)
    fine = perturbed(base, tmp_path / "fine", seed=1, size=0.01)
    kept = extract_adapter(fine, base, tmp_path / "lora", Extraction(rank=4))
    assert "model.embed_tokens.weight" in kept.saved
    assert ("lm_head.weight" in kept.ranks) != tied
    made = loaded(base, tmp_path / "lora", torch.float32).merge_and_unload()
    after = AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(made.get_parameter(name), after.get_parameter(name))
    bare = extract_adapter(fine, base, tmp_path / "bare", Extraction(rank=4, save_rest=False))
    assert set(bare.dropped) == set(kept.saved)
    assert bare.energy == pytest.approx(kept.energy - kept.share_of(kept.saved))


def test_small_updates_of_a_base_in_16_bits(tmp_path: Path) -> None:
    """They are not rounded away before they are compared."""
    base = toy_llama(tmp_path / "base", seed=0, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6)
    model.save_pretrained(tmp_path / "fine")
    kept = extract_adapter(tmp_path / "fine", base, tmp_path / "lora", Extraction(rank=1))
    assert len(kept.ranks) == 14
    assert kept.energy == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_truncated_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rank in (1, 3, 20):
        left, right, size, lost = truncated(change, Extraction(rank=rank))
        nearest = cut(change, rank)
        assert torch.allclose((left @ right).double(), nearest, atol=1e-6)
        assert size == pytest.approx(float(change.square().sum()))
        assert lost == pytest.approx(float((change - nearest).square().sum()), abs=1e-12)


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    fine = perturbed(base, tmp_path / "fine", seed=1, size=0.01)
    words = ["extract-lora", str(fine), "--base", str(base)]
    assert main([*words, "--rank", "2", "-o", str(tmp_path / "lora")]) == 0
    assert "14 linear maps of rank 2 to 2" in capsys.readouterr().out
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "base_model:\n- base\n" in card
    assert str(tmp_path) not in card
    assert main([*words, "--energy", "0.5", "--no-rest", "--json", "-o", str(tmp_path / "other")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0.2 < facts["energy"] < 0.8
    assert "model.norm.weight" in facts["lost"]
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert main([*words, "--rank", "2", "-o", str(tmp_path / "lora")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["extract-lora", str(base), "--base", str(base), "--rank", "2", "-o", str(tmp_path / "x")]) == 2
    assert "there is nothing to extract" in capsys.readouterr().err
    assert (
        main(["extract-lora", str(tmp_path / "lora"), "--base", str(base), "--rank", "2", "-o", str(tmp_path / "x")])
        == 2
    )
    assert "is an adapter already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}])
def test_bad_sizes(words: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"--rank|--energy"):
        Extraction(**words)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    other = toy_llama(tmp_path / "other", seed=0, hidden=64)
    with pytest.raises(ModelError):
        extract_adapter(other, base, tmp_path / "lora", Extraction(rank=1))
