"""Write requirements.lock and cuda.lock: pinned versions with the hashes of every file of each release.

    make lock

constraints.txt names the versions. Hashes come from PyPI, for all platforms and versions of Python. torch has builds
for the CPU outside PyPI; their hashes are added from where pip is configured to look (PIP_FIND_LINKS,
PIP_EXTRA_INDEX_URL). cuda.lock has the libraries that PyPI's own build for Linux needs. Runs in an environment with
pip-tools.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pip._internal.req.constructors import install_req_from_line
from piptools.repositories import PyPIRepository

ROOT = Path(__file__).parents[2]
CPU_BUILDS = ("torch",)
ON_PYPI = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
HEADER = "# Made by `make lock` from constraints.txt. Install with --require-hashes --no-deps.\n"


def pins() -> list[str]:
    """Return the lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def hashes(pin: str) -> set[str]:
    """Return the hashes of a release on the indexes that pip is configured with."""
    repository = PyPIRepository([], cache_dir=str(ROOT / ".venv-tools" / "cache"))
    with repository.allow_all_wheels():
        return repository.get_hashes(install_req_from_line(pin))


def locked(pins: Sequence[str]) -> Iterator[str]:
    """Yield a requirement with its hashes for each pin."""
    configured = {pin: hashes(pin) for pin in pins if pin.split("==")[0] in CPU_BUILDS}
    os.environ.update(ON_PYPI)
    for pin in pins:
        print(pin, file=sys.stderr, flush=True)
        found = hashes(pin) | configured.get(pin, set())
        yield " \\\n    ".join([pin, *(f"--hash={digest}" for digest in sorted(found))]) + "\n"


def cuda_pins(pins: Sequence[str]) -> list[str]:
    """Return the libraries for CUDA, as pip resolves torch on PyPI; the other packages are pinned."""
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", torch]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, check=True, env=os.environ)
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    known = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    named = [f"{m['name']}=={m['version']}" for m in found if m["name"].lower().replace("_", "-") not in known]
    return sorted(named)


def main() -> None:
    everything = pins()
    (ROOT / "requirements.lock").write_text(HEADER + "".join(locked(everything)))
    (ROOT / "cuda.lock").write_text(HEADER + "".join(locked(cuda_pins(everything))))


if __name__ == "__main__":
    main()
