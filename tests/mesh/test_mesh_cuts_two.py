"""The other half of the 10,000 cuts."""

from __future__ import annotations

import pytest
from mesh_cuts import weather

pytestmark = pytest.mark.system  # a minute of chaos


@pytest.mark.parametrize("number", range(5, 10))
async def test_everything_arrives_once_and_in_order_through_a_thousand_cuts(number, seed, autojump_clock) -> None:
    await weather(1000 * seed + number, 1000)
