"""Values at the ends of what the types hold: merged, or refused by name where they arise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import get_rule, rule_names
from hf_contmerge.merging.state import MergeState

NORM, UP, STACK = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.experts.weight"
RULES = [name for name in rule_names() if not get_rule(name).needs]


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"], "vocab_size": 16}))
    return folder


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    names = {"model.embed_tokens.weight": (16, 8), UP: (12, 8), NORM: (8,), STACK: (0, 3, 4)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in names.items()}


@pytest.mark.parametrize("rule", RULES)
def test_float64_experts_and_empty_stacks(rule: str, tmp_path: Path) -> None:
    """As the same values in float32."""
    base = save(tmp_path / "base", weights(0))
    merged = []
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        experts = [save(tmp_path / f"{name}-{i}", weights(i, dtype)) for i in (1, 2)]
        state = MergeState.create(tmp_path / f"state-{name}", base=base, rule=rule).add(*experts)
        merged.append(load_file(state.export(tmp_path / f"merged-{name}") / "model.safetensors"))
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    assert merged[0][STACK].shape == (0, 3, 4)


def test_a_sum_beyond_float32(tmp_path: Path) -> None:
    start = {**weights(0), NORM: torch.zeros(8)}
    base = save(tmp_path / "base", start)
    experts = [save(tmp_path / f"e{x}", {**start, NORM: torch.full((8,), x * 1e38)}) for x in (3.0, 2.9)]
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(experts[0])
    before = (state.folder / "state.json").read_bytes()
    with pytest.raises(ModelError, match=rf"{NORM}: the state of the rule is too large for float32 with {experts[1]}"):
        state.add(experts[1])
    assert (state.folder / "state.json").read_bytes() == before


@pytest.mark.parametrize("value", [1e39, -1e39, 3.5e38])
def test_a_parameter_beyond_float32(value: float, tmp_path: Path) -> None:
    base = save(tmp_path / "base", weights(0))
    with pytest.raises(RecipeError, match="lambda must be a finite float; got"):
        MergeState.create(tmp_path / "state", base=base, rule="magmax", **{"lambda": value})


def test_the_largest_parameter(tmp_path: Path) -> None:
    """The merged values overflow, not the arithmetic."""
    base = save(tmp_path / "base", weights(0))
    state = MergeState.create(tmp_path / "state", base=base, rule="magmax", **{"lambda": 3.4e38})
    state.add(save(tmp_path / "expert", weights(1)))
    with pytest.raises(ModelError, match=r"merged values as large as .* do not fit float32"):
        state.export(tmp_path / "merged")
