"""Cards of what was made without a run: written models, trained experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_contmerge.merge_rules import named_rule
from hf_contmerge.models.contents import ADAPTER
from hf_contmerge.report._front_matter import front_matter
from hf_contmerge.report._parents import Licence
from hf_contmerge.report._public import hub_id, hub_model, public
from hf_contmerge.report._sources import StageSource
from hf_contmerge.report._templates import fill
from hf_contmerge.runtime.foreign import read_object


@dataclass(frozen=True)
class Plain:
    """What a card says besides the record."""

    repo_id: str
    licence: Licence = field(default_factory=Licence)
    adapter: bool = False
    with_state: bool = False
    base: str | None = None
    """The base's name on the Hub, if the user gave it."""


def written_card(lineage: Mapping[str, Any], plain: Plain) -> str:
    """Return the README.md of a model that `merge export` wrote.

    `lineage`: with public names.
    """
    parents = [lineage["base"], *(e["model"] for e in lineage["experts"])]
    header = front_matter(
        parents, "merge", ["merge", "mergekit", "contmerge", lineage["rule"]], licence=plain.licence.name
    )
    base = hub_model(lineage["base"])
    return fill("written.md", front_matter=header, lineage=lineage, base=base, plain=plain,
                reference=named_rule(lineage["rule"]).reference, licence=plain.licence.in_words())  # fmt: skip


def expert_card(
    record: Mapping[str, Any], folder: Path, plain: Plain, licence_of: Callable[[Sequence[str]], Licence]
) -> tuple[str, Licence]:
    """Return the README.md of a trained expert, and its licence."""
    start = plain.base or _start(record, folder)
    plain = replace(plain, licence=licence_of([start]))
    sources = [StageSource(s["path"], s["split"], s.get("license")) for s in record.get("sources", ())]
    data = [(public(s.path), s.in_words()) for s in sources]
    datasets = [name for s in sources if (name := hub_id(s.path))]
    relation = "adapter" if plain.adapter else "finetune"
    header = front_matter(
        [start], relation, ["contmerge", *(["peft", "lora"] if plain.adapter else [])], datasets=datasets,
        library="peft" if plain.adapter else "transformers", licence=plain.licence.name,
    )  # fmt: skip
    settings = {word: value for word, value in record.get("settings", {}).items() if value not in (None, {}, [])}
    card = fill("expert.md", front_matter=header, record=record, plain=plain, start=hub_model(start), data=data,
                strategy=settings.get("strategy", ["full"]), licence=plain.licence.in_words())  # fmt: skip
    return card, plain.licence


def _start(record: Mapping[str, Any], folder: Path) -> str:
    """Return the model that an expert was trained from, by name."""
    settings = folder / ADAPTER
    named = read_object(settings).get("base_model_name_or_path") if settings.is_file() else None
    return str(named or record.get("start") or "unknown")
