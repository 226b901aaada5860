"""The fields of a run's records, as their readers need them.

A forged record can have a fitting seal, too.
"""

from __future__ import annotations

from typing import Any

NUMBER_OR_NONE = (float, None)
PARAMETERS = {str: (bool, float, str, None)}
COEFFICIENTS = {"weight?": float, "chosen?": {str: float}}
"""Of an expert in a merge."""
SURVIVAL = {
    "dtype": str, "rounding": str, "survival": float, "error": float, "nbytes": int, "worst": [[str, float]],
}  # fmt: skip
_COST = {
    "seconds?": NUMBER_OR_NONE, "peak_memory_bytes?": NUMBER_OR_NONE, "device?": str, "processes?": (int, None),
}  # fmt: skip
_SHIFT = {
    "group": str, "block": str, "mean": float, "low": NUMBER_OR_NONE, "high": NUMBER_OR_NONE, "lost?": bool,
}  # fmt: skip
TRIES = [{
    "what": str, "rule": str, "parameters": PARAMETERS, "scale": float, "objective?": NUMBER_OR_NONE, "held?":
    (bool, None), "keeps_general?": (bool, None), "losses?": [_SHIFT], "gains?": [_SHIFT],
}]  # fmt: skip
_SCORE = {
    "block": str, "metric": str, "value": float, "utility": float, "stderr": NUMBER_OR_NONE,
    "details": {
        "shown?": {"shots": int, "examples": int, "cut": int}, "chance?": NUMBER_OR_NONE, "key?": (str, None),
        "chance_variance?": NUMBER_OR_NONE, "documents_sha256?": (str, None),
    },
    "documents_digest": str,
}  # fmt: skip
_GEOMETRY = {
    "sampled": float, "lengths": [float], "cosines": [[NUMBER_OR_NONE]], "conflicts": [[NUMBER_OR_NONE]],
    "compared?": ([int], None),
}  # fmt: skip

_FOLDED = {"stage": int, "replayed": bool, "earlier?": int, **COEFFICIENTS}

_SYNTHESISED = {"written": int, "used": int, "left_out": {str: int}, "sha256": str, "examples": [str]}

_SOURCE = {"path": str, "split": str, "license?": (str, None), "name?": str}
_MIXED = {"source": str, "examples": int, "first_loss": NUMBER_OR_NONE, "loss": NUMBER_OR_NONE}

RECORDS: dict[str, dict[str, Any]] = {
    "train": {
        "sources?": [_SOURCE], "general_sources?": [_SOURCE], "mixed?": [_MIXED], "loss?": NUMBER_OR_NONE,
        "tokens?": (int, None), "start?": str, "examples_sha256?": str,
        **_COST, "given?": str, "given_files?": {str: str}, "steps?": int, "model_sha256?": str, "trained_in?": str,
        "stored?": SURVIVAL, "settings?": {"strategy?": [str], "rewards?": {str: {}}}, "synthesised?": _SYNTHESISED,
        "vector?": {"layers?": {str: {"cosine": float, "norm_ratio": float}}, "special_tokens?": ({str: float}, None)},
    },
    "merge": {
        **_COST, "rule?": str, "parameters?": PARAMETERS, "start_from?": str, "scale?": float, "factor?": float,
        "norms?": {"experts": [float], "running": float}, "amplification?": float, "stored?": (SURVIVAL, None),
        "folded?": [_FOLDED], "expert_sha256?": [str], "model_sha256?": str, "tries?": TRIES,
        "goes_on?": {"rule": str, "parameters": PARAMETERS}, "geometry?": (_GEOMETRY, None),
        "ownership?": {str: {str: float}},
        "published?": [{"stage": str, "model": str, "sha256": str, "norm": float, "kind": str, **COEFFICIENTS}],
    },
    "score": {**_COST, "tasks?": {str: _SCORE}, "measured_by?": ({}, None)},
    "report": {"recipe_sha256?": str},
}  # fmt: skip
"""Phase -> shape of its record (foreign.require_shape)."""

INPUTS = {"folder?": str, "tasks?": {str: str}, "base?": {"sha256": str, "stamp": str, "files": {str: str}}}
GUARD = {"tries": TRIES}
REMIX = {
    "inputs": {}, "weights?": [float], "stages?": [str], "search_seconds?": float, "trained_seconds?": [float],
    "test?": {str: [_SHIFT]},
    "tries?": [{
        "weights": [float], "learning": {"mean": float, "low": NUMBER_OR_NONE, "high": NUMBER_OR_NONE},
        "kept": [_SHIFT], "keeps": bool, "front": bool, "taken": bool,
    }],
}  # fmt: skip
