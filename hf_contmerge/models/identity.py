"""Digests of a model's files, taken before others build on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_contmerge.models.contents import companions, weight_files
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.lora.layout import FILE
from hf_contmerge.models.lora.settings import CONFIG
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.runtime.digests import Digests, changed_files, digests_of


@dataclass(frozen=True)
class Identity:
    """A model's weights and companions."""

    sha256: str
    """Of the weights, however they are shared out among files."""
    stamp: str
    files: Digests

    @classmethod
    def of(cls, folder: Path) -> Identity:
        """Read a model."""
        return cls(weights_sha256(folder), Weights(folder).stamp(), digests_of(folder, model_files(folder)))

    @classmethod
    def read(cls, record: dict[str, Any]) -> Identity:
        """Return the value in a record."""
        return cls(record["sha256"], record["stamp"], record["files"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self, folder: Path, *, whole: bool) -> list[str]:
        """Return the changed files of a model.

        `whole`: read the weights, even if the files' times say that they are the same.
        """
        read = whole or Weights(folder).stamp() != self.stamp
        changed = changed_files(folder, {n: d for n, d in self.files.items() if read or not _is_weights(n)})
        others = [name for name in changed if not _is_weights(name)]
        return others if others == changed or weights_sha256(folder) == self.sha256 else changed


def model_files(folder: Path) -> list[str]:
    """Return the files read of a model or adapter: weights, companions, code."""
    texts = [path.relative_to(folder).as_posix() for path in companions(folder)]
    if is_adapter(folder):
        return [FILE, CONFIG, *texts]
    index = [path.name for path in folder.glob("*.safetensors.index.json")]
    return [*weight_files(folder)[0], *index, *texts]


def weight_digests(files: Digests) -> Digests:
    """Return the digests of weights alone."""
    return {name: digest for name, digest in files.items() if _is_weights(name)}


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))
