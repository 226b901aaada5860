"""The Expert protocol: another kind of expert, here one with packed signs, merges like the others."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import Expert, ExpertKind, Reader, open_expert
from hf_contmerge.models.weights import Weights


class Packed:
    """A task vector as signs and one size per weight, unpacked when it is read."""

    kind: ExpertKind = "model"

    def __init__(self, folder: Path, base: Weights) -> None:
        self.folder, self._weights, self._sizes = folder, dict[str, Tensor](), dict[str, float]()
        stored = Weights(folder)
        for name in base.floating():
            change = stored.tensor(name).float() - base.tensor(name).float()
            self._weights[name] = (change > 0).to(torch.uint8)
            self._sizes[name] = float(change.abs().mean())

    def rank(self, _name: str, /) -> None:
        return None

    def factors(self, _name: str, /) -> None:
        return None

    def reader(self, name: str, _base: Tensor, /) -> Reader:
        signs, size = self._weights[name].reshape(-1), self._sizes[name]
        return lambda start, stop, wide: (signs[start:stop].float() * 2 - 1).mul_(size).to(wide.device)

    def is_whole(self, _name: str, /) -> bool:
        return False

    def values(self, _name: str, /) -> None:
        return None

    def prefetch(self, _name: str, /) -> None:
        return None

    def unpacked(self, name: str) -> Tensor:
        return (self._weights[name].float() * 2 - 1) * self._sizes[name]


def test_a_packed_expert_merges_with_a_whole_one(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    base = Weights(base_folder)
    packed, whole = Packed(expert_folders[0], base), open_expert(expert_folders[1], base)
    experts: list[Expert] = [packed, whole]
    merge_experts(get_rule("task_arithmetic"), base, experts, merged_out=Output(tmp_path))
    merged, dense = load_file(tmp_path / "model.safetensors"), load_file(expert_folders[1] / "model.safetensors")
    scale = get_rule("task_arithmetic").parameters()["lambda"]
    for name in base.floating():
        start = base.tensor(name)
        wanted = start + scale * (packed.unpacked(name) + dense[name] - start)
        torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=1e-5)
