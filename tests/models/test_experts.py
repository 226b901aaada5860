"""What an expert must be for the engine: a kind that the package does not know merges like the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toys.models import perturbed

from hf_contmerge.merge_rules import get_rule, rule_names
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import Expert, Reader, open_expert
from hf_contmerge.models.weights import Weights


class Packed:
    """A change in eight bits a value, and a rank-2 one for a single weight; the rest is the base's."""

    kind: Any = "packed"
    LOW_RANK = "model.layers.0.mlp.up_proj.weight"

    def __init__(self, expert: Path, base: Weights) -> None:
        self.folder, weights = expert, Weights(expert)
        changes = {n: weights.tensor(n) - base.tensor(n) for n in base.floating() if "mlp" in n and n != self.LOW_RANK}
        self._scales = {name: float(change.abs().max()) / 127 for name, change in changes.items()}
        self._codes = {n: (c / self._scales[n]).round().to(torch.int8).reshape(-1) for n, c in changes.items()}
        draw, (rows, columns) = torch.Generator().manual_seed(len(str(expert))), base.shape(self.LOW_RANK)
        self._factors = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)

    def rank(self, name: str) -> int | None:
        return 2 if name == self.LOW_RANK else None if name in self._codes else 0

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self._factors if name == self.LOW_RANK else None

    def reader(self, name: str, _base: Tensor) -> Reader:
        if name not in self._codes:
            whole = (self._factors[0] @ self._factors[1]).reshape(-1)
            zero = name != self.LOW_RANK
            return lambda start, stop, wide: torch.zeros_like(wide) if zero else whole[start:stop]
        return lambda start, stop, _wide: self._codes[name][start:stop].float() * self._scales[name]

    def is_whole(self, name: str) -> bool:
        return name == self.LOW_RANK

    def values(self, _name: str) -> None:
        return None

    def prefetch(self, _name: str) -> None:
        return None


def unpacked(base: Path, packed: Packed, folder: Path) -> Path:
    """Write the model that a packed expert stands for."""
    weights = Weights(base)
    values = {name: weights.tensor(name).clone() for name in weights.names}
    for name, value in values.items():
        value += packed.reader(name, value)(0, value.numel(), value.reshape(-1)).reshape(value.shape)
    out = perturbed(base, folder, seed=0, size=0.0)
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", rule_names())
def test_a_kind_that_is_not_ours_merges_through_the_protocol(
    name: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    """Mixed with a model, in one stream: what its unpacked form gives, up to rounding of base + change."""
    weights, rule = Weights(base_folder), get_rule(name)
    packed = Packed(expert_folders[0], weights)
    forms: dict[str, Expert] = {
        "packed": packed,
        "unpacked": open_expert(unpacked(base_folder, packed, tmp_path / "whole"), weights),
    }
    merged = {}
    for form, expert in forms.items():
        for part in ("state", "merged"):
            (tmp_path / form / part).mkdir(parents=True)
        experts = [expert, open_expert(expert_folders[1], weights)]
        out = Output(tmp_path / form / "merged")
        merge_experts(rule, weights, experts, running_out=tmp_path / form / "state", merged_out=out)
        merged[form] = Weights(out.folder)
    close = 0.0
    for weight in weights.names:
        ours, theirs = (merged[form].tensor(weight) for form in forms)
        # Rules that choose may choose otherwise where two values are equal but for rounding.
        close += float(((ours - theirs).abs() <= 1e-4).float().mean()) / len(weights.names)
    assert close > 0.99
    assert Running(tmp_path / "packed/state").names() == set(weights.names)


def test_its_low_rank_changes_stay_factors(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    weights = Weights(base_folder)
    merge_experts(get_rule("average"), weights, [Packed(expert_folders[0], weights)], running_out=tmp_path / "state")
    running = Running(tmp_path / "state")
    assert running.rank(Packed.LOW_RANK) == 2
    assert running.rank("model.layers.0.mlp.down_proj.weight") is None
    assert running.rank("model.layers.0.self_attn.q_proj.weight") == 0
