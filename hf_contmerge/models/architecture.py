"""Asks transformers for the place of each stored tensor in memory.

The model is built on the meta device: no data, a few milliseconds. Only code of transformers itself runs; a model with
code of its own has no architecture here and is merged by the names in its files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_contmerge.models.config import config, foreign_errors


class Place(NamedTuple):
    """Where transformers puts a stored tensor."""

    key: str
    """The weight's name in memory; for a part of a weight (an expert of a stack), the part's present name."""
    target: str
    """The weight's name in memory, the first of several."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model on the meta device, as `from_pretrained` builds it from config.json."""

    model: Any

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the saved tensors, by name in memory."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @functools.cached_property
    def ties(self) -> list[list[str]]:
        """Groups of names for one shared tensor, the main name first."""
        groups: dict[str, list[str]] = {}
        for name, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            groups.setdefault(source, [source]).append(name)
        return list(groups.values())

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Return stored name -> its place, without names ignored by transformers."""
        conversion, prefix, places = self.conversion(), self.model.base_model_prefix, {}
        for name in in_order(names):
            target, pattern = conversion.target(name)
            if target in self.shapes:
                part = conversion.part(name) if pattern else target
                places[name] = Place(_with_prefix(part, target, prefix), target)
        return places

    def filled(self, target: str) -> set[str]:
        """Return the weights in memory made together with this one."""
        patterns = [c.target_patterns for c in self.conversion().converters if len(c.target_patterns) > 1]
        together = [p for p in patterns if p[0] in target]
        others = {target.replace(p[0], other) for p in together for other in p}
        return {target, *(others & self.shapes.keys())}

    def missing(self, places: Iterable[Place]) -> list[str]:
        """Return the parameters missing from these tensors."""
        loaded = {name for target in {p.target for p in places} for name in self.filled(target)}
        loaded |= {name for group in self.ties if not loaded.isdisjoint(group) for name in group}
        patterns = self.model._keys_to_ignore_on_load_missing or ()
        ignored = re.compile("|".join(f"({p})" for p in patterns)) if patterns else None
        lacking = [name for name, _ in self.model.named_parameters() if name not in loaded]
        return [name for name in lacking if not (ignored and ignored.search(name))]

    def in_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return stored tensors as transformers holds them, by name in memory."""
        conversion = self.conversion()
        whole: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        for name in in_order(tensors):
            target, pattern = conversion.target(name)
            if pattern is None:
                whole[target] = tensors[name]
            else:
                parts.setdefault(target, conversion.converter(pattern)).add_tensor(target, name, pattern, tensors[name])
        for target, converter in parts.items():
            made = converter.convert(target, model=self.model, config=self.model.config)
            whole |= {name: part[0] if isinstance(part, list) else part for name, part in made.items()}
        return whole

    def conversion(self) -> Conversion:
        """Return fresh rules for one pass over names: they keep state."""
        return Conversion(self.model, self.shapes)


class Conversion:
    """The renamings and conversions of `from_pretrained` for a model."""

    def __init__(self, model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        both = get_model_conversion_mapping(model)
        self.converters = [c for c in both if isinstance(c, WeightConverter)]
        self._renamings = [c for c in both if isinstance(c, WeightRenaming)]
        self._prefix, self._shapes = model.base_model_prefix, shapes

    def target(self, stored: str) -> tuple[str, str | None]:
        """Return a stored tensor's name in memory, and its converter's pattern."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self._renamings, self.converters, self._prefix, self._shapes)
        if name not in self._shapes and stored in self._shapes:
            return rename_source_key(stored, [], [], self._prefix, self._shapes)
        return name, pattern

    def part(self, stored: str) -> str:
        """Return the present name of a part of a weight."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(stored, self._renamings, [])[0]

    def converter(self, pattern: str) -> Any:
        """Return the converter of a pattern."""
        return next(c for c in self.converters if pattern in c.source_patterns)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as `from_pretrained` does; stacks and some renamings depend on it."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def find_architecture(folder: Path, *, tied: bool | None = None) -> Architecture | None:
    """Build a folder's model on the meta device, if it is known.

    `tied`: replaces `tie_word_embeddings` of config.json.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    stamp = file.stat()
    return _find(folder.resolve(), (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns), tied)


@functools.lru_cache(maxsize=16)
def _find(folder: Path, _stamp: tuple[int, ...], tied: bool | None) -> Architecture | None:
    settings = load_config(folder)
    own = settings and _model_class(folder, settings)
    if not own:
        return None
    with foreign_errors(folder / "config.json", "transformers"), torch.device("meta"):
        for part in (settings, settings.get_text_config()) if tied is not None else ():
            part.tie_word_embeddings = tied
        return Architecture(own(settings))


def load_config(folder: Path) -> Any:
    """Return transformers' configuration of a folder; None if unknown to transformers."""
    from transformers import AutoConfig

    if not config(folder).get("model_type"):
        return None
    with foreign_errors(folder / "config.json", "transformers"):
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError):  # unknown, or known by the model's own code only
            return None


def _model_class(folder: Path, settings: Any) -> Any:
    """Return the class of `architectures`, by default the language model's."""
    import transformers

    name = (config(folder).get("architectures") or [""])[0]
    own = getattr(transformers, name, None)
    if not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):  # a file may name anything
        own = None
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    language = mapping.get(type(settings), None)
    return language if language and (own is None or name.endswith("Model")) else own


def _with_prefix(part: str, target: str, prefix: str) -> str:
    """Add or remove the inner model's prefix as for the whole weight."""
    if target.startswith(f"{prefix}.") and not part.startswith(f"{prefix}."):
        return f"{prefix}.{part}"
    return part if target.startswith(f"{prefix}.") else part.removeprefix(f"{prefix}.")
