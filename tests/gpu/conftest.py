"""Tests on CUDA: each is marked `gpu`, and skipped where torch finds none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    none = pytest.mark.skip(reason="torch finds no CUDA on this machine")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(none)
