"""embed_ext.Embedding is nn.Embedding to its users: construction, initialisation, options."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from embed_ext import Embedding
from tests.common import (
    FROZEN_DTYPES,
    OPTIONS,
    REAL_DTYPES,
    assert_close,
    assert_same_step,
    make_indices,
    make_pair,
    make_table,
)

KINDS = (Embedding, nn.Embedding)
INTEGER_DTYPES = tuple(dtype for dtype in FROZEN_DTYPES if not dtype.is_floating_point)
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8, for dtypes that have no comparison."""
    return tensor.detach().contiguous().view(torch.uint8)


# The class.


def test_is_a_subclass_of_nn_embedding_with_the_same_name() -> None:
    assert issubclass(Embedding, nn.Embedding)
    assert Embedding.__name__ == nn.Embedding.__name__
    assert Embedding.__module__.startswith("embed_ext")


def test_constructor_has_the_same_signature() -> None:
    def shape(kind: type[nn.Embedding]) -> list[tuple[str, Any]]:
        parameters = inspect.signature(kind).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]

    assert shape(Embedding) == shape(nn.Embedding)
    assert inspect.signature(Embedding.from_pretrained) == inspect.signature(
        nn.Embedding.from_pretrained
    )


def test_forward_has_the_same_signature() -> None:
    def shape(kind: type[nn.Embedding]) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(kind.forward).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(Embedding) == shape(nn.Embedding)
    assert typing.get_type_hints(Embedding.forward) == typing.get_type_hints(nn.Embedding.forward)


def test_class_has_the_same_constants_and_annotations() -> None:
    assert Embedding.__constants__ == [
        *nn.Embedding.__constants__,
        "add_to_main_grad",
        "coalesced",
    ]
    hints = typing.get_type_hints(nn.Embedding)
    assert {name: typing.get_type_hints(Embedding).get(name) for name in hints} == hints


@options
def test_instance_has_the_same_attributes(kwargs: dict[str, Any]) -> None:
    ours, theirs = make_pair(5, 3, **kwargs)
    assert vars(ours).keys() == vars(theirs).keys()
    for name in (*nn.Embedding.__constants__, "training"):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name


# The constructor.


@options
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_step_with_every_option(kwargs: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    ours, theirs = make_pair(5, 3, device=device, dtype=dtype, **kwargs)
    assert ours.weight.dtype == dtype and ours.weight.device.type == device
    # Each row a few times: the gradient of a 16-bit table is then the same in any order.
    assert_same_step(ours, theirs, make_indices((2, 4), 5, device=device))


def test_constructor_takes_its_arguments_by_position() -> None:
    weight = make_table(4, 3)
    ours, theirs = (kind(4, 3, 1, 2.0, 1.0, True, True, weight, True) for kind in KINDS)
    assert repr(ours) == repr(theirs)
    assert ours.weight.data_ptr() == weight.data_ptr() and not ours.weight.requires_grad


@pytest.mark.parametrize(("padding_idx", "row"), [(-1, 2), (-3, 0), (2, 2), (0, 0)])
def test_padding_idx_is_normalised(padding_idx: int, row: int) -> None:
    assert [kind(3, 2, padding_idx=padding_idx).padding_idx for kind in KINDS] == [row, row]


@pytest.mark.parametrize(("num_rows", "padding_idx"), [(3, 3), (3, -4), (3, 100), (0, 1), (0, -1)])
def test_padding_idx_out_of_range_is_refused(num_rows: int, padding_idx: int) -> None:
    for kind in KINDS:
        with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
            kind(num_rows, 2, padding_idx=padding_idx)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (4, 3, 1), (5, 3)])
def test_given_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        with pytest.raises(AssertionError, match="Shape of weight does not match"):
            kind(4, 3, _weight=torch.zeros(shape))


def test_given_weight_is_shared_and_keeps_its_padding_row() -> None:
    weight = make_table(4, 3)
    before = weight.clone()
    module = Embedding(4, 3, padding_idx=1, _weight=weight)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert module.weight.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_integer_weight_is_refused_unless_frozen(dtype: torch.dtype) -> None:
    for kind in KINDS:
        with pytest.raises(RuntimeError, match="floating point and complex dtype"):
            kind(4, 3, _weight=make_table(4, 3, dtype))


@pytest.mark.parametrize("dtype", FROZEN_DTYPES, ids=str)
def test_frozen_weight_of_any_dtype_is_looked_up(dtype: torch.dtype, device: str) -> None:
    weight = make_table(6, 3, dtype, device)
    module = Embedding(6, 3, _weight=weight, _freeze=True)
    indices = make_indices((4, 2), 6, device=device)
    out = module(indices)
    assert out.dtype == dtype and not out.requires_grad
    assert torch.equal(as_bytes(out), as_bytes(weight).view(6, -1)[indices].view(4, 2, -1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_table(dtype: torch.dtype, device: str) -> None:
    ours, theirs = make_pair(5, 3, dtype=dtype, device=device)
    theirs.requires_grad_(False)  # torch has no gradients for complex tables
    indices = make_indices((7,), 5, device=device)
    out = ours(indices)
    assert out.requires_grad
    assert torch.equal(out, theirs(indices))


@pytest.mark.parametrize(("num_rows", "width"), [(0, 3), (4, 0), (0, 0)])
def test_empty_table(num_rows: int, width: int, device: str) -> None:
    ours, theirs = make_pair(num_rows, width, device=device)
    indices = (
        make_indices((2, 3), num_rows, device=device)
        if num_rows
        else torch.empty((0, 5), dtype=torch.int64, device=device)
    )
    assert_same_step(ours, theirs, indices)


# Initialisation.


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_initial_weights_and_random_stream(padding_idx: int | None) -> None:
    def initial(kind: type[nn.Embedding]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        weight = kind(6, 4, padding_idx=padding_idx).weight.detach()
        return weight, torch.get_rng_state()

    (ours, our_state), (theirs, their_state) = (initial(kind) for kind in KINDS)
    assert torch.equal(ours, theirs) and torch.equal(our_state, their_state)
    torch.manual_seed(7)
    plain = torch.randn(6, 4)
    if padding_idx is not None:
        plain[padding_idx] = 0
    assert torch.equal(ours, plain)


def test_weights_can_be_made_on_meta_and_initialised_later(device: str) -> None:
    def build(kind: type[nn.Embedding]) -> Tensor:
        with torch.device("meta"):
            module = kind(6, 4, padding_idx=2)
        assert module.weight.is_meta
        assert module(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3, 4)
        module.to_empty(device=device)
        torch.manual_seed(3)
        module.reset_parameters()
        return module.weight.detach()

    ours, theirs = (build(kind) for kind in KINDS)
    assert torch.equal(ours, theirs) and not ours[2].any() and ours[1].all()


def test_skip_init_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    module = nn.utils.skip_init(Embedding, 6, 4, padding_idx=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(module) is Embedding
    assert module.weight.shape == (6, 4) and module.weight.device.type == "cpu"
    assert module.weight.requires_grad and module.padding_idx == 1


def test_default_dtype_and_device_are_obeyed() -> None:
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert Embedding(3, 2).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(previous)
    with torch.device("meta"):
        assert Embedding(3, 2).weight.is_meta


# from_pretrained.


def test_from_pretrained_freezes_and_shares() -> None:
    table = make_table(5, 3)
    before = table.clone()
    module = Embedding.from_pretrained(table, padding_idx=1)
    assert type(module) is Embedding
    assert not module.weight.requires_grad
    assert module.weight.data_ptr() == table.data_ptr()
    assert torch.equal(module(torch.tensor([1, 4])), before[[1, 4]])


@options
def test_from_pretrained_passes_options_on(kwargs: dict[str, Any], device: str) -> None:
    table = make_table(5, 3, device=device)
    ours, theirs = (kind.from_pretrained(table.clone(), freeze=False, **kwargs) for kind in KINDS)
    assert repr(ours) == repr(theirs)
    assert_same_step(ours, theirs, make_indices((3, 4), 5, device=device))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_from_pretrained_refuses_what_is_not_2d(shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        with pytest.raises(AssertionError, match="parameter is expected to be 2-dimensional"):
            kind.from_pretrained(torch.zeros(shape))


@pytest.mark.parametrize("dtype", FROZEN_DTYPES, ids=str)
def test_from_pretrained_takes_frozen_dtypes(dtype: torch.dtype) -> None:
    table = make_table(5, 3, dtype)
    module = Embedding.from_pretrained(table)
    assert torch.equal(as_bytes(module(torch.tensor([3]))), as_bytes(table[[3]]))


def test_from_pretrained_shares_a_transposed_table(device: str) -> None:
    table = make_table(3, 5, device=device).t()
    ours, theirs = (kind.from_pretrained(table, freeze=False) for kind in KINDS)
    assert ours.weight.stride() == table.stride()
    assert ours.weight.data_ptr() == table.data_ptr()
    assert_same_step(ours, theirs, make_indices((4,), 5, device=device))


# Printing.


@options
def test_repr_shows_the_same_options(kwargs: dict[str, Any]) -> None:
    ours, theirs = make_pair(10, 3, **kwargs)
    assert repr(ours) == repr(theirs)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


# Names that users reach it by.


def test_module_is_exported_at_the_top() -> None:
    assert embed_ext.Embedding is embed_ext.modules.Embedding
    assert "Embedding" in embed_ext.__all__


def test_rows_come_out_as_they_are_in_the_table(device: str) -> None:
    module = Embedding(10, 3, device=device)
    indices = torch.tensor([1, 2, 3, 4], device=device)
    assert_close(module(indices), module.weight.detach()[indices])
