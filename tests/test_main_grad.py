"""add_to_main_grad: float32 sums beside a table of low precision, and nothing through .grad."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.common import assert_close

ROWS, WIDTH, TOKENS = 60, 24, 40


def table(dtype: torch.dtype = torch.bfloat16, **options: object) -> embed_ext.Embedding:
    torch.manual_seed(0)
    module = embed_ext.Embedding(ROWS, WIDTH, dtype=dtype, add_to_main_grad=True, **options)
    parameter(module).main_grad = torch.zeros(ROWS, WIDTH)
    return module


def parameter(module: nn.Module) -> Any:
    """The weight, with whatever attributes it has."""
    return module.weight


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """indices [TOKENS], grad_output [TOKENS, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator)
    return indices, torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_micro_batches_add_up_in_float32(dtype: torch.dtype, padding_idx: int | None) -> None:
    module = table(dtype, padding_idx=padding_idx)
    exact = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for step in range(8):
        indices, grad = batch(step, dtype)
        kept = indices != (-1 if padding_idx is None else padding_idx)
        exact.index_add_(0, indices[kept], grad[kept].double())
        out = module(indices)
        assert torch.equal(out, module.weight[indices])
        out.backward(grad)
    assert module.weight.grad is None
    torch.testing.assert_close(parameter(module).main_grad.double(), exact, rtol=1e-6, atol=1e-5)


def test_scale_grad_by_freq_and_max_norm_hold() -> None:
    options = {"scale_grad_by_freq": True, "max_norm": 1.0}
    module, plain = table(torch.float32, **options), nn.Embedding(ROWS, WIDTH, **options)
    plain.load_state_dict(module.state_dict())
    indices, grad = batch(0, torch.float32)
    module(indices).backward(grad)
    plain(indices).backward(grad)
    assert_close(module.weight.detach(), plain.weight.detach())
    assert_close(parameter(module).main_grad, plain.weight.grad)


def test_a_table_of_two_uses_and_a_tied_projection() -> None:
    """The lookup adds to main_grad; what other operators find out goes to .grad."""
    module = table(torch.float32)
    indices, _ = batch(0, torch.float32)
    (module(indices).sum() + module(indices[:5]).sum() + (module.weight * 2).sum()).backward()
    counts = torch.bincount(torch.cat([indices, indices[:5]]), minlength=ROWS).float()
    assert torch.equal(parameter(module).main_grad, counts[:, None].expand(ROWS, WIDTH))
    assert torch.equal(module.weight.grad, torch.full((ROWS, WIDTH), 2.0))


def test_the_flag_that_says_so_is_set_where_it_is() -> None:
    module = table()
    indices, grad = batch(0, torch.bfloat16)
    module(indices).backward(grad)
    assert not hasattr(module.weight, "grad_added_to_main_grad")
    parameter(module).grad_added_to_main_grad = False
    module(indices).backward(grad)
    assert parameter(module).grad_added_to_main_grad is True
    assert parameter(module).grad.shape == (ROWS, WIDTH)
    module.weight.grad = None
    parameter(module).zero_out_wgrad = True
    module(indices).backward(grad)
    assert not parameter(module).grad.any()


def test_an_optimizer_may_step_between_forward_and_backward() -> None:
    module = table(torch.float32)
    indices, grad = batch(0, torch.float32)
    out = module(indices)
    with torch.no_grad():
        module.weight.mul_(0.5)
    out.backward(grad)
    assert_close(parameter(module).main_grad, torch.zeros(ROWS, WIDTH).index_add_(0, indices, grad))


@pytest.mark.parametrize("wrong", [None, "a string", torch.zeros(ROWS + 2, WIDTH)])
def test_no_main_grad(wrong: object) -> None:
    module = table()
    parameter(module).main_grad = wrong
    out = module(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match=r"add_to_main_grad: weight.main_grad must be a tensor"):
        out.sum().backward()
    assert module.weight.grad is None


def test_a_padding_row_that_counts_from_the_end() -> None:
    module = table(torch.float32)
    module.padding_idx = -1
    module(torch.tensor([0, ROWS - 1])).sum().backward()
    assert parameter(module).main_grad[0].all()
    assert not parameter(module).main_grad[ROWS - 1].any()


def test_jagged_indices() -> None:
    rows = [torch.tensor([1, 2, 2]), torch.tensor([5])]
    module = table(torch.float32)
    out = module(torch.nested.nested_tensor(rows, layout=torch.jagged))
    out.values().sum().backward()
    counts = torch.bincount(torch.cat(rows), minlength=ROWS).float()
    assert torch.equal(parameter(module).main_grad, counts[:, None].expand(ROWS, WIDTH))


def test_hooks_are_called_with_none() -> None:
    module = table(torch.float32)
    seen: list[object] = []
    module.weight.register_hook(seen.append)
    module(torch.tensor([1])).sum().backward()
    assert seen == [None]


def test_nothing_is_asked_of_main_grad_without_a_backward() -> None:
    module = embed_ext.Embedding(ROWS, WIDTH, add_to_main_grad=True)
    with torch.no_grad():
        assert not module(torch.tensor([1])).requires_grad
    module.weight.requires_grad_(False)
    assert not module(torch.tensor([1])).requires_grad


def test_create_graph_records_nothing_in_main_grad() -> None:
    module = table(torch.float32)
    module(torch.tensor([1, 1])).pow(2).sum().backward(create_graph=True)
    assert not parameter(module).main_grad.requires_grad
    assert_close(parameter(module).main_grad[1], 4 * module.weight[1].detach())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph: bool) -> None:
    module = table(torch.float32)
    parameter(module).grad_added_to_main_grad = False
    model = nn.Sequential(module, nn.Linear(WIDTH, 2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    indices, _ = batch(0, torch.float32)
    compiled(indices).sum().backward()
    assert parameter(module).grad_added_to_main_grad is True
    first = parameter(module).main_grad.clone()
    parameter(module).main_grad.zero_()
    model(indices).sum().backward()
    assert first.any()
    assert_close(first, parameter(module).main_grad)


def test_torchscript_refuses_it() -> None:
    scripted = torch.jit.script(table(torch.float32))
    with pytest.raises(Exception, match="TorchScript does not know it"):
        scripted(torch.tensor([1]))


def test_reverting_forgets_it() -> None:
    model = nn.Sequential(table(torch.float32))
    embed_ext.revert(model)
    indices, grad = batch(0, torch.float32)
    model(indices).backward(grad)
    assert not parameter(model[0]).main_grad.any()
    embed_ext.convert(model)
    converted: Any = model[0]
    assert converted.add_to_main_grad is False


def test_the_option_is_an_attribute_that_copies_keep() -> None:
    module = embed_ext.Embedding(ROWS, WIDTH, add_to_main_grad=True)
    assert repr(module) == f"Embedding({ROWS}, {WIDTH}, add_to_main_grad=True)"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.add_to_main_grad
    module.add_to_main_grad = False
    assert repr(module) == f"Embedding({ROWS}, {WIDTH})"
    module(torch.tensor([1])).sum().backward()
    assert module.weight.grad is not None


def test_a_sparse_gradient_has_no_table_to_add_to() -> None:
    with pytest.raises(ValueError, match="add_to_main_grad: .*sparse=False"):
        embed_ext.Embedding(ROWS, WIDTH, sparse=True, add_to_main_grad=True)
