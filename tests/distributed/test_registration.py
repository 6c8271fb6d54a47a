"""The rules for DTensor: there when DTensor is, and not a moment before."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.common import run_python

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch is built without distributed"
)

HAS_RULE = """
import sys
def has_rule():
    functional, dtensor = sys.modules["embed_ext.functional"], sys.modules[NAME]
    return dtensor.DTensor in functional.LOOKUPS and "embed_ext._sharding" in sys.modules
NAME = "torch.distributed.tensor"
"""


def run(code: str) -> None:
    finished = run_python(HAS_RULE + code)
    assert finished.returncode == 0, finished.stderr


def test_import_does_not_load_dtensor() -> None:
    run(
        """
import torch
before = NAME in sys.modules
import embed_ext
embed_ext.Embedding(3, 2)(torch.tensor([1])).sum().backward()
assert before or NAME not in sys.modules
"""
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import embed_ext; import torch.distributed.tensor",
        "import torch.distributed.tensor; import embed_ext",
        "import embed_ext; from torch.distributed.fsdp import fully_shard",
        "import embed_ext._sharding",
    ],
)
def test_rules_are_there_in_either_order(imports: str) -> None:
    run(imports + "\nimport torch.distributed.tensor\nassert has_rule()")


def test_rules_survive_an_import_that_fails_once() -> None:
    run(
        """
import embed_ext, torch.distributed
sys.modules["torch.distributed.tensor._ops"] = None  # importing this is an ImportError now
try:
    import torch.distributed.tensor
except ImportError:
    pass
else:
    raise AssertionError("imported")
del sys.modules["torch.distributed.tensor._ops"]
finders = len(sys.meta_path)
import torch.distributed.tensor
assert has_rule()
assert len(sys.meta_path) == finders - 1
"""
    )
