"""What `contmerge doctor` looks at: packages, devices, disk, Hub, mergekit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from hf_contmerge.errors import size
from hf_contmerge.runtime.versions import version

_US = "hf_contmerge"
_SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "mergekit", "lm-eval", "huggingface-hub")
"""Packages with a line of their own; others only if they do not fit."""
_LITTLE_DISK, _LITTLE_MEMORY = 20 * 2**30, 4 * 2**30
_MERGEKIT_SECONDS = 300
_ASK_MERGEKIT = """
import sys, torch
from mergekit.merge_methods import registry
try:
    registry.get("magmax")
except RuntimeError:
    sys.exit(3)
"""


class Finding(NamedTuple):
    """One line of the doctor's."""

    what: str
    state: Literal["ok", "note", "bad"]
    says: str
    do: str = ""


def findings() -> Iterator[Finding]:
    """Yield a finding for each package and each part of the machine."""
    yield from package_findings()
    yield from _device_findings()
    yield _cache_finding()
    yield _token_finding()
    yield _mergekit_finding()


def package_findings(package: str = _US) -> Iterator[Finding]:
    """Compare a package's requirements, and Python, with the installed versions."""
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        yield Finding(package, "bad", "not installed: its commands run from a folder", "pip install hf_contmerge")
        return
    wanted = installed.metadata["Requires-Python"] or ""
    yield _fits(Requirement(f"python{wanted}"), platform.python_version(), "Use another Python")
    for requirement in map(Requirement, installed.requires or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _fits(
            requirement, version(requirement.name), f'pip install "{requirement.name}{requirement.specifier}"'
        )
        if finding.state != "ok" or requirement.name in _SHOWN:
            yield finding


def _fits(requirement: Requirement, found: str, cure: str) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    if not found:
        return Finding(name, "bad", f"missing (expected {wanted})", cure)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, "bad", f"{found} is outside the tested range {wanted}", cure)
    return Finding(name, "ok", f"{found} ({wanted or 'any'})")


def _device_findings() -> Iterator[Finding]:
    import torch

    from hf_contmerge.loop.plan._machine import this_machine

    machine = this_machine(Path())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("GPU", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "ok", "Apple's, by MPS")
    else:
        why = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is for CPUs"
        yield Finding(
            "GPU", "note", f"none; {why}", "Small models train on the CPU; `contmerge plan` estimates the time"
        )
    little = machine.available < _LITTLE_MEMORY
    yield Finding(
        "memory", "note" if little else "ok", f"{size(machine.available)} of {size(machine.memory)} free",
        "Close other programs, or let `contmerge plan` say what a recipe needs" if little else "",
    )  # fmt: skip
    little = machine.disk < _LITTLE_DISK
    yield Finding(
        "disk", "note" if little else "ok", f"{size(machine.disk)} free here ({Path().absolute()})",
        "Free some, or put runs elsewhere with --run; `contmerge plan` says how much a recipe needs" if little else "",
    )  # fmt: skip


def _cache_finding() -> Finding:
    from hf_contmerge.models.hub import hub_setup

    cache = hub_setup().cache
    place = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(place, os.W_OK):
        return Finding("Hub cache", "bad", f"{cache} cannot be written", "Set HF_HOME to a folder of yours")
    return Finding("Hub cache", "ok", f"{cache}{'' if cache.exists() else ' (not there yet)'}")


def _token_finding() -> Finding:
    from hf_contmerge.models.hub import hub_setup

    setup = hub_setup()
    if setup.offline:
        return Finding("Hub access", "note", "HF_HUB_OFFLINE is set", "Unset it to fetch models and to push")
    if not setup.has_token:
        return Finding("Hub access", "note", "no token", "`hf auth login`, for private or gated models and to push")
    return Finding("Hub access", "ok", "a token is set")


def _mergekit_finding() -> Finding:
    """Ask a fresh process, as the stock `mergekit-yaml` is one."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_MERGEKIT], capture_output=True, text=True, timeout=_MERGEKIT_SECONDS, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return Finding("mergekit-yaml", "note", "did not answer", "Try again on an idle machine")
    if asked.returncode == 0:
        return Finding("mergekit-yaml", "ok", "knows our merge methods")
    if asked.returncode == 3:
        says, unset = "does not know our merge methods", "HF_CONTMERGE_AUTOLOAD and TORCH_DEVICE_BACKEND_AUTOLOAD"
        cure = f"Install hf_contmerge here and unset {unset}, or use `contmerge yaml`"
        return Finding("mergekit-yaml", "bad", says, cure)
    last = asked.stderr.strip().splitlines()[-1:] or ["no message"]
    return Finding("mergekit-yaml", "bad", f"cannot be loaded: {last[0]}", "pip install mergekit")
