"""Statistics of an expert, next to its weights.

EXPERT/statistics/statistics.json       the expert's digest; by kind: examples, tokens and digest of the data, and which
                                        weights have the same statistic as another one, stored once
EXPERT/statistics/<kind>.safetensors    weight -> statistic, as `Weight.statistics` has it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError, shell_word
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.weights import Weights, weights_sha256, write_tensors
from hf_contmerge.runtime.digests import changed_files, digests_of
from hf_contmerge.runtime.files import make_folder, sync_files, withdraw
from hf_contmerge.runtime.foreign import path_in
from hf_contmerge.runtime.records import read_record, write_record

FOLDER = "statistics"
_RECORD = "statistics.json"
RECORD = f"{FOLDER}/{_RECORD}"
_SHAPE = {"expert_sha256?": (str, None), "kinds?": {str: {"same?": {str: str}}}}


class Statistics:
    """The statistics of an expert's folder, to read; there may be none.

    Raises ModelError if they are damaged.
    """

    def __init__(self, expert: Path) -> None:
        self.folder = expert / FOLDER
        record = _read(self.folder / _RECORD)
        self.expert_sha256: str | None = record.get("expert_sha256")
        self._same = {kind: about.get("same", {}) for kind, about in record.get("kinds", {}).items()}
        self._tensors = {kind: Weights(_file(self.folder, kind)) for kind in self._same}
        self._stored = {kind: frozenset(tensors.names) for kind, tensors in self._tensors.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(self._same))

    def of(self, name: str, kinds: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Return kind -> statistic of a weight."""
        found = {kind: self._tensors[kind].tensor(key) for kind in kinds if (key := self._key(kind, name))}
        return {kind: tensor.to(device) for kind, tensor in found.items()}

    def prefetch(self, name: str) -> None:
        """Ask the system to read a weight's statistics ahead."""
        for kind in self.kinds:
            if key := self._key(kind, name):
                self._tensors[kind].prefetch(key)

    def _key(self, kind: str, name: str) -> str | None:
        key = self._same[kind].get(name, name)
        return key if key in self._stored[kind] else None


def _cure(folder: Path, kind: str) -> str:
    """Return the command for a kind of statistics."""
    if kind == "adam":
        return "only training writes them: train it with `statistics: [adam]` under `train`."
    option = "" if kind == "inputs" else f" --kind {kind}"
    return f"write them with `contmerge statistics {shell_word(folder)} --data FILE{option}`."


def require_kinds(rule: MergeRule, expert: Path) -> Statistics:
    """Return an expert's statistics. Raises ModelError if the rule needs others."""
    statistics = Statistics(expert)
    for kind in rule.needs:
        if kind not in statistics.kinds:
            raise ModelError(
                f"{expert} lacks the statistics {kind!r}, which the rule {type(rule).__name__} needs: "
                f"{_cure(expert, kind)}"
            )
    return statistics


def check_statistics(rule: MergeRule, experts: Iterable[Path]) -> None:
    """Raise ModelError for experts without current statistics for the rule."""
    for folder in experts if rule.needs else ():
        statistics, cure = require_kinds(rule, folder), _cure(folder, rule.needs[0])
        if damaged := damaged_statistics(folder):
            raise ModelError(f"{damaged[0]} changed after it was measured: {cure}")
        if statistics.expert_sha256 != expert_sha256(folder):
            raise ModelError(f"The statistics of {folder} are of other weights than it holds now: {cure}")


def statistics_digest(expert: Path) -> str | None:
    """Return the digest of an expert's statistics; None without any."""
    statistics = Statistics(expert)
    if not statistics.kinds:
        return None
    digest = hashlib.sha256((statistics.folder / _RECORD).read_bytes())
    for kind in statistics.kinds:
        digest.update(weights_sha256(_file(statistics.folder, kind)).encode())
    return digest.hexdigest()


def write_statistics(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, expert_sha256: str
) -> None:
    """Write one kind of statistics, in place of earlier ones.

    Args:
        folder: `statistics` of the expert, which need not exist.
        kind: of the statistics.
        tensors: weight -> statistic; neighbours that are equal are stored once.
        about: what the record says of it: examples, tokens, data.
        expert_sha256: of the weights that were measured. Statistics of other ones are dropped.
    """
    make_folder(folder)
    record = _read(folder / _RECORD)
    kept = record["kinds"] if record.get("expert_sha256") == expert_sha256 else {}
    withdraw(folder / _RECORD)
    same = _equal_neighbours(tensors)
    file = _file(folder, kind)
    write_tensors(file.with_suffix(".new"), {name: tensor for name, tensor in tensors.items() if name not in same})
    file.with_suffix(".new").replace(file)  # others may be reading the old one
    sync_files(folder)
    kinds = {**kept, kind: {**about, "same": same}}
    files = digests_of(folder, [_file(folder, each).name for each in kinds])
    write_record(folder / _RECORD, {"expert_sha256": expert_sha256, "kinds": kinds, "files": files})


def _equal_neighbours(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return weight -> earlier weight with the same statistic."""
    same: dict[str, str] = {}
    latest: str | None = None
    for name, tensor in tensors.items():
        if latest is not None and torch.equal(tensor, tensors[latest]):
            same[name] = latest
        else:
            latest = name
    return same


def _file(folder: Path, kind: str) -> Path:
    return path_in(folder, kind, ".safetensors")


def damaged_statistics(expert: Path) -> list[Path]:
    """Return an expert's statistics with other bytes than recorded."""
    folder = expert / FOLDER
    return [folder / name for name in changed_files(folder, _read(folder / _RECORD).get("files", {}))]


def _read(file: Path) -> dict[str, Any]:
    return read_record(file, "Remove its folder and measure again.", _SHAPE) if file.exists() else {}
