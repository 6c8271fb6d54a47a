"""The version, in one place: setup.py and pyproject.toml read this file without importing it."""

from __future__ import annotations

__version__ = "0.1.0"
