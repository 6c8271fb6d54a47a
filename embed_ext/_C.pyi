from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

class BuildConfig(TypedDict):
    version: str
    torch: str
    compiler: str
    cxx_standard: int
    cuda_archs: str | None

def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    /,
) -> Tensor: ...
def set_general_path(handler: Callable[..., Tensor]) -> None: ...
def build_config() -> BuildConfig: ...
def cpu_capability() -> str: ...
def index_check() -> str: ...
def set_index_check(mode: str) -> None: ...
def check_indices() -> None: ...
