"""What the digests cost: their share of a merge's processor time.

    python tests/benchmarks/digests.py             60M parameters, magmax, opcm
    python tests/benchmarks/digests.py --quick     a tiny model

The second expert is added to a state and the model written, in this process. Counted are the digests that show changed
bytes: of the base and the state before, of the state after, of the written model. The expert's SHA-256, by which twins
are found, was taken before there were any of these; it is a column of its own.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import models

from hf_contmerge import MergeState
from hf_contmerge.merging import _log, state
from hf_contmerge.models import identity


class Clock:
    """Sums up the processor time of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="60M")
    args = parser.parse_args()
    size = "tiny" if args.quick else args.size
    digests, experts = Clock(), Clock()
    for module, name in ((_log, "changed_files"), (identity, "changed_files"), (state, "digests_of")):
        setattr(module, name, digests.around(getattr(module, name)))
    state.expert_sha256 = experts.around(state.expert_sha256)
    base = models.base_model(args.models, size)
    first, second = models.experts(base, 2)
    print(measure.machine(args.models), end="\n\n")
    print("| rule | command | processor, s | digests, s | share | the expert's SHA-256, s |\n|---|---|---|---|---|---|")
    for rule in ("magmax", "opcm"):
        with tempfile.TemporaryDirectory(dir=args.models) as scratch:
            folder = Path(scratch)
            merge = MergeState.create(folder / "state", base=base, rule=rule).add(first)
            for command, do in {
                "merge add": lambda merge=merge: merge.add(second),
                "merge export": lambda merge=merge, folder=folder: merge.export(folder / "merged"),
            }.items():
                digests.seconds = experts.seconds = 0.0
                start = time.process_time()
                do()
                whole = time.process_time() - start
                share = 100 * digests.seconds / whole
                cells = (f"{whole:.2f}", f"{digests.seconds:.3f}", f"{share:.1f} %", f"{experts.seconds:.2f}")
                print(f"| {rule} | {command} | {' | '.join(cells)} |")
            shutil.rmtree(folder / "merged")


if __name__ == "__main__":
    main()
