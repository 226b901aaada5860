"""Conformance checks for merge rules and training strategies, yours too.

from hf_contmerge.testing import check_rule, check_strategy

check_rule("gain", oracle)                          # a rule of an installed package or of a plugin file; torch only
check_strategy("calm", factor=0.5)                  # a training strategy, on a toy model
check_strategy(["lora", Calm], calm={"factor": 0.5})    # several combined; a word or a class each
"""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.testing.rules import check_rule as check_rule
    from hf_contmerge.testing.strategies import check_strategy as check_strategy

attach(__name__, {"check_rule": "rules", "check_strategy": "strategies"})
