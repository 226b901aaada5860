"""Safetensors written tensor by tensor: what other readers see, what is refused, what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import ModelError
from hf_contmerge.tensor_files import Weights, WeightsWriter, weights_sha256

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.half": torch.arange(7, dtype=torch.bfloat16),
    "c.count": torch.tensor(5, dtype=torch.int64),
    "d.mask": torch.tensor([True, False, True]),
    "e.empty": torch.zeros(0, 3),
    "f.stack": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).half(),
}


def write(folder: Path, tensors=TENSORS, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with WeightsWriter(folder, [(n, t.shape, t.dtype) for n, t in tensors.items()], **options) as writer:
        for name in writer.names:
            writer.write(name, tensors[name])
    return folder


@pytest.mark.parametrize("shard_size", [10**9, 60, 1])
def test_round_trip(tmp_path, shard_size):
    folder = write(tmp_path / "m", shard_size=shard_size)
    weights = Weights(folder)
    assert set(weights.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        assert torch.equal(weights.tensor(name), tensor)
    by_library = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(by_library[k], v) for k, v in TENSORS.items())
    assert (folder / "model.safetensors.index.json").exists() == (shard_size < 10**9)


def test_transformers_reads_our_shards(tmp_path):
    base = toy_llama(tmp_path / "base", seed=0)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    write(base, tensors, shard_size=20_000)
    assert len(list(base.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in tensors.items())


def test_writer_refuses_another_order_or_shape(tmp_path):
    plan = [("a", (2,), torch.float32), ("b", (2,), torch.float32)]
    with pytest.raises(ValueError, match="expected a"), WeightsWriter(tmp_path, plan) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match="not all planned tensors"), WeightsWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(2))


def test_digest_is_of_the_tensors_not_of_the_files(tmp_path):
    one, many = write(tmp_path / "one"), write(tmp_path / "many", shard_size=1)
    changed = {**TENSORS, "a.weight": TENSORS["a.weight"].clone()}
    changed["a.weight"].view(torch.int32)[0, 0] ^= 1
    assert weights_sha256(one) == weights_sha256(many) != weights_sha256(write(tmp_path / "bit", changed))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-8]), "is truncated or no safetensors file"),
        (lambda f: f.write_bytes(b"garbage!" * 9), "is truncated or no safetensors file"),
        (lambda f: f.rename(f.with_suffix(".bin")), "holds no *.safetensors. Pickled weights"),
    ],
)
def test_damaged_files(tmp_path, damage, text):
    folder = write(tmp_path / "m")
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError) as error:
        Weights(folder)
    assert text in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("target", "text"), [("../x.safetensors", "points outside"), ("no.safetensors", "missing file")]
)
def test_index_is_checked(tmp_path, target, text):
    folder = write(tmp_path / "m", shard_size=1)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["a.weight"] = target
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=text):
        Weights(folder)


def test_a_dtype_that_cannot_be_merged(tmp_path):
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="w is stored as F8_E4M3, which cannot be merged"):
        Weights(tmp_path).dtype("w")


def test_a_tied_head_stored_twice_counts_once(tmp_path):
    base = toy_llama(tmp_path / "base", seed=0, tied=True)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    assert "lm_head.weight" not in Weights(base).names


def test_memory_is_that_of_a_tensor_not_of_a_shard(tmp_path):
    code = """
import resource, sys, torch
from pathlib import Path
from hf_contmerge.tensor_files import WeightsWriter
plan = [(f"t{i:02}", (4_000_000,), torch.float32) for i in range(20)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with WeightsWriter(Path(sys.argv[1]), plan) as writer:
    writer.write("t00", torch.zeros(4_000_000))
    before = peak()
    for name in writer.names[1:]:
        writer.write(name, torch.ones(4_000_000))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # MiB; the file has 305, a tensor 15
