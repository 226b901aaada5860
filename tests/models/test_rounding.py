"""Stochastic rounding against its definition, and the measure of what is kept."""

import hashlib
import json
import logging

import pytest
import torch

from hf_contmerge.models.rounding import compared, rounded
from hf_contmerge.models.survival import Kept, Survival

HALVES = [torch.bfloat16, torch.float16]
TOP = torch.finfo(torch.float32).max


def values(dtype: torch.dtype, count: int = 4096) -> torch.Tensor:
    """Return float32 numbers of all sizes and both signs, some of them smaller than the dtype's last bit."""
    draw = torch.Generator().manual_seed(3)
    low, high = (-26, -8) if dtype == torch.float16 else (-44, 16)
    return torch.randn(count, generator=draw) * 2.0 ** (low + torch.rand(count, generator=draw) * (high - low))


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the dtype's values next to each number, toward zero and away from it."""
    near = x.to(dtype)
    outer = near.float().abs() > x.abs()
    zero, far = torch.zeros_like(near), torch.copysign(torch.full_like(near, float("inf")), near)
    inward, outward = torch.nextafter(near.cpu(), zero), torch.nextafter(near, far)
    return torch.where(outer, inward, near).float(), torch.where(outer, near, outward).float()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_neighbour_whose_mean_is_the_number(dtype: torch.dtype) -> None:
    x, draws = values(dtype), 2000
    below, above = neighbours(x, dtype)
    total = torch.zeros(len(x), dtype=torch.float64)
    for number in range(draws):
        y = rounded(x, dtype, name=f"w{number}")
        assert y.dtype == dtype
        assert bool(((y.float() == below) | (y.float() == above)).all())
        total += y.double()
    step = (above - below).double().abs()
    share = (x.double() - below.double()).abs() / step
    sigma = (share * (1 - share) / draws).sqrt() * step
    off = (total / draws - x.double()) / (sigma + 1e-4 * step)
    assert float(off.abs().max()) < 5.5
    assert abs(float(off.mean())) < 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_values_of_the_dtype_stay(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = bits[torch.isfinite(bits)]
    for name in ("a", "b"):
        assert torch.equal(rounded(finite.float(), dtype, name=name).view(torch.int16), finite.view(torch.int16))
        everything = rounded(bits.float(), dtype, name=name)
        torch.testing.assert_close(everything, bits, rtol=0, atol=0, equal_nan=True)


def test_the_largest_numbers_stay_finite() -> None:
    x = torch.tensor([TOP, -TOP, float("inf"), -float("inf"), float("nan"), 1.0, 1e-45, -1e-45])
    for number in range(50):
        y = rounded(x, torch.bfloat16, name=str(number))
        assert y[:2].tolist() == [torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max]
        assert y[2:4].tolist() == [float("inf"), -float("inf")]
        assert bool(y[4].isnan())
        assert float(y[5]) == 1.0
    y = rounded(torch.tensor([65504.0, 65519.0, 65535.0, -65535.0, 65536.0, 1e5]), torch.float16, name="w")
    assert y.tolist() == [65504.0, 65504.0, 65504.0, -65504.0, float("inf"), float("inf")]


@pytest.mark.parametrize("dtype", HALVES)
def test_any_pieces_give_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    whole = rounded(x, dtype, name="w")
    for size in (1, 2, 3, 4, 5, 7, 64, 1000):
        cut = [rounded(x[i : i + size], dtype, name="w", start=i) for i in range(0, 1001, size)]
        assert torch.equal(torch.cat(cut), whole)
    assert not torch.equal(rounded(x, dtype, name="v"), whole)
    assert torch.equal(rounded(x.reshape(77, 13), dtype, name="w"), whole.reshape(77, 13))
    turned = x.reshape(77, 13).T
    assert torch.equal(rounded(turned, dtype, name="w"), rounded(turned.contiguous(), dtype, name="w"))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    assert rounded(torch.full(shape, 0.3), torch.bfloat16, name="w").shape == shape


def splitmix64(seed: int, counter: int) -> int:
    x = (seed + counter * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("start", [0, 2**31 - 5, 2**40 + 3])
def test_the_bits_are_those_of_the_description(start: int) -> None:
    """SplitMix64 by whole numbers of Python: no machine, device or version may round otherwise."""
    seed = int.from_bytes(hashlib.blake2b(b"model.norm.weight", digest_size=8).digest(), "little")
    x = torch.linspace(1.0, 1.9, 50)
    found = rounded(x, torch.bfloat16, name="model.norm.weight", start=start).view(torch.int16).tolist()
    for i, (bits, got) in enumerate(zip(x.view(torch.int32).tolist(), found, strict=True)):
        noise = splitmix64(seed, (start + i) // 4) >> (16 * ((start + i) % 4)) & 0xFFFF
        assert got == (bits + noise) >> 16


def test_neighbouring_elements_are_independent() -> None:
    x = torch.full((2**16,), 1.0 + 2.0**-8)  # in the middle of two values
    up = torch.stack([rounded(x, torch.bfloat16, name=n) for n in "abcdefgh"]).double() - float(x[0])
    signs = torch.sign(up)
    assert bool((signs.abs() == 1).all())
    limit = 5.0 / len(x) ** 0.5
    assert all(abs(float((signs[0, k:] * signs[0, : len(x) - k]).mean())) < limit for k in range(1, 9))
    angles = signs @ signs.T / len(x) - torch.eye(8, dtype=torch.float64)
    assert float(angles.abs().max()) < limit


def test_nearest_is_torchs() -> None:
    x = values(torch.bfloat16)
    for dtype in (*HALVES, torch.float32):
        assert torch.equal(rounded(x, dtype, name="w", by="nearest"), x.to(dtype))
    assert torch.equal(rounded(x, torch.float32, name="w"), x)


def test_kept_is_the_projection_on_the_update() -> None:
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(3, 1000, generator=draw).bfloat16()
    update = 1e-3 * torch.randn(3, 1000, generator=draw)
    exact = base.double() + update.double()
    parts = []
    for i in range(3):
        stored = (base[i].float() + update[i]).bfloat16()
        parts.append(compared(stored, base[i].float(), update[i]))
    stored = (base.float() + update).bfloat16().double()
    kept, far = Kept.sum(parts), (exact - base.double()).square().sum()
    assert kept.survival == pytest.approx(float(((stored - base.double()) * (exact - base.double())).sum() / far))
    assert kept.error == pytest.approx(float((stored - exact).norm() / far.sqrt()))
    assert Kept.sum(reversed(parts)) == kept
    assert (Kept().survival, Kept().error) == (1.0, 0.0)


def test_a_loss_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"a": Kept(4.0, 4.0, 0.0), "b": Kept(6.0, 0.0, 6.0), "buffer": Kept()}
    survival = Survival.of(tensors, torch.bfloat16, "nearest", 100)
    assert (survival.survival, survival.worst) == (0.4, (("b", 0.0),))
    assert Survival.read(json.loads(json.dumps({"other": 1, **survival.to_json()}))) == survival
    with caplog.at_level(logging.WARNING):
        survival.warn("out")
        Survival.of({"a": tensors["a"]}, torch.bfloat16, "nearest", 100).warn("fine")
    assert caplog.messages == [
        "out: rounding takes part of the update (bfloat16, nearest rounding: 40.0 % of the update kept, relative error "
        "0.77). `dtype: float32`, `rounding: stochastic` or a higher learning rate keeps more."
    ]
    assert survival.taken == "rounding to bfloat16 took 60 % of the update"
