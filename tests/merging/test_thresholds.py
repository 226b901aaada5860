"""`stitch` over a whole model: one threshold per expert, in states, exports and mergekit alike."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from toys.loras import lora
from toys.models import perturbed, toy_llama

from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging._thresholds import histogram, threshold
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.weights import Weights, weights_sha256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("thresholds")
    base = toy_llama(home / "base", seed=0)
    return [base, *(perturbed(base, home / f"expert{i}", seed=i, size=0.02 * i) for i in (1, 2))]


@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5, 1.0])
def test_the_threshold_is_just_below_the_exact_one(share: float) -> None:
    parts = [10.0**-k * torch.randn(5000, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    total, sizes = 20_000, torch.cat(parts).abs().sort(descending=True).values
    found, exact = threshold(map(histogram, parts), share, total), float(sizes[max(1, int(share * total)) - 1])
    assert exact * (1 - 2**-8) <= found <= exact
    assert threshold(map(histogram, parts), share / 100, 100 * total) <= exact
    assert threshold([{}], share, total) == 0.0


def exact(base: Path, experts: list[Path], sparsity: float) -> dict[str, torch.Tensor]:
    start = Weights(base)
    names = [n for n in start.names if "embed" not in n and "lm_head" not in n]
    total, count = ({n: torch.zeros(start.shape(n)) for n in names} for _ in range(2))
    for expert in experts:
        vector = {n: Weights(expert).tensor(n) - start.tensor(n) for n in names}
        flat = torch.cat([d.reshape(-1) for d in vector.values()]).abs().sort(descending=True).values
        least = flat[int(sparsity * len(flat)) - 1]
        for name, d in vector.items():
            total[name] += torch.where(d.abs() >= least, d, 0)
            count[name] += d.abs() >= least
    return {n: total[n] / count[n].clamp_min(1) for n in names}


def test_a_whole_models_largest_changes_are_kept(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    state = MergeState.create(tmp_path / "s", base=base, rule="stitch").add(experts[0]).add(experts[1])
    found, start = Weights(state.export(tmp_path / "out")), Weights(base)
    wanted, differ, elements = exact(base, experts, 0.1), 0, 0
    for name in found.names:
        change = found.tensor(name) - start.tensor(name)
        if name not in wanted:
            assert not change.any()  # the embeddings
            continue
        differ += int(((change - wanted[name]).abs() > 1e-6).sum())
        elements += change.numel()
    assert differ < 0.002 * elements  # those between the bin's edge and the exact threshold
    text = mergekit_yaml("stitch", get_rule("stitch"), base=base, experts=experts, dtype=torch.float32)
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), options)
    assert weights_sha256(tmp_path / "theirs") == weights_sha256(tmp_path / "out")


def test_an_adapter_with_few_elements_is_kept_whole(models: list[Path], tmp_path: Path) -> None:
    base = models[0]
    adapter = lora(base, tmp_path / "lora", seed=1, r=1, target_modules=["q_proj"])
    outs = []
    for rule, parameters in (("stitch", {"sparsity": 0.9}), ("task_arithmetic", {"lambda": 1.0})):
        state = MergeState.create(tmp_path / rule, base=base, rule=rule, **parameters).add(adapter)
        outs.append(Weights(state.export(tmp_path / f"{rule}-out")))
    for name in outs[0].names:
        torch.testing.assert_close(outs[0].tensor(name), outs[1].tensor(name), rtol=0, atol=1e-6)
