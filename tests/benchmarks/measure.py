"""What a command costs as a whole process: seconds on the clock, processor seconds, peak memory. Standard library only.

    python tests/benchmarks/measure.py COMMAND [WORD ...]        one run, as a line

Peak memory is the kernel's `ru_maxrss` of the finished command, which is what `/usr/bin/time -v` prints as "Maximum
resident set size": pages of mapped files count as long as they are mapped. Where a command starts others, it is that
of the largest process. A small wrapper process asks for it, because a command inherits the mark of whoever starts it,
and a benchmark that has loaded torch would be measured instead; the wrapper's own 20 MB are the least that is seen.

Commands are compared in pairs, A B A B ..., so that a machine that slows down slows both; a ratio is the median of the
pairs' ratios. The page cache is not dropped: all inputs are read from memory after the first run. Before each run the
earlier ones' output is deleted and flushed (`sync`), which is not counted.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

_WRAP = "--wrap"
_SHOWN = 4000  # characters of a failed command's words


@dataclass(frozen=True)
class Command:
    """Words to run, what to add to the environment, and the folder or file to delete before each run."""

    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, processor seconds of all its processes, bytes of the largest one, and what it printed."""

    wall: float
    cpu: float
    peak: int
    printed: str = ""


def run(command: Command) -> Cost:
    """Run a command once. Ends the benchmark with its words where it fails."""
    if command.output and command.output.exists():
        shutil.rmtree(command.output)
    os.sync()
    wrapped = [sys.executable, "-I", "-S", __file__, _WRAP, *command.words]
    done = subprocess.run(wrapped, capture_output=True, text=True, env={**os.environ, **command.env}, check=False)
    if done.returncode:
        sys.exit(f"Failed with exit code {done.returncode}: {' '.join(command.words)}\n{done.stderr[-_SHOWN:]}")
    found = json.loads(done.stdout)
    return Cost(found["wall"], found["cpu"], found["peak"], done.stderr)


def alternate(commands: Mapping[str, Command], *, repeats: int) -> dict[str, list[Cost]]:
    """Run the commands in turn, `repeats` times round; return each one's costs, in the order of the rounds."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(repeats):
        for name, command in commands.items():
            costs[name].append(run(command))
            print(f"round {number + 1}: {name}: {costs[name][-1].wall:.2f} s", file=sys.stderr, flush=True)
    return costs


def wall(cost: Cost) -> float:
    """Return seconds on the clock: what to compare."""
    return cost.wall


def cpu(cost: Cost) -> float:
    """Return processor seconds: what to compare on a machine that others use too."""
    return cost.cpu


def peak(cost: Cost) -> float:
    """Return peak memory in bytes: what to compare."""
    return cost.peak


def median(costs: Sequence[Cost], what: Callable[[Cost], float] = wall) -> float:
    """Return the median of one figure over the rounds."""
    return statistics.median(map(what, costs))


def ratio(
    ours: Sequence[Cost],
    theirs: Sequence[Cost],
    what: Callable[[Cost], float] = wall,
    *,
    starts: Sequence[float] = (0, 0),
) -> float:
    """Return the median of the rounds' ratios ours / theirs, less what each costs anyway (`starts`)."""
    return statistics.median((what(a) - starts[0]) / (what(b) - starts[1]) for a, b in zip(ours, theirs, strict=True))


def cost_rows(costs: Mapping[str, Sequence[Cost]]) -> list[str]:
    """Return a Markdown table: medians over the rounds, and the range of the seconds on the clock."""
    rows = ["| command | wall, s | range, s | processor, s | peak memory, MiB |", "|---|---|---|---|---|"]
    for name, found in costs.items():
        walls = [c.wall for c in found]
        others = f"{median(found, cpu):.2f} | {median(found, peak) / 2**20:.0f}"
        rows.append(f"| {name} | {median(found):.2f} | {min(walls):.2f} - {max(walls):.2f} | {others} |")
    return rows


def verdict(what: str, value: float, limit: float, *, at_least: bool = False) -> str:
    """Return a line that says whether a figure is within its target."""
    met = value >= limit if at_least else value <= limit
    shown = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    return f"- {what}: **{shown}** (target {'>=' if at_least else '<='} {limit:g}: {'met' if met else 'MISSED'})"


def contmerge(*words: str) -> list[str]:
    """Return the words of one of our commands. Ends the benchmark where it does not exist."""
    program = Path(sys.executable).with_name("contmerge")
    if not program.exists():
        sys.exit(f"No {program}: install this package into the environment that runs the benchmark (`make install`).")
    asked = [str(program), *[w for w in words[:2] if not w.startswith("-")], "--help"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"`{' '.join(asked)}` fails, so there is nothing to measure yet:\n{done.stderr[-_SHOWN:]}")
    return [str(program), *words]


def mergekit_yaml(*words: str) -> list[str]:
    """Return the words of a run of the stock mergekit-yaml."""
    return [str(Path(sys.executable).with_name("mergekit-yaml")), *words]


def machine(place: Path, *packages: str) -> str:
    """Return one line: processor, cores, memory, the disk of a folder, date, versions."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{p} {importlib.metadata.version(p)}" for p in ("torch", *packages)]
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB of memory, {_disk(place)}; {platform.system()} "
        f"{platform.release().split('-')[0]}; {date.today().isoformat()}; {', '.join(versions)}."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _disk(place: Path) -> str:
    """Return the kind of disk and the file system of a folder, as far as the kernel tells."""
    number = place.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    turns = next((p for p in (device / "queue/rotational", device.parent / "queue/rotational") if p.exists()), None)
    kind = "a virtual disk" if device.name.startswith(("vd", "xvd")) else "an SSD"
    if turns is None:
        kind = "no disk of its own"
    elif turns.read_text().strip() == "1" and kind == "an SSD":
        kind = "a hard disk"
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = [(len(m), system) for m, system in mounts if place.resolve().is_relative_to(m)]
    return f"{kind} with {max(above)[1]}" if above else kind


def _wrap(words: Sequence[str]) -> int:
    """Run a command, its words to standard error; print its cost as JSON; return its exit code."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=2)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    print(json.dumps({"wall": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if sys.argv[1:2] == [_WRAP]:
        sys.exit(_wrap(sys.argv[2:]))
    once = run(Command(sys.argv[1:]))
    print(once.printed, end="")
    print(f"{once.wall:.3f} s, {once.cpu:.3f} s of processor time, {once.peak / 2**20:.1f} MiB at most")
