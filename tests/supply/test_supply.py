"""The lock holds what is pinned, with hashes; each dependency says what it is for."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from toys import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
INSTALLED = ("dev", "quickstart")
"""The extras of `make install`."""


def requirements(*extras: str) -> list[Requirement]:
    named = [r for extra in extras for r in EXTRAS[extra]]
    return [Requirement(r) for r in (*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *named)]


def locked(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield package, version and hashes."""
    lines = (ROOT / name).read_text().replace(" \\\n", " ").splitlines()
    for line in lines:
        if not line.startswith("#"):
            pin, *hashes = line.split()
            package, version = pin.split("==")
            yield canonicalize_name(package), version, hashes


@pytest.mark.parametrize("name", ["requirements.lock", "cuda.lock", "cpu.lock"])
def test_every_locked_file_has_a_hash(name: str) -> None:
    for package, _, hashes in locked(name):
        assert hashes, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes), package


def test_the_lock_is_of_constraints() -> None:
    """`make lock` was given after the last change."""
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert [(canonicalize_name(name), version) for name, version in pins] == [
        (package, version) for package, version, _ in locked("requirements.lock")
    ]


def test_the_build_for_the_cpu_is_of_the_same_version() -> None:
    versions = {package: version for package, version, _ in locked("requirements.lock")}
    assert [(package, version) for package, version, _ in locked("cpu.lock")] == [("torch", f"{versions['torch']}+cpu")]


def test_the_lock_has_all_that_the_project_needs() -> None:
    versions = {package: version for package, version, _ in locked("requirements.lock")}
    for wanted in requirements(*INSTALLED):
        assert versions.get(canonicalize_name(wanted.name), "") in wanted.specifier, wanted


def test_other_platforms_have_hashes_too() -> None:
    """A package with compiled code has files for several."""
    count = {package: len(hashes) for package, _, hashes in locked("requirements.lock")}
    assert min(count[package] for package in ("torch", "numpy", "pyarrow", "safetensors", "tokenizers")) > 4


def test_each_dependency_says_what_it_is_for() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page[page.index("## Dependencies") :]
    reasons = {names: why.strip() for names, why in re.findall(r"^\| (`[^|]+) \|([^|]+)\|$", section, re.MULTILINE)}
    explained = {canonicalize_name(name) for names in reasons for name in re.findall(r"`([^`]+)`", names)}
    assert all(len(why.split()) >= 1 for why in reasons.values())
    assert explained == {canonicalize_name(r.name) for r in requirements(*EXTRAS)}
