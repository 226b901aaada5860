"""What of the Hub is set up on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class HubSetup(NamedTuple):
    """The Hub's cache and account; the token itself is never read out."""

    cache: Path
    has_token: bool
    offline: bool


def hub_setup() -> HubSetup:
    """Return this machine's setup, without a network."""
    from huggingface_hub import constants, get_token

    return HubSetup(Path(constants.HF_HUB_CACHE), get_token() is not None, constants.HF_HUB_OFFLINE)
