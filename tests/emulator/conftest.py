"""These tests are about the emulated device: there are none without it."""

from __future__ import annotations

from tests.common import EMULATED

collect_ignore_glob = [] if EMULATED else ["test_*.py"]
