"""The model cards of extracted adapters and GGUF files."""

from __future__ import annotations

from hf_contmerge import __version__
from hf_contmerge.merging.extraction import RECORD, Extraction, Kept
from hf_contmerge.report._public import accepted_name, public_name
from hf_contmerge.report._templates import fill


def adapter_card(base: str, fine: str, kept: Kept, wanted: Extraction) -> str:
    """Return the README.md of an extracted adapter."""
    from huggingface_hub import ModelCardData

    base, fine = public_name(base), public_name(fine)
    data = ModelCardData(
        base_model=accepted_name(base), base_model_relation="adapter", library_name="peft", tags=["lora", "contmerge"],
        pipeline_tag="text-generation",
    )  # fmt: skip
    asked = f"rank {wanted.rank}" if wanted.rank else f"{100 * (wanted.energy or 0):g} % of each map's squared change"
    return fill(
        "adapter.md", front_matter=data.to_yaml(), base=base, fine=fine, kept=kept, asked=asked, record=RECORD,
        percent=f"{100 * kept.energy:.4g}",
    )  # fmt: skip


def gguf_card(model: str, file: str, name: str) -> str:
    """Return the README.md next to a GGUF file."""
    from huggingface_hub import ModelCardData

    model = public_name(model)
    data = ModelCardData(
        base_model=accepted_name(model),
        base_model_relation="quantized",
        tags=["gguf", "contmerge"],
        pipeline_tag="text-generation",
    )
    return fill("gguf.md", front_matter=data.to_yaml(), model=model, file=file, name=name, version=__version__)
