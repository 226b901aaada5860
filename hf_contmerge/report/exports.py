"""The model cards of extracted adapters and GGUF files."""

from __future__ import annotations

from hf_contmerge import __version__
from hf_contmerge.merging.extraction import RECORD, Extraction, Kept
from hf_contmerge.report._front_matter import front_matter
from hf_contmerge.report._public import public_name
from hf_contmerge.report._templates import fill


def adapter_card(base: str, fine: str, kept: Kept, wanted: Extraction) -> str:
    """Return the README.md of an extracted adapter."""
    base, fine = public_name(base), public_name(fine)
    front = front_matter([base], "adapter", ["lora", "contmerge"], library="peft")
    asked = f"rank {wanted.rank}" if wanted.rank else f"{100 * (wanted.energy or 0):g} % of each map's squared change"
    return fill(
        "adapter.md", front_matter=front, base=base, fine=fine, kept=kept, asked=asked, record=RECORD,
        percent=f"{100 * kept.energy:.4g}",
    )  # fmt: skip


def gguf_card(model: str, file: str, name: str) -> str:
    """Return the README.md next to a GGUF file."""
    model = public_name(model)
    front = front_matter([model], "quantized", ["gguf", "contmerge"], library=None)
    return fill("gguf.md", front_matter=front, model=model, file=file, name=name, version=__version__)
