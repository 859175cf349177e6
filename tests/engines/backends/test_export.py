"""The exported graph: what it holds and what it leaves open."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import WanTransformer3DModel

from cinecat.engines.backends.contract import GRAPH_OUTPUT, STYLE_INPUTS, EngineSpec
from cinecat.engines.backends.export import export_onnx, export_program, graph_names, open_sizes
from cinecat.engines.backends.stack import WanStack
from tests.engines.backends.sample_stack import small_spec
from tests.engines.samples import small_transformer

FULL_WIDTH = EngineSpec("14B", "meta", "any", "bfloat16", 1, 40, 5120, 13824, 257, 8, 32)


@pytest.mark.slow
class TestOnnx:
    @pytest.fixture(scope="class")
    def path(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("onnx") / "styled.onnx"
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("torch.onnx").addHandler(handler)
        try:
            export_onnx(WanStack(small_transformer()), small_spec(), True, path)
        finally:
            logging.getLogger("torch.onnx").removeHandler(handler)
        assert [record.getMessage() for record in records] == []
        return path

    def test_it_passes_the_checker_with_full_shape_inference(self, path: Path) -> None:
        onnx.checker.check_model(str(path), full_check=True)

    def test_it_has_no_branches_no_loops_and_no_scatters(self, path: Path) -> None:
        operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert operators.isdisjoint({"If", "Loop", "Scan", "ScatterND", "ScatterElements"})

    def test_its_inputs_are_those_of_the_contract_with_open_sizes_by_name(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        assert tuple(each.name for each in graph.input) == graph_names(True)
        assert set(STYLE_INPUTS) <= {each.name for each in graph.input}
        for each in graph.input:
            dims = each.type.tensor_type.shape.dim
            assert {index: dim.dim_param for index, dim in enumerate(dims) if dim.dim_param} == open_sizes(each.name)
        (output,) = graph.output
        assert output.name == GRAPH_OUTPUT
        assert [dim.dim_param for dim in output.type.tensor_type.shape.dim][:2] == ["rows", "tokens"]

    def test_weights_lie_beside_it(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        weights = [each for each in graph.initializer if len(each.dims) == 2]
        assert weights
        assert {each.data_location for each in weights} == {onnx.TensorProto.EXTERNAL}
        assert path.with_name("styled.onnx.data").stat().st_size > 2 * 24 * 24


@pytest.mark.parametrize("styled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_14b_layout_is_exported_with_its_sizes_open(styled: bool) -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            num_layers=1,
            ffn_dim=13824,
            image_dim=1280,
            added_kv_proj_dim=5120,
        )
    stack = WanStack(transformer.to(torch.bfloat16).requires_grad_(False))
    program = export_program(stack, FULL_WIDTH, styled)
    shapes = {
        node.name: node.meta["val"].shape
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs
    }
    assert len(shapes) == len(graph_names(styled))
    for name, shape in zip(graph_names(styled), shapes.values(), strict=True):
        assert {index for index, size in enumerate(shape) if not isinstance(size, int)} == set(open_sizes(name))
    (output,) = program.graph.find_nodes(op="output")[0].args[0]
    rows, tokens, dim = output.meta["val"].shape
    assert (isinstance(rows, int), isinstance(tokens, int), dim) == (False, False, 5120)
