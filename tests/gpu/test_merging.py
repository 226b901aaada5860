"""Merges on CUDA against those on the CPU, and what must not change a byte of them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import ROOT
from toys.loras import lora
from toys.models import perturbed, toy_llama

from hf_contmerge.merge_rules import Weight, get_rule, rule_class, rule_names
from hf_contmerge.merging._factored import fold_factors
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.weights import _STAGED, WeightsWriter
from hf_contmerge.runtime.crew import Crew

CUDA = torch.device("cuda", 0)
PLAIN = [name for name in rule_names() if not get_rule(name).needs]
FACTORED = [name for name in PLAIN if rule_class(name).basis_free]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, and three experts with enough directions for a projection."""
    home = tmp_path_factory.mktemp("gpu-models")
    base = toy_llama(home / "base", seed=0, hidden=64)
    return [base, *(perturbed(base, home / f"expert{i}", seed=i, size=0.01) for i in (1, 2, 3))]


@pytest.fixture(scope="module")
def adapters(models: list[Path]) -> list[Path]:
    return [lora(models[0], models[0].with_name(f"lora{i}"), seed=i) for i in (1, 2, 3)]


def merged(
    rule: str, models: Sequence[Path], out: Path, *, device: torch.device, workers: int = 2, **parameters: Any
) -> MergeState:
    crew = Crew(workers=workers, device=device)
    state = MergeState.create(out, base=models[0], rule=rule, **parameters)
    state.add(*models[1:], crew=crew)
    state.export(out / "merged", crew=crew)
    return state


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: Path, other: Path, base: Path) -> float:
    """Return |one - other| / |other - base| over all weights."""
    a, b, start = map(weights, (one, other, base))
    moved = torch.stack([torch.dist(b[n], start[n]) for n in b]).norm()
    return float(torch.stack([torch.dist(a[n], b[n]) for n in b]).norm() / moved)


def command(*words: object, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


MERGE = ("-m", "hf_contmerge.commands.main", "merge")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize("rule", PLAIN)
def test_a_merge_is_that_of_the_cpu(rule: str, models: list[Path], tmp_path: Path) -> None:
    cpu, gpu = (
        merged(rule, models, tmp_path / d.type, device=d).folder / "merged" for d in (torch.device("cpu"), CUDA)
    )
    assert apart(gpu, cpu, models[0]) <= 1e-4


@pytest.mark.parametrize("variant", ["fusionbench", "block", "paper"])
def test_each_variant_of_opcm_is_that_of_the_cpu(variant: str, models: list[Path], tmp_path: Path) -> None:
    cpu, gpu = (
        merged("opcm", models, tmp_path / d.type, device=d, variant=variant).folder / "merged"
        for d in (torch.device("cpu"), CUDA)
    )
    assert apart(gpu, cpu, models[0]) <= (1e-6 if variant == "block" else 1e-3)


@pytest.mark.parametrize("rule", ["magmax", "opcm", "ties"])
def test_threads_do_not_change_a_byte(rule: str, models: list[Path], tmp_path: Path) -> None:
    folders = [merged(rule, models, tmp_path / str(n), device=CUDA, workers=n).folder for n in (1, 2, 8)]
    files = [(folder / "merged/model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1] == files[2]


@contextmanager
def tf32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_a_process_with_tf32_merges_exactly(models: list[Path], tmp_path: Path) -> None:
    plain = merged("opcm", models, tmp_path / "plain", device=CUDA).folder / "merged/model.safetensors"
    with tf32():
        a = torch.randn(256, 256, device=CUDA)
        assert not torch.allclose((a @ a).double(), a.double() @ a.double(), rtol=1e-5, atol=1e-5)  # it is on
        switched = merged("opcm", models, tmp_path / "tf32", device=CUDA).folder / "merged/model.safetensors"
    assert switched.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("rule", FACTORED)
def test_adapters_on_cuda_are_those_on_the_cpu(rule: str, models: list[Path], adapters: list[Path], tmp_path: Path):
    experts = [models[0], *adapters]
    cpu, gpu = (
        merged(rule, experts, tmp_path / d.type, device=d).folder / "merged" for d in (torch.device("cpu"), CUDA)
    )
    assert apart(gpu, cpu, models[0]) <= 1e-5


@pytest.mark.parametrize("rule", FACTORED)
def test_factors_on_the_card_fold_as_those_on_the_cpu(rule: str) -> None:
    draw = torch.Generator().manual_seed(0)
    experts = [(torch.randn(96, 4, generator=draw), torch.randn(4, 160, generator=draw)) for _ in range(4)]
    there = [(a.to(CUDA), b.to(CUDA)) for a, b in experts]
    one, _ = fold_factors(get_rule(rule), None, experts, Weight("w", True, 1))
    other, _ = fold_factors(get_rule(rule), None, there, Weight("w", True, 1))
    assert other.left.device == CUDA
    torch.testing.assert_close(other.dense().cpu(), one.dense(), rtol=1e-4, atol=1e-4 * float(one.dense().abs().max()))


def test_adapters_and_models_together(models: list[Path], adapters: list[Path], tmp_path: Path) -> None:
    experts = [models[0], adapters[0], models[1], adapters[1]]
    cpu, gpu = (
        merged("magmax", experts, tmp_path / d.type, device=d).folder / "merged" for d in (torch.device("cpu"), CUDA)
    )
    assert apart(gpu, cpu, models[0]) <= 1e-5


def test_owners_are_those_of_the_cpu(models: list[Path], tmp_path: Path) -> None:
    cpu, gpu = (
        load_file(merged("magmax", models, tmp_path / d.type, device=d).require_running() / "owners/model.safetensors")
        for d in (torch.device("cpu"), CUDA)
    )
    assert all(torch.equal(gpu[name], cpu[name]) for name in cpu)


# Commands


def test_the_command_decomposes_in_eight_threads_at_once(models: list[Path], tmp_path: Path) -> None:
    """In a process that has decomposed nothing on CUDA before: torch loads its linear algebra at the first call."""
    state = tmp_path / "state"
    command(*MERGE, "init", state, "--base", models[0], "--rule", "opcm")
    command(*MERGE, "add", state, *models[1:], "--device", "cuda", "--workers", "8")
    command(*MERGE, "export", state, tmp_path / "out", "--device", "cuda")
    alone = merged("opcm", models, tmp_path / "alone", device=CUDA, workers=1).folder / "merged/model.safetensors"
    assert (tmp_path / "out/model.safetensors").read_bytes() == alone.read_bytes()


def test_two_ranks_on_one_card_are_one(models: list[Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    command(*MERGE, "init", state, "--base", models[0], "--rule", "opcm")
    command(*TORCHRUN, *MERGE, "add", state, *models[1:], "--device", "cuda")
    command(*TORCHRUN, *MERGE, "export", state, tmp_path / "out", "--device", "cuda")
    alone = merged("opcm", models, tmp_path / "alone", device=CUDA, workers=1).folder / "merged/model.safetensors"
    assert (tmp_path / "out/model.safetensors").read_bytes() == alone.read_bytes()


def test_a_card_that_is_not_there_is_refused(models: list[Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models[0], rule="magmax").folder
    words = [sys.executable, *MERGE, "add", str(state), str(models[1]), "--device", "cuda:99"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "--device cuda:99: this machine has" in done.stderr


@pytest.mark.parametrize("rule", ["magmax", "opcm"])
def test_the_stock_mergekit_on_cuda(rule: str, models: list[Path], tmp_path: Path) -> None:
    listed = "".join(f"  - model: {m}\n" for m in models[1:])
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: {rule}\nbase_model: {models[0]}\nmodels:\n{listed}dtype: float32\n")
    command("-m", "hf_contmerge.commands.main", "yaml", recipe, tmp_path / "out", "--cuda")
    cpu = merged(rule, models, tmp_path / "cpu", device=torch.device("cpu")).folder / "merged"
    assert apart(tmp_path / "out", cpu, models[0]) <= 1e-4


def test_a_tensor_larger_than_the_pinned_buffer_is_written_whole(tmp_path: Path) -> None:
    numel = 2 * _STAGED // 4 + 1001
    tensor = torch.arange(numel, dtype=torch.float32, device=CUDA)
    with WeightsWriter(tmp_path, [("w", (numel,), torch.float32)]) as writer:
        writer.write("w", tensor[: numel - 500])
        writer.write("w", tensor[numel - 500 :], start=numel - 500)
    assert torch.equal(weights(tmp_path)["w"], tensor.cpu())
