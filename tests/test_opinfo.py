"""torch's own samples and error inputs for embedding, the ones its test suite runs.

They ship inside the torch wheel, as OpInfo and ModuleInfo entries.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import embed_ext
from tests.common import REAL_DTYPES, assert_close

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest")

from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import (  # noqa: E402
    FunctionInput,
    ModuleErrorEnum,
    module_db,
)

OP = next(info for info in op_db if info.name == "nn.functional.embedding")
MODULE = next(info for info in module_db if info.module_cls is torch.nn.Embedding)

every_dtype = pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)


def ours(weight: Tensor, indices: Tensor, **options: Any) -> Tensor:
    """The function in OpInfo's order of arguments."""
    return embed_ext.functional.embedding(indices, weight, **options)


def gradient(out: Tensor, weight: Tensor) -> Tensor:
    """Of weight [V, D] for a grad_output that differs in every element, as a dense tensor."""
    grad_output = torch.linspace(-1, 1, out.numel(), device=out.device).to(out).view(out.shape)
    (grad,) = torch.autograd.grad(out, weight, grad_output)
    return grad.to_dense()


@every_dtype
def test_samples(device: str, dtype: torch.dtype) -> None:
    """Values, the table afterwards, and gradients, of every sample with every option."""
    samples = [*OP.sample_inputs(device, dtype), *OP.sample_inputs(device, dtype, True)]
    assert len(samples) >= 12
    for sample in samples:
        weights = [sample.input.detach().clone().requires_grad_() for _ in range(2)]
        outs = [
            op(weight, *sample.args, **sample.kwargs)
            for op, weight in zip((ours, OP.op), weights, strict=True)
        ]
        assert_close(outs[0], outs[1])
        assert_close(weights[0].detach(), weights[1].detach())
        actual = gradient(outs[0], weights[0])
        if sample.kwargs.get("sparse") and sample.kwargs.get("scale_grad_by_freq"):
            # torch has no such gradient; it is the dense one.
            sample.kwargs["sparse"] = False
            outs[1] = OP.op(weights[1], *sample.args, **sample.kwargs)
        assert_close(actual, gradient(outs[1], weights[1]))


def test_gradients_of_samples(device: str) -> None:
    """First and second order, reverse and forward mode, batched."""
    for sample in OP.sample_inputs(device, torch.float64, requires_grad=True):
        (indices,) = sample.args

        def lookup(weight: Tensor, indices: Tensor = indices) -> Tensor:
            return ours(weight, indices)

        assert gradcheck(
            lookup, (sample.input,), fast_mode=True, check_forward_ad=True, check_batched_grad=True
        )
        assert gradgradcheck(lookup, (sample.input,), fast_mode=True, check_fwd_over_rev=True)


def test_error_inputs(device: str) -> None:
    """Type and wording."""
    errors = list(OP.error_inputs(device))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(sample.input, *sample.args, **sample.kwargs)


def constructed(kind: type[torch.nn.Embedding], arguments: FunctionInput, **more: Any) -> Any:
    """A module from a ModuleInfo's constructor arguments."""
    return kind(*arguments.args, **arguments.kwargs, **more)


@every_dtype
@pytest.mark.parametrize("training", [True, False])
def test_module_samples(device: str, dtype: torch.dtype, training: bool) -> None:
    samples = MODULE.module_inputs_func(
        MODULE, device=device, dtype=dtype, requires_grad=True, training=training
    )
    assert samples
    for sample in samples:
        modules, outs = [], []
        for kind in (embed_ext.Embedding, torch.nn.Embedding):
            torch.manual_seed(0)
            module = constructed(kind, sample.constructor_input, device=device, dtype=dtype)
            modules.append(module.train(training))
            outs.append(module(*sample.forward_input.args, **sample.forward_input.kwargs))
        assert repr(modules[0]) == repr(modules[1])
        assert torch.equal(outs[0], outs[1])
        actual, expected = (
            gradient(out, module.weight) for out, module in zip(outs, modules, strict=True)
        )
        if dtype in (torch.float32, torch.float64):  # torch rounds narrow sums at every step
            assert_close(actual, expected)


# Where our wording says more than torch's: what it keeps of it.
OUR_WORDING = {
    r"index out of range in self": r"index out of range: indices\[2\] is 15",
    r"Expected tensor for argument.*indices.*to have.*scalar type.*Long.*Int": (
        r"expected indices of dtype int64, int32, .*, but got Float"
    ),
}


def test_module_error_inputs(device: str) -> None:
    """The type always; the wording unless ours says more."""
    if MODULE.module_error_inputs_func is None:
        pytest.skip("this torch lists no error inputs for nn.Embedding")
    errors = MODULE.module_error_inputs_func(
        MODULE, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert errors
    for error in errors:
        sample = error.module_error_input
        expected = pytest.raises(
            error.error_type, match=OUR_WORDING.get(error.error_regex, error.error_regex)
        )
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with expected:
                constructed(embed_ext.Embedding, sample.constructor_input, device=device)
            continue
        module = constructed(embed_ext.Embedding, sample.constructor_input, device=device)
        with expected:
            module(*sample.forward_input.args, **sample.forward_input.kwargs)
