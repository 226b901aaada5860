"""Cosines and sign conflicts of task vectors, against the same sums over whole models."""

from pathlib import Path

import pytest
import torch
from toys.models import perturbed, toy_llama

from hf_contmerge.merging import analysis as module
from hf_contmerge.merging.analysis import geometry
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights


def vector(base: Weights, other: Weights) -> torch.Tensor:
    return torch.cat([(other.tensor(n).double() - base.tensor(n).double()).reshape(-1) for n in base.floating()])


def by_hand(base: Path, others: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = torch.stack([vector(Weights(base), Weights(other)) for other in others])
    unit = stacked / stacked.norm(dim=1, keepdim=True)
    signs = stacked.sign()
    both = signs.abs() @ signs.abs().T
    return unit @ unit.T, (both - signs @ signs.T) / 2 / both


def test_small_models_are_read_whole(base_folder, expert_folders):
    base = Weights(base_folder)
    found = geometry(base, [open_expert(f, base) for f in expert_folders[:2]], Weights(expert_folders[2]))
    cosines, conflicts = by_hand(base_folder, list(expert_folders))
    assert found["sampled"] == 1.0
    for i in range(3):
        for j in range(3):
            assert found["cosines"][i][j] == (None if i == j else pytest.approx(float(cosines[i, j]), abs=6e-5))
            assert found["conflicts"][i][j] == (None if i == j else pytest.approx(float(conflicts[i, j]), abs=6e-5))
    assert abs(found["cosines"][0][1]) < 0.05
    assert found["conflicts"][0][1] == pytest.approx(0.5, abs=0.05)


def test_a_sample_tells_the_same_as_the_whole(tmp_path, base_folder, expert_folders, monkeypatch):
    both = perturbed(expert_folders[0], tmp_path / "both", seed=7, size=0.01)  # holds the first one's vector too
    base, opened = Weights(base_folder), open_expert(expert_folders[0], Weights(base_folder))
    monkeypatch.setattr(module, "_ELEMENTS", 2**13)
    monkeypatch.setattr(module, "_RUN", 32)
    found = geometry(base, [opened], Weights(both))
    cosines, conflicts = by_hand(base_folder, [expert_folders[0], both])
    assert 0.1 < found["sampled"] < 0.6
    assert found["cosines"][0][1] == pytest.approx(float(cosines[0, 1]), abs=0.04)
    assert found["conflicts"][0][1] == pytest.approx(float(conflicts[0, 1]), abs=0.04)
    assert geometry(base, [opened], Weights(both)) == found, "the same elements each time"


def test_what_is_gone_or_has_not_changed_has_no_angle(base_folder, expert_folders):
    base = Weights(base_folder)
    found = geometry(base, [None, open_expert(expert_folders[0], base)], Weights(base_folder))
    assert found["cosines"] == found["conflicts"] == [[None] * 3] * 3


def test_threads_do_not_change_a_digit(base_folder, expert_folders):
    base = Weights(base_folder)
    opened = [open_expert(f, base) for f in expert_folders[:2]]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(geometry(base, opened, Weights(expert_folders[2])))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_adapters_are_sampled_from_their_factors(tmp_path):
    from toys.loras import lora

    base = toy_llama(tmp_path / "base", seed=0)
    lora(base, tmp_path / "a", seed=1)
    weights = Weights(base)
    adapter = open_expert(tmp_path / "a", weights, force=True)
    found = geometry(weights, [adapter, adapter], weights)
    assert found["cosines"][0][1] == 1.0
    assert found["conflicts"][0][1] == 0.0
    assert found["cosines"][0][2] is None
