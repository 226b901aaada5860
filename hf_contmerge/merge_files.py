"""The files that merging writes: a folder that appears whole, shards that all ranks write into, room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hf_contmerge.errors import ContmergeError, ResourceError, RunError, size
from hf_contmerge.places import remove
from hf_contmerge.tensor_files import WeightsWriter
from hf_contmerge.work_sharing import Crew, together


@contextmanager
def new_folder(out: Path, crew: Crew) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, which takes its place when all has been written; after an error, it is gone.

    Raises RunError if `out` exists and is not empty.
    """
    out = out.absolute()  # "." has no name of its own
    scratch = out.with_name(f".{out.name}.partial")

    def make() -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} exists and is not empty. Name a new folder, or remove that one.")
        remove(scratch)
        scratch.mkdir(parents=True)

    def publish() -> None:
        remove(out)
        scratch.rename(out)

    together(crew.ranks, make, leader_only=True)
    try:
        yield scratch
    except (ContmergeError, OSError, ValueError):
        if leads(crew):
            remove(scratch)
        raise
    together(crew.ranks, publish, leader_only=True)


def leads(crew: Crew) -> bool:
    """Say whether this is the rank that makes the files."""
    return crew.ranks.rank == 0


@contextmanager
def opened(crew: Crew, writers: Sequence[WeightsWriter], later: Sequence[WeightsWriter] = ()) -> Iterator[None]:
    """Make and open the files to be written, once there is known to be room for them; close them when all are done.

    `later`: what is to be written after that, for which there must be room too.
    """
    with ExitStack() as stack:

        def create() -> None:
            check_room([*writers, *later])
            for writer in writers:
                stack.enter_context(writer)

        def enter() -> None:
            for writer in writers:
                stack.enter_context(writer)

        together(crew.ranks, create, leader_only=True)
        together(crew.ranks, enter if not leads(crew) else lambda: None)
        yield


def check_room(writers: Sequence[WeightsWriter]) -> None:
    """Raise ResourceError if the disk cannot hold what will be written."""
    needed: dict[int, tuple[Path, int]] = {}
    for writer in writers:
        writer.folder.mkdir(exist_ok=True)
        device = writer.folder.stat().st_dev
        needed[device] = (writer.folder, needed.get(device, (writer.folder, 0))[1] + writer.nbytes)
    for folder, need in needed.values():
        free = shutil.disk_usage(folder).free
        if need > free:
            raise ResourceError(
                f"Merging writes {size(need)} to the disk of {folder}, which has {size(free)} free. Free some room, or "
                "name a folder on another disk. Nothing was written."
            )
