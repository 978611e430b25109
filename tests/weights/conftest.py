"""Weights are compared with shapes that are traced once."""

import pytest

from tests.weights import trees


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch):
  trees.trace_once(monkeypatch)
