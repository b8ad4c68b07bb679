"""Fixtures of the methods' tests."""

import pytest

from tests.tiny import FULL, LORA


@pytest.fixture(params=[FULL, LORA])
def space(request):
    """Whether a method trains all weights or an adapter."""
    return request.param
