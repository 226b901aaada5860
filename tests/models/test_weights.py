"""Safetensors read and written tensor by tensor: what other readers see, what is refused, what it costs."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.models import toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import ModelError
from hf_contmerge.models.weights import Weights, WeightsWriter, weights_sha256

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.half": torch.arange(7, dtype=torch.bfloat16),
    "c.count": torch.tensor(5, dtype=torch.int64),
    "d.mask": torch.tensor([True, False, True]),
    "e.empty": torch.zeros(0, 3),
    "f.stack": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).half(),
}


def plan(tensors: dict[str, torch.Tensor] = TENSORS) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(n, t.shape, t.dtype) for n, t in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with WeightsWriter(folder, plan(tensors), **options) as writer:
        for name in writer.names:
            writer.write(name, tensors[name])
    return folder


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    weights = Weights(folder)
    assert set(weights.names) == set(tensors)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())


# Writing


@pytest.mark.parametrize("shard_size", [10**9, 60, 1])
def test_round_trip(tmp_path: Path, shard_size: int) -> None:
    folder = write(tmp_path / "m", shard_size=shard_size)
    weights = Weights(folder)
    assert set(weights.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        assert weights.nbytes(name) == tensor.nbytes
        assert torch.equal(weights.tensor(name), tensor)
    assert weights.numel() == sum(t.numel() for t in TENSORS.values())
    by_library = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(by_library[k], v) for k, v in TENSORS.items())
    assert (folder / "model.safetensors.index.json").exists() == (shard_size < 10**9)


def test_transformers_reads_our_shards(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    write(base, tensors, shard_size=20_000)
    assert len(list(base.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("shard_size", [10**9, 60])
def test_tensors_come_in_any_order_from_any_thread(shard_size: int, tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan(), shard_size=shard_size) as writer, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: writer.write(name, TENSORS[name]), reversed(writer.names)))
    assert_holds(tmp_path)
    ordered = write(tmp_path / "ordered", shard_size=shard_size)
    for path in ordered.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_tensor_comes_in_runs_of_its_elements(tmp_path: Path) -> None:
    name, tensor = "f.stack", TENSORS["f.stack"].reshape(-1)
    with WeightsWriter(tmp_path, plan()) as writer:
        for start in (20, 5, 0):
            stop = {20: 24, 5: 20, 0: 5}[start]
            writer.write(name, tensor[start:stop], start=start)
        for other in set(TENSORS) - {name}:
            writer.write(other, TENSORS[other])
    assert_holds(tmp_path)


def test_tensors_that_have_gaps_are_written_as_they_read(tmp_path: Path) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    tensors = {"columns": wide[:, ::2], "turned": wide.T}
    write(tmp_path, tensors)
    assert_holds(tmp_path, tensors)


def test_what_is_not_written_reads_as_zeros(tmp_path: Path) -> None:
    """The files have their full size from the start, so that any of their places can be written first."""
    with WeightsWriter(tmp_path, plan()) as writer:
        writer.write("a.weight", TENSORS["a.weight"])
    weights = Weights(tmp_path)
    assert torch.equal(weights.tensor("a.weight"), TENSORS["a.weight"])
    assert not any(weights.tensor(n).any() for n in set(TENSORS) - {"a.weight"})


def test_several_writers_share_the_files(tmp_path: Path) -> None:
    """The leader makes them; the others, which other ranks have, find them there."""
    with (
        WeightsWriter(tmp_path, plan(), shard_size=60) as leader,
        WeightsWriter(tmp_path, plan(), shard_size=60, leader=False) as other,
    ):
        for i, name in enumerate(leader.names):
            (other if i % 2 else leader).write(name, TENSORS[name])
            assert leader.shard_of(name) == other.shard_of(name)
    assert_holds(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "start"),
    [
        (torch.zeros(4, 3), 1),  # beyond the end
        (torch.zeros(13), 0),
        (torch.zeros(3, 4, dtype=torch.float16), 0),
        (torch.zeros(1), 12),
    ],
)
def test_what_does_not_fit_its_place_is_refused(tensor: torch.Tensor, start: int, tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan()) as writer:
        for name in writer.names:
            writer.write(name, TENSORS[name])
        with pytest.raises(ValueError, match=r"expected a.weight \(3, 4\) torch.float32; got"):
            writer.write("a.weight", tensor, start=start)
        with pytest.raises(KeyError):
            writer.write("unplanned", torch.zeros(1))
    assert_holds(tmp_path)


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    """Whatever the order of the plan: so that it can be read in place."""
    tensors = {"a": torch.tensor([True]), "b": torch.arange(3.0), "c": torch.arange(3).bfloat16(), "d": torch.arange(2)}
    write(tmp_path, tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    assert_holds(tmp_path, tensors)


# Reading


def raw_file(path: Path, tensors: dict[str, torch.Tensor], *, padding: int) -> Path:
    """Write a safetensors file whose data starts anywhere, as the format allows."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries).encode() + b" " * padding
    data = b"".join(t.numpy().tobytes() for t in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("padding", range(4))
def test_tensors_at_odd_places(padding: int, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(2000)}
    assert_holds(raw_file(tmp_path / "model.safetensors", tensors, padding=padding).parent, tensors)


def test_writing_to_what_was_read_changes_neither_the_file_nor_other_readers(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before, weights = (folder / "model.safetensors").read_bytes(), Weights(folder)
    one, other = weights.tensor("a.weight"), weights.tensor("a.weight")
    one.zero_()
    assert torch.equal(other, TENSORS["a.weight"])
    assert torch.equal(weights.tensor("a.weight"), TENSORS["a.weight"])
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tensor_outlives_its_folder(tmp_path: Path) -> None:
    """A mapping holds the file: another process may replace or remove it in the meantime."""
    folder = write(tmp_path)
    weights = Weights(folder)
    tensor = weights.tensor("a.weight")
    (folder / "model.safetensors").unlink()
    assert torch.equal(tensor, TENSORS["a.weight"])
    assert torch.equal(weights.tensor("f.stack"), TENSORS["f.stack"])
    del weights
    assert torch.equal(tensor, TENSORS["a.weight"])


def test_asking_for_pages_ahead_changes_nothing(tmp_path: Path) -> None:
    weights = Weights(write(tmp_path))
    for name in TENSORS:
        weights.prefetch(name)
        assert torch.equal(weights.tensor(name), TENSORS[name])


def test_a_single_file(tmp_path: Path) -> None:
    """It is read whatever it is called, and alone, whatever lies beside it."""
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"left": torch.ones(2), "right": torch.zeros(3)}, tmp_path / "some.factors.safetensors")
    weights = Weights(tmp_path / "some.factors.safetensors")
    assert weights.names == ("left", "right")
    assert weights.folder == tmp_path
    assert torch.equal(weights.tensor("left"), torch.ones(2))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "one.safetensors"])
def test_files_that_transformers_does_not_read_are_no_model(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelError, match=f"expected model.safetensors or .* It has {name}"):
        Weights(tmp_path)
    save_file({"b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert_holds(tmp_path, {"b": torch.zeros(2)})


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    write(tmp_path, shard_size=1)
    save_file({"b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert_holds(tmp_path, {"b": torch.zeros(2)})


def test_a_head_stored_apart_under_a_tied_flag_is_a_head(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, tied=True)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(Weights(base).tensor("lm_head.weight"), head)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(base).lm_head.weight, head)


def test_a_tied_head_stored_twice_counts_once(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0, tied=True)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    assert "lm_head.weight" not in Weights(base).names


def test_digest_is_of_the_tensors_not_of_the_files(tmp_path: Path) -> None:
    one, many = write(tmp_path / "one"), write(tmp_path / "many", shard_size=1)
    changed = {**TENSORS, "a.weight": TENSORS["a.weight"].clone()}
    changed["a.weight"].view(torch.int32)[0, 0] ^= 1
    digests = {weights_sha256(folder, workers=n) for folder in (one, many) for n in (1, 3)}
    assert len(digests) == 1
    renamed = {n.replace("b.half", "b.hall"): t for n, t in TENSORS.items()}
    shaped = {**TENSORS, "a.weight": TENSORS["a.weight"].reshape(4, 3)}
    for i, other in enumerate((changed, renamed, shaped)):
        assert weights_sha256(write(tmp_path / str(i), other)) not in digests


def test_stamp_tells_a_file_that_has_changed(tmp_path: Path) -> None:
    folder = write(tmp_path, shard_size=60)
    before = Weights(folder).stamp()
    (folder / "config.json").write_text("{}")
    assert Weights(folder).stamp() == before  # of the weights alone
    file = next(folder.glob("*.safetensors"))
    os.utime(file, ns=(0, 12345))
    touched = Weights(folder).stamp()
    assert touched != before
    assert_holds(folder)
    file.write_bytes(file.read_bytes())
    assert Weights(folder).stamp() not in (before, touched)


# What is refused


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-8]), "is truncated or not a safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), "is truncated or not a safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes()[:20]), "is truncated or not a safetensors file"),
        (lambda f: f.write_bytes(b"garbage!" * 9), "is truncated or not a safetensors file"),
        (lambda f: f.write_bytes(b""), "is truncated or not a safetensors file"),
        (lambda f: f.rename(f.with_suffix(".bin")), "holds no *.safetensors of a model"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    folder = write(tmp_path / "m")
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError) as error:
        Weights(folder)
    assert text in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("../x.safetensors", "points outside its folder: ../x.safetensors. Fetch the model again."),
        ("/etc/passwd", "points outside its folder: /etc/passwd. Fetch the model again."),
        ("sub/x.safetensors", "points outside its folder: sub/x.safetensors. Fetch the model again."),
        ("no.safetensors", "names a missing file: no.safetensors. Fetch the model again."),
        ("..", "points outside its folder: ... Fetch the model again."),
        (7, "weight_map.a.weight is 7, expected text. Fetch the model again."),
        (None, "weight_map.a.weight is None, expected text. Fetch the model again."),
    ],
)
def test_index_is_checked(tmp_path: Path, target: Any, text: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")  # what it points at exists
    folder = write(tmp_path / "m", shard_size=1)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["a.weight"] = target
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError) as error:
        Weights(folder)
    assert str(error.value).endswith(text)
    assert str(index) in str(error.value)


def test_index_that_promises_what_its_file_lacks(tmp_path: Path) -> None:
    folder = write(tmp_path, shard_size=1)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    file, other = (data["weight_map"][n] for n in ("a.weight", "b.half"))
    for name, target in (("a.weight", other), ("g.new", file)):
        index.write_text(json.dumps({"weight_map": {**data["weight_map"], name: target}}))
        with pytest.raises(ModelError) as error:
            Weights(folder)
        assert str(error.value) == f"{folder}: the index lists {name}, which no file holds. Fetch the model again."


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', "\xff"])
def test_index_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, shard_size=1)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"Cannot read .*index.json: .* Fetch the model again"):
        Weights(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path, shard_size=1)
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names a missing file: model-00002-of-00006.safetensors. Fetch the model ag"):
        Weights(folder)


def test_a_dtype_that_cannot_be_merged(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="w is stored as F8_E4M3, which cannot be merged"):
        Weights(tmp_path).dtype("w")


# What it costs

PEAK = """
import sys, torch
from pathlib import Path
from hf_contmerge.models.weights import Weights, WeightsWriter

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

COUNT, LENGTH = 25, 2_000_000
"""
WRITING = """
with WeightsWriter(Path(sys.argv[1]), [(f"t{i:02}", (LENGTH,), torch.float32) for i in range(COUNT)]) as writer:
    tensor, before = torch.ones(LENGTH), peak()
    for name in writer.names:
        writer.write(name, tensor)
print(peak() - before)
"""
READING = """
weights = Weights(Path(sys.argv[1]))
total, before = weights.tensor("t00").sum(), peak()
for name in weights.names[1:]:
    total += weights.tensor(name).sum()
print(peak() - before)
"""


def test_memory_is_that_of_a_tensor_not_of_a_file(tmp_path: Path) -> None:
    """In MiB: the file has 191, a tensor 7.6. What has been read and dropped does not count any more."""
    for work in (WRITING, READING):
        command = [sys.executable, "-c", PEAK + work, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert float(done.stdout) < 25
