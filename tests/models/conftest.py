"""The libraries under test, each skipped where it is missing; none of them downloads anything."""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# pykeen makes its folders when it is imported.
os.environ["PYSTOW_HOME"] = os.path.join(tempfile.gettempdir(), "pystow-of-tests")


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


@pytest.fixture(scope="session")
def torch_geometric() -> Any:
    """The package."""
    return _package("torch_geometric")


@pytest.fixture(scope="session")
def lightning() -> Any:
    """The package."""
    return _package("lightning")


@pytest.fixture(scope="session")
def pykeen() -> Any:
    """The package, with its models and what they load."""
    _package("pykeen.models")
    _package("pykeen.training")
    return _package("pykeen")


@pytest.fixture(scope="session")
def fastai() -> Any:
    """The package, with collaborative filtering, tables and text."""
    _package("fastai.collab")
    _package("fastai.text.data")
    _package("fastai.text.models")
    return _package("fastai")


@pytest.fixture(scope="session")
def opacus() -> Any:
    """The package."""
    return _package("opacus")
