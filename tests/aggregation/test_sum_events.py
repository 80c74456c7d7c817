"""What an operator can watch of the secure sums of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.abc import Clock

from fedpeer import stage as stages
from fedpeer.peers import Peers
from fedpeer.secure import fixedpoint
