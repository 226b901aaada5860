"""Presents a run: page, pictures, model card, Hub."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.report.compare import compare_runs as compare_runs
    from hf_contmerge.report.push import push_merged as push_merged
    from hf_contmerge.report.write import write_report as write_report

attach(__name__, {"compare_runs": "compare", "push_merged": "push", "write_report": "write"})
