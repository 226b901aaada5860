"""The front matter of a model card, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_contmerge.report._public import accepted_name, hub_model


def front_matter(
    parents: Sequence[str], relation: str, tags: Sequence[str], *, datasets: Sequence[str] = (),
    library: str | None = "transformers", licence: str | None = None, **more: Any,
) -> str:  # fmt: skip
    """Return the YAML between the lines of dashes.

    Args:
        parents: names of the models behind this one, as in a recipe.
        relation: of this model to them.
        tags: words to find it by.
        datasets: Hub ids.
        library: what loads it, if one of the Hub's.
        licence: its name on the Hub.
        more: further fields of huggingface_hub's ModelCardData.
    """
    from huggingface_hub import ModelCardData

    names = dict.fromkeys(accepted_name(hub_model(parent)) for parent in parents)
    data = ModelCardData(
        base_model=list(names), base_model_relation=relation, tags=list(tags), library_name=library,
        pipeline_tag="text-generation", datasets=list(dict.fromkeys(datasets)) or None, license=licence, **more,
    )  # fmt: skip
    return data.to_yaml()
