"""What all tests share: settings that libraries read when they are imported, and the smallest models."""

import datetime
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Before any test module imports torch, tokenizers or huggingface_hub: no network, and no more threads than the machine
# can give when tests run side by side. Processes that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What a test scores is really scored, and nothing goes into the user's cache. Tests of the cache name a folder.
os.environ["HF_CONTMERGE_CACHE"] = "off"
# Waiting for the disk shows nothing: what a power cut leaves is told by the tests of it (toys/faulty_disk.py), which
# count these calls. A closed file is refused as before.
os.fsync = lambda handle: os.fstat(handle) and None


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with tied embeddings, float32. Not to be written to."""
    from toys.models import toy_llama  # transformers takes seconds to load, and most tests do without

    return toy_llama(tmp_path_factory.mktemp("models") / "base", seed=0)


@pytest.fixture(scope="session")
def expert_folders(base_folder: Path) -> tuple[Path, ...]:
    """Three experts of the base model. Not to be written to."""
    from toys.models import perturbed

    return tuple(perturbed(base_folder, base_folder.with_name(f"expert{i}"), seed=i, size=0.01) for i in (1, 2, 3))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, int, int], None]:
    """Return a function that records a figure of SECURITY.md: a row, how many were tried, how many held."""

    def record(row: str, tried: int, held: int) -> None:
        record_property(f"figure {row}", f"{tried} {held}")

    return record


def _freeze_large_heaps(phase: str, info: dict[str, int], began: list[float] = []) -> None:  # noqa: B006
    """Keep what libraries have made out of the garbage collector, after a full pass that took long.

    Trainers ask for full passes, and each would take a quarter of a second: a third of some files' time.
    """
    if info["generation"] < 2:
        return
    if phase == "start":
        began[:] = [time.perf_counter()]
    elif time.perf_counter() - began[0] > 0.1:
        gc.freeze()


gc.callbacks.append(_freeze_large_heaps)


# A time budget, for continuous integration


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget", type=float, metavar="SECONDS", help="skip the tests that have not started by then; files take turns"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with another file each day, so that none is always among those left out."""
    if config.getoption("--budget") is None or not items:
        return
    files = list(dict.fromkeys(item.path for item in items))
    first = datetime.date.today().toordinal() % len(files)
    place = {path: i for i, path in enumerate(files[first:] + files[:first])}
    items.sort(key=lambda item: place[item.path])


_STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - _STARTED > budget:
        pytest.skip(f"not started within the budget of {budget:.0f} s")
