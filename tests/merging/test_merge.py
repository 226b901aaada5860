"""A merge as a value: what a fold returns, what an export keeps, which experts are refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys.models import perturbed, toy_llama

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge, refuse_twins
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.weights import weights_sha256


def expert(folder: Path) -> FoldedExpert:
    return FoldedExpert(folder.name, folder, expert_sha256(folder), name=folder.name)


def started(base: Path, rule: str, **parameters: float) -> RunningMerge:
    return RunningMerge(base, rule, get_rule(rule, **parameters))


def exported(merge: RunningMerge, out: Path) -> str:
    out.mkdir()
    merge.export(Output(out))
    return weights_sha256(out)


@pytest.mark.parametrize("rule", ["magmax", "opcm"])
def test_one_after_another_is_all_at_once(
    rule: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    experts = [expert(folder) for folder in expert_folders]
    grown = started(base_folder, rule)
    for number, one in enumerate(experts):
        before, grown = grown, grown.fold([one], tmp_path / f"running-{number}")
        assert before.experts == grown.experts[:-1]
    whole = started(base_folder, rule).fold(experts, tmp_path / "whole")
    assert (grown.experts, grown.running_norm, grown.scale) == (whole.experts, whole.running_norm, whole.scale)
    assert [e.norm > 0 for e in whole.experts] == [True] * 3
    assert exported(grown, tmp_path / "grown") == exported(whole, tmp_path / "whole-model")


def test_a_value_stays_what_it_was(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    first = started(base_folder, "magmax").fold([expert(expert_folders[0])], tmp_path / "1")
    digest = exported(first, tmp_path / "before")
    first.fold([expert(expert_folders[1])], tmp_path / "2")
    assert exported(first, tmp_path / "after") == digest


def test_scaled_and_tuned_need_no_other_state(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    merge = started(base_folder, "magmax").fold([expert(f) for f in expert_folders[:2]], tmp_path / "state")
    assert merge.scaled(0.5).rule.parameters()["lambda"] == merge.rule.parameters()["lambda"] / 2
    assert merge.scaled(0.5).scale == merge.scale / 2
    other = started(base_folder, "opcm").fold([expert(f) for f in expert_folders[:2]], tmp_path / "opcm")
    assert (other.scaled(0.5).factor, other.scaled(0.5).scaled(0.5).scale) == (0.5, other.scale / 4)
    base, half, full = (load_file(tmp_path / name / "model.safetensors") for name in (
        exported_to(merge.scaled(0.0), tmp_path / "zero"), exported_to(merge.scaled(0.5), tmp_path / "half"),
        exported_to(merge, tmp_path / "full"),
    ))  # fmt: skip
    for name in base:
        torch.testing.assert_close(half[name] - base[name], (full[name] - base[name]) / 2, atol=1e-6, rtol=1e-4)
    assert merge.scaled(0.5).restarted().experts == ()


def exported_to(merge: RunningMerge, out: Path) -> str:
    exported(merge, out)
    return out.name


def test_a_single_expert_taken_whole_keeps_its_bits(tmp_path: Path) -> None:
    """base + (expert - base) rounds; where the expert has changed since, the difference is all that is left of it."""
    base = toy_llama(tmp_path / "base", seed=0)
    one = perturbed(base, tmp_path / "one", seed=1, size=0.3)
    merge = started(base, "magmax", **{"lambda": 1.0}).fold([expert(one)], tmp_path / "state")
    assert merge.scale == 1.0
    assert exported(merge, tmp_path / "kept") == weights_sha256(one)
    shutil.rmtree(one)
    perturbed(base, one, seed=2, size=0.3)
    assert not merge.experts[0].is_unchanged()
    near, changed = (
        load_file(tmp_path / name / "model.safetensors") for name in (exported_to(merge, tmp_path / "near"), "one")
    )
    kept = load_file(tmp_path / "kept/model.safetensors")
    for name in kept:
        torch.testing.assert_close(near[name], kept[name], atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(near[name], changed[name]) for name in kept)


def test_twins_are_refused_by_digest_or_by_files(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(expert_folders[0], tmp_path / "copy"))
    merge = started(base_folder, "magmax").fold([expert(expert_folders[0])], tmp_path / "state")
    with pytest.raises(ModelError, match=r"copy has the same weights as .*; an expert must not be folded twice"):
        merge.fold([expert(expert_folders[1]), expert(copy)], tmp_path / "more")
    assert not (tmp_path / "more").exists()
    unknown = [replace(expert(folder), sha256="") for folder in (expert_folders[1], expert_folders[0], copy)]
    with pytest.raises(ModelError, match="copy has the same weights as"):
        refuse_twins(unknown)
    refuse_twins(unknown[:2])
    refuse_twins([expert(expert_folders[0]), *unknown[:1]], 1)
