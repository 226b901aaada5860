"""The scores of these tests are computed on the CPU, even with a GPU in the machine."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        yield
