"""Ten times a thousand connections that break at a random byte."""

from __future__ import annotations

import pytest
from mesh_cuts import weather

pytestmark = pytest.mark.system  # two minutes of chaos


@pytest.mark.parametrize("number", range(10))
async def test_everything_arrives_once_and_in_order_through_a_thousand_cuts(number, seed, autojump_clock) -> None:
    await weather(1000 * seed + number, 1000)
