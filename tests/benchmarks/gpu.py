"""All that can be asked of one GPU, in one go: does it work, is it what the CPU does, and how fast is it.

    python tests/benchmarks/gpu.py                          everything: 25 minutes at most
    python tests/benchmarks/gpu.py --parts merging opcm     some parts only; earlier ones' rows are kept
    python tests/benchmarks/gpu.py --quick --device cpu     to see that the script works, where there is no GPU

Each part is a process with a time limit, so that nothing that happens in one harms another. OUT/gpu.md and OUT/gpu.json
are written after each, and say what failed, with the last lines, and what was not run. OUT/<part>.log has all words.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measure

TAIL = 12  # lines of a failure that the table keeps
TESTS = Path(__file__).parents[1]
LIMITS = {
    "machine": 60, "tests": 600, "merging": 300, "opcm": 300, "drivers": 240, "factors": 90, "strategies": 420,
    "training": 180, "packing": 240, "scoring": 240, "ranks": 240,
}  # fmt: skip
"""Seconds that a part may take at most, in the order in which they run."""
TOTAL = 1500
NEVER = (
    "pairs of strategies: `pytest -m 'gpu and slow'`", "qlora: bitsandbytes needs wheels of 60 MB and more",
    "DeepSpeed ZeRO-3", "vLLM", "several GPUs: NCCL, FSDP2 and `parallel: layers` or `tensor`",
    "a real model: all weights are random",
)  # fmt: skip
"""What no part tries."""


@dataclass
class Row:
    """One finding. `met` is None where there is no target."""

    part: str
    what: str
    figure: str
    target: str = ""
    met: bool | None = None
    more: str = ""

    def cells(self) -> str:
        met = {True: "yes", False: "**NO**", None: ""}[self.met]
        return f"| {self.part} | {self.what} | {self.figure} | {self.target} | {met} |"


@dataclass
class Table:
    """A part's rows, in a file from the first one on."""

    part: str
    file: Path
    device: str = "cuda"
    quick: bool = False
    ends: float = math.inf
    """When the part is killed, by time.monotonic()."""
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, figure: str, target: str = "", *, met: bool | None = None, more: str = "") -> None:
        """Add a row, and write and print it."""
        row = Row(self.part, what, figure, target, met, more)
        self.rows.append(row)
        scratch = self.file.with_suffix(".new")  # a part may be killed at any moment
        scratch.write_text(json.dumps([asdict(r) for r in self.rows], indent=1), encoding="utf-8")
        scratch.replace(self.file)
        print(row.cells(), more, sep="\n" if more else "", flush=True)

    def within(self, what: str, value: float, limit: float, *, unit: str = "") -> None:
        """Add a row with an upper limit."""
        self.add(what, f"{value:.2g}{unit}", f"<= {limit:g}{unit}", met=value <= limit)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Do something whose failure is a finding, and keeps nothing else from being tried."""
        try:
            yield
        except (Exception, SystemExit) as error:  # of any library: this is what the first run is for
            traceback.print_exc()
            self.add(what, f"failed: {type(error).__name__}", met=False, more=tail(traceback.format_exc()))


def tail(text: str) -> str:
    """Return the last lines of a failure."""
    return "\n".join(text.strip().splitlines()[-TAIL:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument(
        "--parts", nargs="+", default=list(LIMITS), choices=LIMITS, metavar="PART", help=" ".join(LIMITS)
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that the script works")
    parser.add_argument("--scratch", type=Path, default=None, help="for models (default: a temporary folder; 25 GB)")
    parser.add_argument("--do", choices=LIMITS, help=argparse.SUPPRESS)  # in the process of a part
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)  # that it has
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.do:
        do(args)
        return
    for part in args.parts:  # rows of an earlier run would pass for this one's
        (args.out / f"{part}.json").unlink(missing_ok=True)
    start = time.monotonic()
    given = args.scratch and contextlib.nullcontext(args.scratch.absolute())
    with given or tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            left = TOTAL - (time.monotonic() - start)
            if left > 0:
                run_part(part, args, Path(scratch), min(LIMITS[part], left))
            else:
                one_row(part, args.out, "not run", f"the {TOTAL} s of all parts were over")
            write_table(args.out)
    print(f"\n{time.monotonic() - start:.0f} s in all\n\n{(args.out / 'gpu.md').read_text(encoding='utf-8')}")


def do(args: argparse.Namespace) -> None:
    """Carry out one part, in this process."""
    ends = time.monotonic() + args.seconds
    import gpu_parts  # loads torch

    table = Table(args.do, args.out / f"{args.do}.json", args.device, args.quick, ends)
    work: Callable[[Table, Path], None] = getattr(gpu_parts, args.do)
    with table.attempt("the whole part"):
        work(table, args.scratch)


def run_part(part: str, args: argparse.Namespace, scratch: Path, limit: float) -> None:
    """Run one part in a process with a time limit; its rows are in its file, whatever becomes of it."""
    home = scratch / part
    home.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "--do", part, "--out", str(args.out), "--device", args.device]
    words += ["--seconds", str(limit)]
    words += ["--scratch", str(home), *(["--quick"] if args.quick else [])]
    print(f"== {part} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    with (args.out / f"{part}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=surroundings(), start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = kill(child)
        except BaseException:
            kill(child)
            raise
    seconds = time.monotonic() - start
    last = tail((args.out / f"{part}.log").read_text(encoding="utf-8", errors="replace"))
    if code:
        why = f"took more than {limit:.0f} s" if seconds >= limit else f"ended with exit code {code}"
        one_row(part, args.out, "the process", why, more=last)
    print(f"   {seconds:.0f} s, exit code {code}", flush=True)


def kill(child: subprocess.Popen[Any]) -> int:
    """Kill a process and all that it has started; return its exit code.

    torchrun starts each rank in a session of its own, so that killing a group leaves the ranks on the card.
    """
    parents, started = dict(map(parent_of, Path("/proc").glob("[0-9]*/stat"))), {child.pid}
    while more := {pid for pid, parent in parents.items() if parent in started} - started:
        started |= more
    for stop in (functools.partial(os.killpg, child.pid), *(functools.partial(os.kill, pid) for pid in started)):
        with contextlib.suppress(ProcessLookupError):
            stop(signal.SIGKILL)
    return child.wait()


def parent_of(stat: Path) -> tuple[int, int]:
    """Return a process and its parent; 0 for one that has ended."""
    try:
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        fields = ["", "0"]
    return int(stat.parent.name), int(fields[1])


def surroundings() -> dict[str, str]:
    """Return the environment of a part: no network, no cached scores, and this checkout first."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    fixed = {"HF_HUB_OFFLINE": "1", "HF_CONTMERGE_CACHE": "off", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


def one_row(part: str, out: Path, what: str, figure: str, more: str = "") -> None:
    """Add a row to what a part has left behind."""
    table = Table(part, out / f"{part}.json")
    table.rows = rows_of(part, out)
    table.add(what, figure, met=False, more=more)


def rows_of(part: str, out: Path) -> list[Row]:
    file = out / f"{part}.json"
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def write_table(out: Path) -> None:
    """Write OUT/gpu.json and OUT/gpu.md from what is there by now."""
    rows = [row for part in LIMITS for row in rows_of(part, out)]
    (out / "gpu.json").write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")
    lines = [f"# On {card()}", "", machine(out), "", "| part | what | figure | target | met |", "|---|---|---|---|---|"]
    lines += [row.cells() for row in rows]
    missing = [part for part in LIMITS if not rows_of(part, out)]
    lines += ["", "Not run:", "", *(f"- the part `{part}`" for part in missing), *(f"- {what}" for what in NEVER)]
    for row in rows:
        if row.more:
            lines += ["", f"## {row.part}: {row.what}", "", "```", row.more, "```"]
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def card() -> str:
    """Return the card's name, without loading torch."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().replace(",", ", driver")
    except (OSError, subprocess.CalledProcessError):
        return "no GPU that nvidia-smi knows"


def machine(out: Path) -> str:
    packages: Sequence[str] = ("transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "mergekit", "numpy")
    return measure.machine(out, *(p for p in packages if is_installed(p)))


def is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
