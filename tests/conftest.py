"""Order of the tests: those that fork ranks come before any other, since a fork after autograd ran cannot run it again."""

import os

import pytest

# Asking whether there is a GPU must not initialise CUDA, which forked ranks could not do again.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)
