"""A rule with parts and a scale of the whole model."""

from dataclasses import dataclass

from hf_contmerge.merge_rules.rowscaled import Rowscaled  # pyright: ignore[reportMissingImports]

from hf_contmerge.merge_rules import Norms


@dataclass(frozen=True)
class Rownormed(Rowscaled):
    """As `rowscaled`, with the scale mean(|D_t|) / |state|."""

    whole_model_scale = True
    tunable = ()

    def scale(self, norms: Norms) -> float:
        return sum(norms.experts) / len(norms.experts) / norms.running if norms.running else 0.0
