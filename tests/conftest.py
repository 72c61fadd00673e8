"""Order of the tests: those that fork ranks come before any other, since a fork after autograd ran cannot run it again."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)
