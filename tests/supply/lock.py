"""Write requirements.lock, cuda.lock and cpu.lock: pinned versions with the hashes of every file of each release.

    make lock

constraints.txt names the versions. Hashes come from PyPI, for all platforms and versions of Python. cuda.lock has the
libraries that PyPI's torch for Linux needs. cpu.lock has PyTorch's smaller builds without CUDA, from where pip is
configured to look (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL); it stays as it is if there are none. Runs in an environment
with pip-tools.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from pip._internal.req.constructors import install_req_from_line
from piptools.exceptions import NoCandidateFound
from piptools.repositories import PyPIRepository

ROOT = Path(__file__).parents[2]
ON_PYPI = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
HEADER = "# Made by `make lock` from constraints.txt. Install with --require-hashes --no-deps."


def pins() -> list[str]:
    """Return the lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def hashes(pin: str) -> set[str]:
    """Return the hashes of a release on the indexes that pip is configured with."""
    print(pin, file=sys.stderr, flush=True)
    repository = PyPIRepository([], cache_dir=str(ROOT / ".venv-tools" / "cache"))
    with repository.allow_all_wheels():
        return repository.get_hashes(install_req_from_line(pin))


def write(name: str, pins: Sequence[str]) -> None:
    """Write a lock of these pins."""
    lines = [" \\\n    ".join([pin, *(f"--hash={digest}" for digest in sorted(hashes(pin)))]) for pin in pins]
    (ROOT / name).write_text("\n".join([HEADER, *lines, ""]))


def cuda_pins(torch: str, pins: Sequence[str]) -> list[str]:
    """Return the libraries for CUDA, as pip resolves torch on PyPI; the other packages are pinned."""
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", torch]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, check=True)
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    known = {canonicalize_name(pin.split("==")[0]) for pin in pins}
    return sorted(f"{m['name']}=={m['version']}" for m in found if canonicalize_name(m["name"]) not in known)


def main() -> None:
    everything = pins()
    torch = next(pin for pin in everything if pin.startswith("torch=="))
    try:
        write("cpu.lock", [f"{torch}+cpu"])
    except NoCandidateFound as error:
        print(f"cpu.lock is left as it is: {error}", file=sys.stderr)
    os.environ.update(ON_PYPI)
    write("requirements.lock", everything)
    write("cuda.lock", cuda_pins(torch, everything))


if __name__ == "__main__":
    main()
