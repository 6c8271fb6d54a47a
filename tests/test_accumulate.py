"""A second backward() adds its rows to the .grad that is there, and shows it to whoever asked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import embed_ext

ROWS, WIDTH, TOKENS = 300, 24, 40


def table(kind: type[nn.Embedding] = embed_ext.Embedding, **options: object) -> nn.Embedding:
    torch.manual_seed(0)
    return kind(ROWS, WIDTH, **options)


def backward(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator)
    grad = torch.randn(TOKENS, WIDTH, generator=generator, dtype=module.weight.dtype)
    module(indices).backward(grad)


def operators_of_a_backward(module: nn.Module, seed: int) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        backward(module, seed)
    return {event.name for event in recorded.events()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_equals_torch(dtype: torch.dtype, options: dict[str, object]) -> None:
    ours, theirs = table(dtype=dtype, **options), table(nn.Embedding, dtype=dtype, **options)
    for step in range(4):
        for module in (ours, theirs):
            backward(module, step)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    module = table(dtype=dtype)
    backward(module, 0)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator)
    grad = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype)
    exact = module.weight.grad.double().index_add(0, indices, grad.double())
    module(indices).backward(grad)
    torch.testing.assert_close(module.weight.grad, exact.to(dtype), rtol=0, atol=0)


def test_no_pass_over_the_table_and_the_same_tensor() -> None:
    module = table()
    backward(module, 0)
    grad, version = module.weight.grad, module.weight.grad._version
    names = operators_of_a_backward(module, 1)
    assert module.weight.grad is grad
    assert grad._version == version + 1
    assert "aten::add_" not in names
    assert any("embedding_dense_backward" in name for name in names)


def test_the_increment_is_shown_to_hooks() -> None:
    for attach in ("tensor", "post accumulate", "accumulator before", "accumulator after", "node"):
        ours, theirs = table(), table(nn.Embedding)
        seen: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
        handles = []
        for name, module in (("ours", ours), ("theirs", theirs)):
            keep = seen[name].append
            accumulator = module.weight.expand_as(module.weight).grad_fn.next_functions[0][0]
            if attach == "tensor":
                module.weight.register_hook(lambda grad, keep=keep: keep(grad.clone()))
            elif attach == "post accumulate":
                module.weight.register_post_accumulate_grad_hook(
                    lambda weight, keep=keep: keep(weight.grad.clone())
                )
            elif attach == "accumulator before":
                handles.append(accumulator)
                accumulator.register_prehook(lambda grads, keep=keep: keep(grads[0].clone()))
            elif attach == "accumulator after":
                handles.append(accumulator)
                accumulator.register_hook(lambda _, grads, keep=keep: keep(grads[0].clone()))
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                indices = torch.randint(ROWS, (TOKENS,), generator=generator)
                out = module(indices)
                if attach == "node":
                    out.grad_fn.register_hook(lambda grads, _, keep=keep: keep(grads[0].clone()))
                out.backward(torch.ones_like(out))
        assert len(seen["ours"]) == len(seen["theirs"]) == 3, attach
        for our, their in zip(seen["ours"], seen["theirs"], strict=True):
            torch.testing.assert_close(our, their)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_create_graph() -> None:
    ours, theirs = table(), table(nn.Embedding)
    for module in (ours, theirs):
        for _ in range(2):
            module(torch.arange(5)).pow(3).sum().backward(create_graph=True)
        module.weight.grad.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_gradients_asked_for_by_name_are_not_added_elsewhere() -> None:
    module = table()
    backward(module, 0)
    before = module.weight.grad.clone()
    other = torch.ones(WIDTH, requires_grad=True)
    loss = (module(torch.arange(5)) * other).sum()
    (grad,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
    assert grad[:5].eq(1).all() and torch.equal(module.weight.grad, before)
    loss.backward(inputs=[other], retain_graph=True)
    assert torch.equal(module.weight.grad, before)
    loss.backward(inputs=[module.weight])
    torch.testing.assert_close(module.weight.grad, before + grad)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "sparse", "float64"])
def test_a_grad_of_another_kind(layout: str) -> None:
    ours, theirs = table(), table(nn.Embedding)
    for module in (ours, theirs):
        if layout == "transposed":
            module.weight.grad = torch.zeros(WIDTH, ROWS).t()
        elif layout == "sliced":
            module.weight.grad = torch.zeros(ROWS, 3 * WIDTH)[:, 5 : 5 + WIDTH]
        elif layout == "strided":
            module.weight.grad = torch.zeros(ROWS, 2 * WIDTH)[:, ::2]
        elif layout == "sparse":
            module.weight.grad = torch.zeros(ROWS, WIDTH).to_sparse(1)
        else:
            module.double()
            module.weight.grad = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        for step in range(2):
            backward(module, step)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_grad_whose_rows_share_memory_is_refused_and_left_alone() -> None:
    for kind in (embed_ext.Embedding, nn.Embedding):
        module, row = table(kind), torch.zeros(WIDTH)
        module.weight.grad = row.expand(ROWS, WIDTH)
        with pytest.raises(RuntimeError, match="single memory location"):
            backward(module, 0)
        assert not row.any()


def test_tied_and_repeated_uses_add_up() -> None:
    def loss(module: nn.Embedding, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randint(ROWS, (2, TOKENS), generator=generator)
        hidden = module(first) + 2 * module(second)
        return (hidden @ module.weight.t()).square().mean()

    ours, theirs = table(), table(nn.Embedding)
    for step in range(3):
        for module in (ours, theirs):
            loss(module, step).backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_bad_index_writes_nothing_to_grad() -> None:
    module = table()
    backward(module, 0)
    before = module.weight.grad.clone()
    indices = torch.tensor([1, 2, 3])
    out = module(indices)
    indices.data[1] = ROWS  # past the version counter, after the forward has checked it
    with pytest.raises(IndexError, match="index out of range"):
        out.sum().backward()
    assert torch.equal(module.weight.grad, before)


def test_checkpoint_and_saved_tensor_hooks() -> None:
    from torch.utils.checkpoint import checkpoint

    ours, theirs = table(), table(nn.Embedding)
    for module in (ours, theirs):
        for reentrant in (True, False):
            dummy = torch.ones((), requires_grad=True)
            run = lambda i, one, module=module: module(i) * one  # noqa: E731
            out = checkpoint(run, torch.arange(9), dummy, use_reentrant=reentrant)
            out.square().sum().backward()
        with torch.autograd.graph.save_on_cpu():
            backward(module, 0)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_copied_module_adds_to_its_own() -> None:
    module = table()
    backward(module, 0)
    twin = copy.deepcopy(module)
    before = module.weight.grad.clone()
    backward(twin, 1)
    assert torch.equal(module.weight.grad, before)


def test_a_gradient_that_comes_from_grad_itself() -> None:
    for kind in (embed_ext.Embedding, nn.Embedding):
        module = table(kind)
        module.weight.grad = torch.arange(ROWS, dtype=torch.float32)[:, None].repeat(1, WIDTH)
        module(torch.arange(ROWS).roll(-1)).backward(module.weight.grad)
        rows = torch.arange(ROWS)
        assert torch.equal(module.weight.grad[:, 0], (rows + rows.roll(1)).float())


def test_a_grad_of_another_size_than_in_the_forward() -> None:
    for kind in (embed_ext.Embedding, nn.Embedding):
        module, large = table(kind), torch.zeros(ROWS, WIDTH)
        out = module(torch.tensor([ROWS - 1]))
        module.weight.data = torch.zeros(100, WIDTH)
        module.weight.grad = large[:100]
        with pytest.raises(RuntimeError):
            out.sum().backward()
        assert not large.any()


def test_a_weight_that_was_frozen_after_the_forward() -> None:
    for kind in (embed_ext.Embedding, nn.Embedding):
        module = table(kind)
        module.weight.grad = torch.zeros(ROWS, WIDTH)
        out = module(torch.arange(4))
        module.weight.requires_grad_(False)
        out.sum().backward()
        assert not module.weight.grad.any()


def test_an_error_between_two_uses_leaves_grad_alone() -> None:
    def fail(grad: Tensor) -> Tensor:
        raise ValueError("on purpose")

    for kind in (embed_ext.Embedding, nn.Embedding):
        module = table(kind)
        module.weight.grad = torch.zeros(ROWS, WIDTH)
        first, second = module(torch.arange(4)), module(torch.arange(5))
        first.register_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            (first.sum() + second.sum()).backward()
        assert not module.weight.grad.any()


def test_anomaly_mode_sees_what_is_not_a_number() -> None:
    module = table()
    with torch.autograd.detect_anomaly(check_nan=True):
        for start in (None, torch.zeros(ROWS, WIDTH)):
            module.weight.grad = start
            grad = torch.tensor([float("inf"), -float("inf")])[:, None].repeat(1, WIDTH)
            with pytest.raises(RuntimeError, match="nan"):
                module(torch.tensor([3, 3])).backward(grad)


def test_tangents_of_a_gradient() -> None:
    forward_ad = torch.autograd.forward_ad
    for kind in (embed_ext.Embedding, nn.Embedding):
        module = table(kind)
        with forward_ad.dual_level():
            factor = forward_ad.make_dual(torch.ones(2, WIDTH), torch.full((2, WIDTH), 5.0))
            loss = (module(torch.tensor([1, 2])) * factor).sum()
            (grad,) = torch.autograd.grad(loss, module.weight)
            assert forward_ad.unpack_dual(grad).tangent.sum() == 2 * 5 * WIDTH


def test_a_trace_records_the_gradient() -> None:
    def gradient(weight: Tensor, indices: Tensor) -> Tensor:
        out = embed_ext.functional.embedding(indices, weight)
        return torch.autograd.grad(out.sum(), weight)[0]

    weight = torch.zeros(ROWS, WIDTH, requires_grad=True)
    traced = torch.jit.trace(gradient, (weight, torch.arange(3)), check_trace=False)
    assert torch.equal(traced(weight, torch.arange(5, 8)), gradient(weight, torch.arange(5, 8)))
