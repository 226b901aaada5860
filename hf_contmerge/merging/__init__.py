"""Folds experts into one model at constant memory."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.merging.state import MergeState as MergeState
    from hf_contmerge.merging.stream import merge_experts as merge_experts

attach(__name__, {"MergeState": "state", "merge_experts": "stream"})
