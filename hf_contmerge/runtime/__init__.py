"""Ranks, threads, devices, atomic files."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.runtime.crew import Crew as Crew
    from hf_contmerge.runtime.plugins import use_plugin as use_plugin
    from hf_contmerge.runtime.ranks import find_ranks as find_ranks

attach(__name__, {"Crew": "crew", "find_ranks": "ranks", "use_plugin": "plugins"})
