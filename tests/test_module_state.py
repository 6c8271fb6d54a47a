"""Copies, conversions, replaced weights: the module keeps no shape or pointer of its own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from embed_ext import Embedding
from tests.common import (
    OPTIONS,
    assert_close,
    assert_same_step,
    make_indices,
    make_pair,
    make_table,
)

KINDS = (Embedding, nn.Embedding)
INDICES = torch.tensor([[1, 4], [4, 0]])


def saved_and_loaded(value: Any, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


# State and copies.


def test_state_dict_is_the_weight_and_loads_both_ways() -> None:
    ours, theirs = Embedding(5, 3), nn.Embedding(5, 3)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert ours.state_dict()["weight"].data_ptr() == ours.weight.data_ptr()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    other = Embedding(5, 3)
    theirs.load_state_dict(saved_and_loaded(other.state_dict(), weights_only=True))
    assert torch.equal(other.weight, theirs.weight)


def test_state_dict_of_another_shape_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            Embedding(5, 3).load_state_dict(kind(6, 3).state_dict())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: saved_and_loaded(module, weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copy_is_equal_and_apart(copied: Callable[[Embedding], Embedding]) -> None:
    module = Embedding(5, 3, **OPTIONS["all_dense"])
    twin = copied(module)
    assert type(twin) is Embedding and repr(twin) == repr(module)
    assert twin.weight.data_ptr() != module.weight.data_ptr()
    assert torch.equal(twin(INDICES), module(INDICES))


def test_share_memory() -> None:
    module = Embedding(5, 3).share_memory()
    assert module.weight.is_shared()
    assert torch.equal(module(INDICES), module.weight[INDICES])


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.double,
        nn.Module.half,
        nn.Module.bfloat16,
        lambda module: module.to("meta"),
    ],
    ids=["double", "half", "bfloat16", "meta"],
)
def test_conversion(convert: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = (convert(module) for module in make_pair(5, 3))
    indices = INDICES.to(next(theirs.parameters()).device)
    actual, expected = ours(indices), theirs(indices)
    assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
    assert actual.is_meta or torch.equal(actual, expected)


def test_module_methods_see_one_parameter() -> None:
    module = Embedding(5, 3)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert not list(module.buffers()) and not list(module.children())
    assert module.train(False) is module and not module.training
    assert module.eval().train().training
    seen: list[nn.Module] = []
    nn.Sequential(module).apply(seen.append)
    assert seen[0] is module
    module(INDICES).sum().backward()
    module.zero_grad()
    assert module.weight.grad is None


def test_module_hooks_run() -> None:
    module = Embedding(5, 3)
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    module.register_forward_hook(lambda _, args, out: args[0] * -out)
    assert torch.equal(module(torch.tensor([1])), -2 * module.weight[[2]])


# Replaced weights and options.


def test_weight_data_and_num_embeddings_may_grow() -> None:
    ours, theirs = make_pair(3, 2)
    larger = make_table(9, 4)
    for module in (ours, theirs):
        module.weight.data = larger.clone()
        module.num_embeddings, module.embedding_dim = larger.shape
    assert repr(ours) == repr(theirs)
    assert_same_step(ours, theirs, torch.tensor([8, 0, 8]))


@pytest.mark.parametrize("num_rows", [2, 9])
def test_weight_may_become_another_parameter(num_rows: int) -> None:
    ours, theirs = make_pair(5, 3)
    for module in (ours, theirs):
        module.weight = nn.Parameter(make_table(num_rows, 4))  # num_embeddings left as it was
    assert_same_step(ours, theirs, torch.tensor([[num_rows - 1], [0]]))
    with pytest.raises(IndexError, match="index out of range"):
        ours(torch.tensor([num_rows]))


def test_weight_may_be_tied_to_a_linear_layer(device: str) -> None:
    def loss_gradient(kind: type[nn.Embedding]) -> Tensor:
        torch.manual_seed(0)
        linear = nn.Linear(4, 6, bias=False, device=device)
        embedding = kind(6, 4, device=device)
        embedding.weight = linear.weight
        model = nn.Sequential(embedding, linear)
        assert len(list(model.parameters())) == 1
        model(INDICES.to(device)).square().sum().backward()
        assert linear.weight.grad is not None
        return linear.weight.grad

    ours, theirs = (loss_gradient(kind) for kind in KINDS)
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "value"), [("padding_idx", 4), ("max_norm", 0.5), ("scale_grad_by_freq", True)]
)
def test_options_are_read_at_each_call(name: str, value: Any) -> None:
    ours, theirs = make_pair(5, 3)
    assert_same_step(ours, theirs, INDICES)
    setattr(ours, name, value)
    setattr(theirs, name, value)
    assert_same_step(ours, theirs, INDICES)


def test_sparse_is_read_at_each_call() -> None:
    module = Embedding(5, 3)
    module.sparse = True
    module(INDICES).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.is_sparse


def test_weight_may_be_a_plain_tensor_or_a_buffer() -> None:
    table = make_table(5, 3)
    module = Embedding(5, 3)
    del module.weight
    module.weight = table
    assert torch.equal(module(INDICES), table[INDICES])
    del module.weight
    module.register_buffer("weight", -table)
    assert torch.equal(module(INDICES), -table[INDICES])


def test_weight_that_is_gone_gives_the_same_error() -> None:
    for kind in KINDS:
        module = kind(5, 3)
        del module.weight
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            module(INDICES)
        module = kind(5, 3)
        module.register_parameter("weight", None)
        with pytest.raises(TypeError, match="'weight'.* must be Tensor, not NoneType"):
            module(INDICES)


# Parametrised weights.


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


PARAMETRISATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "own": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_by_hook": nn.utils.weight_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.4),
}


@pytest.mark.parametrize("add", PARAMETRISATIONS.values(), ids=PARAMETRISATIONS.keys())
def test_parametrised_weight(add: Callable[[nn.Module], nn.Module]) -> None:
    pair = make_pair(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about its weight norm by hook
        for module in pair:
            torch.manual_seed(1)
            add(module)
    ours, theirs = (module.eval() for module in pair)
    assert isinstance(ours, Embedding)
    assert_same_step(ours, theirs, INDICES)


def test_parametrisation_can_be_removed() -> None:
    module = Embedding(5, 3)
    before = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Doubled())
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is Embedding
    assert torch.equal(module(INDICES), 2 * before[INDICES])


# Other ways to call it.


def test_functional_call_takes_other_weights() -> None:
    module = Embedding(5, 3, padding_idx=1)
    weight = make_table(8, 3).requires_grad_()
    out = torch.func.functional_call(module, {"weight": weight}, torch.tensor([7, 1]))
    assert torch.equal(out, weight[[7, 1]])
    out.sum().backward()
    assert module.weight.grad is None and weight.grad is not None
    assert weight.grad.sum(1).tolist() == [0, 0, 0, 0, 0, 0, 0, 3]


def test_subclass_may_wrap_forward() -> None:
    class Scaled(Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embedding_dim**0.5

    module = Scaled(5, 4, padding_idx=1)
    assert torch.equal(module(INDICES), module.weight[INDICES] * 2)
    assert repr(module) == "Scaled(5, 4, padding_idx=1)"
    assert type(Scaled.from_pretrained(make_table(5, 4))) is Scaled


@pytest.mark.parametrize("name", ["plain", "padding", "max_norm"])
def test_module_can_be_traced(name: str) -> None:
    module = Embedding(5, 3, **OPTIONS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, about torch.jit itself
        traced = torch.jit.trace(module, (INDICES,))
    other = torch.tensor([2, 2, 3])
    assert torch.equal(traced(other), module(other))
    assert any("embed_ext::embedding" in str(node) for node in traced.inlined_graph.nodes())


@pytest.mark.parametrize("name", ["plain", "padding", "frequency"])
def test_jagged_indices(name: str, device: str) -> None:
    ours, theirs = make_pair(5, 3, device=device, **OPTIONS[name])
    parts = [make_indices((length,), 5, device=device, seed=length) for length in (3, 1, 4)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out = ours(jagged)
    assert out.is_nested and out.layout == torch.jagged
    for part, indices in zip(out.unbind(), parts, strict=True):
        assert torch.equal(part, theirs(indices))
    out.values().sum().backward()
    theirs(torch.cat(parts)).sum().backward()
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert_close(ours.weight.grad, theirs.weight.grad)
