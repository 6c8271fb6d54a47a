"""The libraries under test, each skipped where it is missing; none of them downloads anything."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


def _package(name: str) -> Any:
    reason = f"{name} is not installed (make test-models installs it)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of itself when it is loaded
        try:
            return pytest.importorskip(name, reason=reason)
        except (ImportError, OSError) as error:  # compiled for another torch
            pytest.skip(f"{name} does not load with torch {torch.__version__}: {error}")


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The package."""
    return _package("transformers")


@pytest.fixture(scope="session")
def peft() -> Any:
    """The package."""
    return _package("peft")


@pytest.fixture(scope="session")
def accelerate() -> Any:
    """The package."""
    return _package("accelerate")


@pytest.fixture(scope="session")
def torchao_quantization() -> Any:
    """torchao.quantization."""
    return _package("torchao.quantization")


@pytest.fixture(scope="session")
def torchrec() -> Any:
    """The package, with the CPU build of what it calls."""
    _package("fbgemm_gpu")
    return _package("torchrec")
