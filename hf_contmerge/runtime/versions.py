"""Package versions, recorded with results and compared across ranks."""

from __future__ import annotations

import functools
import importlib.metadata
import socket
from collections.abc import Iterable

from hf_contmerge.errors import ResourceError, mark_shared
from hf_contmerge.runtime.plugins import given_plugins, used_plugins
from hf_contmerge.runtime.ranks import Ranks

_RECORDED_PACKAGES = ("hf_contmerge", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval")


def versions(words: Iterable[str] | None = None) -> dict[str, str]:
    """Return the versions to record with a result.

    `words`: its rule or strategies; by default all used by this process.
    """
    installed = {}
    for package in _RECORDED_PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed | used_plugins(words)


@functools.cache
def version(package: str, parts: int | None = None) -> str:
    """Return an installed package's version; "" if it is missing.

    `parts`: how many of its parts to keep, such as 2 for "2.9".
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return ".".join(installed(package).split(".")[:parts])
    except PackageNotFoundError:
        return ""


_MUST_AGREE = ("hf_contmerge", "torch", "transformers", "tokenizers", "datasets", "accelerate", "lm_eval")


def check_versions(ranks: Ranks) -> None:
    """Raise ResourceError unless all ranks have the same packages and plugin files."""
    if ranks.size == 1:
        return
    ours = {name: version(name) for name in _MUST_AGREE} | given_plugins()
    every = ranks.gather((socket.gethostname(), ours))
    host, first = every[0]
    for rank, (other_host, other) in enumerate(every):
        differ = [f"{n} {other.get(n, '')} and {v}" for n, v in first.items() if other.get(n) != v]
        if differ:
            raise mark_shared(
                ResourceError(
                    f"Rank {rank} (on {other_host}) and rank 0 (on {host}) have different versions: "
                    f"{', '.join(differ)}. Their scores are not comparable. Install the same versions on all machines."
                )
            )
