"""What `make gpu` tells where a part, or a process of one, ends early."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys.models import perturbed, toy_llama

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import gpu
import gpu_parts

STARTER = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_a_part_that_takes_too_long_leaves_no_process_behind() -> None:
    """Also none in a session of its own, as torchrun starts its ranks."""
    child = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout
    rank = int(child.stdout.readline())
    assert gpu.kill(child) == -9
    child.stdout.close()
    until = time.monotonic() + 30
    while _runs(rank) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(rank)


def _runs(pid: int) -> bool:
    """Check for a process that is no mere entry of one that has ended."""
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_command_that_takes_too_long_is_told_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"more than 1 s[\s\S]*so far"):
        gpu_parts.child("-c", "import time; print('so far', flush=True); time.sleep(60)", limit=1)
    assert "so far" in capsys.readouterr().out


def test_rows_of_an_earlier_run_do_not_pass_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.Table("merging", tmp_path / "merging.json").add("magmax", "fast", met=True)
    monkeypatch.setattr(gpu, "TOTAL", 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--parts", "merging"])
    gpu.main()
    [row] = json.loads((tmp_path / "gpu.json").read_text())
    assert (row["what"], row["met"]) == ("not run", False)


def test_a_gap_that_is_no_number_is_the_largest() -> None:
    assert math.isnan(gpu_parts.largest([0.0, math.nan, 1.0]))
    assert gpu_parts.largest([0.0, 1.0]) == 1.0


def test_every_case_of_the_strategies_is_told(tmp_path: Path) -> None:
    """One that its process did not reach, and one that cannot be compared, hide no other."""
    good = {"losses": [[2.0, 2.0, 1.0, 1.0]] * 2, "seconds": 1.0}
    found = {"full": good, "unmoved": good, "lora": {"failed": "not reached"}, "migu": good}
    for device in ("device", "cpu"):
        for name in ("full", "unmoved", "migu"):
            base = toy_llama(tmp_path / device / name / "base", seed=0)
            perturbed(base, tmp_path / device / name / "first", seed=1, size=0.0 if name == "unmoved" else 0.01)
        (tmp_path / device / "found.json").write_text(json.dumps(found))
    table = gpu.Table("strategies", tmp_path / "strategies.json")
    gpu_parts.compare_courses(table, tmp_path / "device", tmp_path / "cpu", "bf16", 0.3)
    told = {row.what: row.met for row in table.rows}
    assert told == {"full, bf16": True, "unmoved, bf16": False, "lora, bf16": False, "migu, bf16": True}


@pytest.mark.slow
def test_parts_run_where_there_is_no_card(tmp_path: Path) -> None:
    """With the package's functions as they are now."""
    words = [gpu.__file__, "--quick", "--device", "cpu", "--out", str(tmp_path), "--parts", "training", "packing"]
    subprocess.run([sys.executable, *words], check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in rows} == {"training", "packing"}
    assert not [row for row in rows if "fail" in row["figure"] or "exit code" in row["figure"]]
