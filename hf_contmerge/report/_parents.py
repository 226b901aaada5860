"""The licence of a published model, proposed from its parents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_contmerge.models.licence import readme_license
from hf_contmerge.report._public import hub_id, hub_model
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.runtime.hiding import without_secrets


@dataclass(frozen=True)
class Licence:
    """A licence for the card, and those of the parents."""

    name: str | None = None
    chosen: bool = False
    """Whether the user named it."""
    parents: tuple[tuple[str, str | None], ...] = ()
    """Public names of models, and their licences."""

    def in_words(self) -> str:
        """Return the licence and its reason."""
        known = ", ".join(f"{model}: {licence or 'not stated'}" for model, licence in self.parents)
        if self.chosen:
            return f"{self.name}, as chosen (parents: {known})"
        if self.name:
            return f"{self.name}, proposed as that of all parents ({known})"
        return f"none proposed: the parents' licences are not all known and equal ({known})"


def parents_of(run: Run, t: int) -> list[str]:
    """Return the models behind a run's merge of t stages."""
    merged = [run.stage(s) for s in range(1, t + 1)]
    return [run.recipe.base_model, *(m for s in merged for m in (s.expert, s.minus) if m)]


def licence_of(models: Sequence[str], chosen: str | None, *, online: bool) -> Licence:
    """Return a licence: the chosen one, else that of all parents.

    Args:
        models: the parents' names, as in a recipe.
        chosen: the user's choice.
        online: ask the Hub where no README is on this machine.
    """
    parents = tuple((without_secrets(hub_model(m)), _licence(m, online=online)) for m in dict.fromkeys(models))
    known = {licence for _, licence in parents}
    common = known.pop() if len(known) == 1 else None
    return Licence(chosen or (None if common == "other" else common), bool(chosen), parents)


def _licence(model: str, *, online: bool) -> str | None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    folder = expanded(model)
    if folder.is_dir() and (licence := readme_license(folder / "README.md")):
        return licence
    repo = hub_id(hub_model(model))
    if not repo or repo.count("/") != 1:
        return None
    cached = try_to_load_from_cache(repo, "README.md")
    if isinstance(cached, str) and (licence := readme_license(Path(cached))):
        return licence
    try:
        card = HfApi().model_info(repo, timeout=10).card_data if online else None
    except (HfHubHTTPError, HTTPError, OSError, ValueError):  # a licence less; the push itself will tell
        return None
    named = card.get("license") if card else None
    return str(named) if named else None
