"""What the tests of adapters share."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of peft about tied tables, ranks and orientations are what these tests provoke."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
