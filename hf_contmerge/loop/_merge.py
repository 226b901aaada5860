"""The merge phase of a run: a stage's expert into the state of the stage before, and the merged model out of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hf_contmerge.loop._choice import Choice, choose
from hf_contmerge.loop.stages import Bench
from hf_contmerge.merging.analysis import merge_geometry, ownership
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.state import Folded, Source
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.places import Place
from hf_contmerge.runtime.files import remove

LOG = logging.getLogger(__name__)


def merge_stage_of(bench: Bench) -> dict[str, Any]:
    """Merge, publish, and return the record. All ranks call this together; the record is the main process's.

    Raises BudgetError if the recipe's guard lets no merge pass.
    """
    place, guard, choice = bench.place, bench.run.recipe.guard, None
    if guard or place.entry.auto:
        choice = choose(bench, guard)
        folded = choice.taken.folded
    else:
        sources = [*bench.sources_before(), bench.source(bench.t)]
        folded = bench.fold(sources, newest_only=True, merged_out=bench.output())
    if not bench.main:
        return {}
    running, merged = place.publish("running"), place.publish("merged")
    if choice:
        place.scratch("validation")
        bench.keep(Place(place.folder / ".validation"), choice.taken.scores)
        place.publish("validation")
    remove(place.guard_file)
    _write_mergekit_recipe(bench, folded)
    stages = [bench.run.stage(s.stage).name for s in folded.sources]
    owners = {"ownership": ownership(Weights(bench.prepared.base), running, stages)} if folded.rule.selects else {}
    return {
        "rule": folded.rule_name, "parameters": folded.rule.parameters(), "reference": folded.rule.reference,
        "start_from": bench.kind, "scale": folded.scale,
        "norms": {"experts": list(folded.norms.experts), "running": folded.norms.running},
        "expert_sha256": [s.sha256 for s in folded.sources], "model_sha256": weights_sha256(merged),
        "geometry": merge_geometry(bench.prepared.base, [s.model for s in folded.sources], merged),
        **owners, **_what_differs(bench, folded, choice),
    }  # fmt: skip


def _what_differs(bench: Bench, folded: Folded, choice: Choice | None) -> dict[str, Any]:
    """Return what a record says beyond the usual: what was chosen, and what later stages must know of it."""
    found: dict[str, Any] = choice.to_json(bench.run.recipe.guard) if choice else {}
    if not _one_a_stage(folded.sources, bench.t):
        found["folded"] = [{"stage": s.stage, "replayed": s.replayed} for s in folded.sources]
    if folded.factor != 1.0:
        found["factor"] = folded.factor
    name, rule = bench.rule()
    if choice and choice.taken.what == "rule":
        name, rule = folded.rule_name, folded.rule
    if name != bench.place.entry.rule or rule.parameters() != bench.prepared.rules[bench.place.entry.name].parameters():
        found["goes_on"] = {"rule": name, "parameters": rule.parameters()}
    return found


def _one_a_stage(sources: Sequence[Source], t: int) -> bool:
    return [s.stage for s in sources] == list(range(1, t + 1)) and not any(s.replayed for s in sources)


def _write_mergekit_recipe(bench: Bench, folded: Folded) -> None:
    """Write merge.yml; not for a merge without a single expert, which mergekit knows no word for."""
    file, dtype = bench.place.mergekit_recipe, bench.dtype
    remove(file)
    if folded.sources:
        experts, own = [s.model for s in folded.sources], folded.factor == 1.0
        text = mergekit_yaml(
            folded.rule_name, folded.rule, base=bench.run.base_model, experts=experts, dtype=dtype,
            scale=None if own else folded.scale,
        )  # fmt: skip
        file.write_text(text, encoding="utf-8")
