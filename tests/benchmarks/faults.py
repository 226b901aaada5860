"""The figures of SECURITY.md: what was tried, and what held.

    python tests/benchmarks/faults.py             the default tests' sample (ten minutes)
    python tests/benchmarks/faults.py --long      the slow tests too, and a soak of 200 stages (hours)
    python tests/benchmarks/faults.py --long --seconds 100      as many faults of each command as fit 100 s (an hour)

The tests do the work and count: this runs them, adds up what they record (the fixture `figure`), and the cases of tests
that are one try each. The row of the fuzzer is read from out/fuzz.txt: make fuzz | tee out/fuzz.txt. A test that fails
is named, and ends this with 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parents[1]
FILES = ("test_disk", "test_crash", "test_stops", "test_integrity", "test_strangers", "test_secrets")
CASES = {
    "test_hostile_file_is_refused": "hostile files, refused",
    "test_training_stops_with_a_checkpoint_and_continues": "signals, obeyed and continued",
    "test_a_merge_stops_and_leaves_the_state_unchanged": "signals, obeyed and continued",
    "test_two_ranks_stop_with_one_checkpoint": "signals, obeyed and continued",
}
"""A test of which each case is a try -> its row."""


def counted(report: Path) -> Iterator[tuple[str, int, int]]:
    """Yield row, tried and held, of a report in JUnit's form."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = any(case.find(word) is not None for word in ("failure", "error"))
        if row := CASES.get(case.get("name", "").partition("[")[0]):
            yield row, 1, int(not failed)
        for entry in case.iter("property"):
            name = entry.get("name", "")
            if name.startswith("figure "):
                tried, held = map(int, entry.get("value", "").split())
                yield name.removeprefix("figure "), tried, held


def failures(report: Path) -> list[str]:
    """Return the names of tests that failed."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]


def fuzzed(file: Path) -> Iterator[str]:
    """Yield the fuzzer's row, from the last line of its table."""
    if file.is_file() and (found := re.findall(r"^all +([\d,]+) +(\d+)$", file.read_text(), re.MULTILINE)):
        executions, findings = found[-1]
        yield f"| inputs of the fuzzer, accepted or refused | {executions} | {findings} findings |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="all faults, and the whole soak")
    parser.add_argument("--seconds", default="inf", help="of each slow test of the disk, with --long")
    args = parser.parse_args()
    files = [str(TESTS / "scenarios" / f"{name}.py") for name in FILES]
    all_day = {"FAULTS_SECONDS": args.seconds} if args.long else {}
    env = {
        **os.environ,
        **all_day,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        which = ["-m", "not gpu", "--timeout=0"] if args.long else []
        words = ["-m", "pytest", "-q", *which, "-o", "junit_family=xunit1", f"--junitxml={report}", *files]
        subprocess.run([sys.executable, *words], cwd=TESTS.parent, env=env, stdout=sys.stderr, check=False)
        for row, tried, held in counted(report):
            rows[row] = [rows[row][0] + tried, rows[row][1] + held]
        failed = failures(report)
    soak = [sys.executable, str(TESTS / "benchmarks" / "soak.py"), *([] if args.long else ["--quick"])]
    slopes = subprocess.run(soak, env=env, capture_output=True, text=True, check=True).stdout
    print("| | tried | held |\n|---|---:|---:|")
    print("\n".join(f"| {row} | {tried:,} | {held:,} |" for row, (tried, held) in rows.items()))
    print("\n".join(fuzzed(TESTS.parent / "out" / "fuzz.txt")))
    print(slopes)
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
