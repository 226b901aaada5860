"""Trains, merges and scores each stage of a recipe.

    accelerate launch hf_contmerge/train.py recipes/quickstart.yml
    accelerate launch hf_contmerge/train.py recipes/quickstart.yml --run runs/x --set merge.0.rule=ema --until merge
    accelerate launch --num_processes 8 hf_contmerge/train.py recipes/magmax-llama.yml
    torchrun --nproc-per-node 2 -- hf_contmerge/train.py recipes/quickstart.yml --run runs/x     (two CPU ranks)

The default recipe is the quickstart. Every phase is resumable, on one CPU or on nodes of GPUs. Every rank runs the same
loop: the main process decides and writes records; all ranks train and score together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# A script's folder comes first on sys.path, where our modules would shadow others of the same name.
if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

from hf_contmerge.commands.main import do
from hf_contmerge.commands.parser import CommandParser
from hf_contmerge.commands.run import add_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; return the exit code."""
    parser = CommandParser(
        prog="train.py",
        description="Train, merge and score, stage after stage.",
        example="accelerate launch --num_processes 8 hf_contmerge/train.py mine.yml",
    )
    add_arguments(parser)
    return do(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
