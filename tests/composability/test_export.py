"""Tracers and exporters: the lookup survives each as one op, with nn.Embedding's results."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx

import embed_ext
from tests.common import assert_close, make_indices, make_table
from tests.composability.lookups import LOOKUPS, Lookup, make_pair, stock

NUM_ROWS, WIDTH = 23, 6
EMBEDDING = torch.ops.embed_ext.embedding.default
DENSE_BACKWARD = torch.ops.embed_ext.embedding_dense_backward.default


class Model(nn.Module):
    """Indices [B, T] -> mean of their rows, [B, D]."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, indices: Tensor) -> Tensor:
        out: Tensor = self.table(indices).mean(dim=1).relu()
        return out


def make_models() -> tuple[Model, Model]:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=-1)
    return Model(theirs), Model(ours)


def exported(model: Model, strict: bool = False) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    example = (make_indices((4, 9), NUM_ROWS),)
    shapes = ({0: batch, 1: length},)
    return torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)


def targets(graph: torch.fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_export_save_and_load(strict: bool) -> None:
    theirs, ours = make_models()
    file = io.BytesIO()
    torch.export.save(exported(ours, strict), file)
    file.seek(0)
    program = torch.export.load(file)
    assert EMBEDDING in targets(program.graph)
    for shape in ((4, 9), (7, 3), (30, 50)):
        indices = make_indices(shape, NUM_ROWS)
        assert_close(program.module()(indices), theirs(indices))


def test_decompositions_keep_the_op() -> None:
    theirs, ours = make_models()
    program = exported(ours).run_decompositions()
    assert targets(program.graph).count(EMBEDDING) == 1
    indices = make_indices((2, 5), NUM_ROWS)
    assert_close(program.module()(indices), theirs(indices))


def test_exported_program_trains() -> None:
    theirs, ours = make_models()
    trainable = exported(ours).module()
    indices = make_indices((3, 8), NUM_ROWS)
    theirs(indices).square().sum().backward()
    trainable(indices).square().sum().backward()
    assert_close(trainable.get_parameter("table.weight").grad, theirs.table.weight.grad)


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    theirs, ours = make_models()
    quick = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
    }
    with fresh_cache():
        package = torch._inductor.aoti_compile_and_package(
            exported(ours), package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
        )
    run = torch._inductor.aoti_load_package(package)
    for shape in ((4, 9), (7, 3)):
        indices = make_indices(shape, NUM_ROWS)
        assert_close(run(indices), theirs(indices))


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_forward_and_backward(mode: str, lookup: Lookup) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4, 9), NUM_ROWS)

    def gradient(function: Lookup, w: Tensor, i: Tensor) -> Tensor:
        return grad(lambda x: function(x, i, padding_idx=1).pow(3).sum())(w)  # type: ignore[no-any-return]

    graph = make_fx(lambda w, i: gradient(lookup, w, i), tracing_mode=mode)(weight, indices)
    assert EMBEDDING in targets(graph.graph)
    assert DENSE_BACKWARD in targets(graph.graph)
    other = make_indices((4, 9) if mode != "symbolic" else (5, 11), NUM_ROWS, seed=9)
    assert_close(graph(weight, other), gradient(stock, weight, other))


def test_symbolic_trace_records_the_functional() -> None:
    theirs, ours = make_models()
    traced = torch.fx.symbolic_trace(ours)
    assert embed_ext.functional.embedding in targets(traced.graph)
    indices = make_indices((4, 9), NUM_ROWS)
    assert_close(traced(indices), theirs(indices))


def test_symbolic_trace_sees_into_the_module_unless_the_tracer_says_that_it_is_a_leaf() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            is_leaf = super().is_leaf_module(m, module_qualified_name)
            return is_leaf or isinstance(m, embed_ext.Embedding)

    theirs, ours = make_models()
    seen = []
    for tracer, model in ((torch.fx.Tracer(), theirs), (torch.fx.Tracer(), ours), (Tracer(), ours)):
        graph = tracer.trace(model)
        seen.append([node.op for node in graph.nodes if node.op not in ("placeholder", "output")])
        traced = torch.fx.GraphModule(model, graph)
        indices = make_indices((4, 9), NUM_ROWS)
        assert_close(traced(indices), theirs(indices))
    assert [ops[0] for ops in seen] == ["call_module", "get_attr", "call_module"]
    assert seen[1][:2] == ["get_attr", "call_function"]


def test_jit_trace_save_and_load() -> None:
    theirs, ours = make_models()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, (make_indices((4, 9), NUM_ROWS),)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "embed_ext::embedding" in str(loaded.inlined_graph)
    indices = make_indices((7, 3), NUM_ROWS)
    expected, actual = theirs(indices), loaded(indices)
    assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_close(loaded.table.weight.grad, theirs.table.weight.grad)


def test_jit_script() -> None:
    theirs, ours = make_models()
    scripted = torch.jit.script(ours)
    indices = make_indices((4, 9), NUM_ROWS)
    assert_close(scripted(indices), theirs(indices))


def test_jit_script_of_the_op() -> None:
    @torch.jit.script
    def lookup(weight: Tensor, indices: Tensor) -> Tensor:
        return torch.ops.embed_ext.embedding(weight, indices, 1, False, False)

    weight, indices = make_table(NUM_ROWS, WIDTH).requires_grad_(), make_indices((9,), NUM_ROWS)
    for _ in range(3):  # the first runs only profile
        (actual,) = torch.autograd.grad(lookup(weight, indices).pow(3).sum(), weight)
    (expected,) = torch.autograd.grad(stock(weight, indices, padding_idx=1).pow(3).sum(), weight)
    assert_close(actual, expected)
