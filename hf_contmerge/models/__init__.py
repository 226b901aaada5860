"""Reads and writes model folders tensor by tensor; knows adapters without peft."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.models.experts import open_expert as open_expert
    from hf_contmerge.models.folder import resolve_model as resolve_model
    from hf_contmerge.models.loading import load_model as load_model
    from hf_contmerge.models.weights import Weights as Weights

attach(__name__, {"Weights": "weights", "load_model": "loading", "open_expert": "experts", "resolve_model": "folder"})
