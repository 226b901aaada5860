"""Runs commands in processes of their own, on a disk with a fault.

The processes are forked from one that has loaded the libraries, which takes ten seconds.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toys import TESTS
from toys.faulty_disk import Fault

# Reads orders from stdin, one JSON a line.
SERVER = r"""
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
import lm_eval.models.huggingface, trl.trainer.sft_trainer, transformers.models.llama.modeling_llama, peft
import hf_contmerge.loop.plan.checks, hf_contmerge.report.write, hf_contmerge.merging.state, numpy
import hf_contmerge.merging.in_mergekit.replay, hf_contmerge.scoring.score, hf_contmerge.report.push
from hf_contmerge.commands.main import main
from toys.faulty_disk import Fault, install

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(order["environment"])
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread: the same steps in each life
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1); os.dup2(log, 2)
        disk = install(order["root"], Fault(**order["fault"]))
        code = 1
        try:
            code = main(order["argv"])
            disk.finish(order["log"] + ".journal")
            with open(order["log"] + ".steps", "w") as file:
                json.dump(disk.names, file)
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Forks:
    """The server, and the folder whose files it watches."""

    process: subprocess.Popen[str]
    root: Path

    @property
    def log(self) -> Path:
        return self.root.with_name(f"{self.root.name}.log")

    @property
    def journal(self) -> Path:
        return Path(f"{self.log}.journal")

    def steps(self) -> list[str]:
        """Return the steps of the last command that ended."""
        return json.loads(Path(f"{self.log}.steps").read_text())

    def start(self, *argv: object, fault: Fault | None = None, **environment: str) -> int:
        """Start a command; return its process id."""
        cache = {"HF_CONTMERGE_CACHE": f"{self.root}.cache"}  # no other run's scores
        order = {"argv": [str(word) for word in argv], "root": str(self.root), "log": str(self.log),
                 "fault": asdict(fault or Fault()), "environment": {**cache, **environment}}  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Return the exit code of the command that was started; -9 for a kill."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def run(self, *argv: object, fault: Fault | None = None, **environment: str) -> int:
        self.start(*argv, fault=fault, **environment)
        return self.wait()


@contextmanager
def forks(root: Path, **variables: str) -> Iterator[Forks]:
    """Start a server for commands on the files below `root`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Forks(process, root)
        assert process.stdin
        process.stdin.close()


_OF_THE_CLOCK = ("seconds", "train_seconds", "peak_memory_bytes", "finished", "added", "cached")
_SCRATCH = (".lock", ".report.lock")
CACHE = "cache"  # of scores, whose keys are of inodes


_OF_THE_PLACE = ("costs", "digests", "inputs")
"""Files about this time or place."""


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that commands leave behind: the bytes of the files, records without times and memory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in _SCRATCH or path.stem in _OF_THE_PLACE or name.startswith(CACHE):
            continue
        if path.is_symlink() or not path.is_file():
            found[name] = None  # it must be there
        elif path.suffix == ".json":
            record = json.loads(path.read_text(encoding="utf-8"))
            found[name] = _timeless({**record, "sha256": ""} if "format" in record else record)  # of its times, too
        else:
            data = re.sub(rb"\n# sha256: \w+\n$", b"\n", path.read_bytes())
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _OF_THE_CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
