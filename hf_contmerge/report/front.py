"""The picture of a remix: learning against keeping, a dot per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.report._pictures import FrontDot, draw_front
from hf_contmerge.runtime.files import replacing


def write_front(record: Mapping[str, Any], path: Path) -> None:
    """Write the candidates of a remix's record as a PNG file."""
    dots = [_dot(each) for each in record["tries"]]
    units = {shift["block"] for each in record["tries"] for shift in each["kept"]}
    unit = {frozenset(["accuracy"]): "share of right answers", frozenset(["perplexity"]): "nats"}.get(
        frozenset(units), "nats or share of right answers"
    )
    with replacing(path) as file:
        file.write(draw_front(dots, keeping=f"worst change of {', '.join(record['inputs']['keep'])}, {unit}"))


def _dot(candidate: Mapping[str, Any]) -> FrontDot:
    worst = min(candidate["kept"], key=lambda shift: shift["mean"], default={"mean": 0.0, "low": None, "high": None})
    change = candidate["learning"]
    return FrontDot(
        *((each["mean"], each["low"], each["high"]) for each in (worst, change)),
        front=candidate["front"], taken=candidate["taken"], allowed=candidate["keeps"],
    )  # fmt: skip
