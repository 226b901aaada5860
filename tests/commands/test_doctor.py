"""`contmerge doctor`: one line a thing, with what to do."""

import json
from pathlib import Path

import pytest

from hf_contmerge.commands.main import main
from hf_contmerge.loop.plan.doctor import package_findings

Captured = pytest.CaptureFixture[str]
TOKEN = "hf_" + "a1B2" * 9


def test_the_tests_environment_is_fit(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    found = {finding["what"]: finding for finding in json.loads(out)}
    assert {"python", "torch", "transformers", "trl", "peft", "mergekit", "lm-eval", "GPU", "memory", "disk"} <= set(
        found
    )
    assert {"Hub cache", "Hub access"} <= set(found)
    assert found["mergekit-yaml"]["says"] == "knows our merge methods"
    assert all(finding["do"] for finding in found.values() if finding["state"] != "ok")
    assert TOKEN not in out


def test_what_does_not_fit_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose ranges are not met."""
    info = tmp_path / "picky-1.dist-info"
    info.mkdir()
    wants = ("torch>=99", "no-such-package>=1", "numpy>=1", 'gguf>=99; extra == "gguf"')
    lines = ["Metadata-Version: 2.1", "Name: picky", "Version: 1", "Requires-Python: >=3.99"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {want}" for want in wants), ""]))
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.what: finding for finding in package_findings("picky")}
    assert [finding.state for finding in found.values()] == ["bad"] * 3
    assert list(found) == ["python", "torch", "no-such-package"]
    assert "outside the tested range >=99" in found["torch"].says
    assert found["torch"].do == 'pip install "torch>=99"'
    assert found["no-such-package"].says == "missing (expected >=1)"


def test_a_folder_that_is_not_installed() -> None:
    (finding,) = package_findings("hf_contmerge_that_is_not_installed")
    assert (finding.state, finding.do) == ("bad", "pip install hf_contmerge")
