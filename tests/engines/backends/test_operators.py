from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cinecat.engines.backends.operators import Problem, unsupported_in_file, unsupported_nodes

FLOAT, HALF, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE


def model(*nodes, inputs=None, initializers=(), opset=18, functions=(), outputs=()):
    inputs = {"x": FLOAT, "y": FLOAT} if inputs is None else inputs
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs or [nodes[-1].output[0]]],
        list(initializers),
    )
    domains = {"": opset, **{function.domain: 1 for function in functions}}
    imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def node(operator, inputs, outputs, name="it", **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), name=name, **attributes)


def axes(*values):
    return helper.make_tensor("axes", TensorProto.INT64, [len(values)], values)


def only(problems: list[Problem]) -> str:
    assert len(problems) == 1, [str(problem) for problem in problems]
    return str(problems[0])


def test_a_graph_of_known_operators_and_types_has_no_problem():
    nodes = (
        node("Mul", "x y", "product"),
        node("ReduceMean", "product axes", "mean"),
        node("Sub", "product mean", "centred"),
        node("Cast", "centred", "half", to=TensorProto.BFLOAT16),
        node("Shape", "half", "shape"),
        node("Gather", "half index", "row"),
        node("Equal", "x y", "same"),
        node("Where", "same half zero", "out"),
    )
    constants = (
        axes(1),
        helper.make_tensor("index", TensorProto.INT64, [1], [0]),
        helper.make_tensor("zero", TensorProto.BFLOAT16, [1], [0.0]),
    )
    assert unsupported_nodes(model(*nodes, initializers=constants)) == []


def test_an_operator_that_the_table_marks_unsupported_is_named_with_its_node():
    assert only(unsupported_nodes(model(node("Det", "x", "out", "the_det")))) == (
        "the_det (Det): TensorRT 10.13 has no such operator"
    )


def test_an_operator_of_another_domain_is_refused():
    foreign = helper.make_node("FusedMatMul", ["x", "y"], ["out"], name="it", domain="com.microsoft")
    graph = model(foreign)
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "com.microsoft" in only(unsupported_nodes(graph))


def test_an_operator_that_only_later_versions_have_is_refused_for_earlier_ones():
    graph = model(node("RMSNormalization", "x y", "out"), opset=23)
    assert "from 10.15 on" in str(unsupported_nodes(graph)[-1])
    assert unsupported_nodes(graph, version=(10, 15)) == []


def test_an_opset_beyond_the_parsers_is_refused():
    graph = model(node("Add", "x y", "out"), opset=24)
    assert "opset" in only(unsupported_nodes(graph, version=(10, 13)))
    assert unsupported_nodes(graph, version=(11, 0)) == []


@pytest.mark.parametrize("operator", ["If", "Loop", "Scan", "ScatterND"])
def test_control_flow_and_scatters_are_forbidden(operator):
    body = helper.make_graph(
        [node("Add", "x y", "inner", "inside")], "body", [], [helper.make_empty_tensor_value_info("inner")]
    )
    if operator == "If":
        condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        graph = model(node("If", "yes", "out", then_branch=body, else_branch=body), initializers=[condition])
    elif operator == "ScatterND":
        index = helper.make_tensor("index", TensorProto.INT64, [1, 1], [0])
        graph = model(node("ScatterND", "x index row", "out"), inputs={"x": FLOAT, "row": FLOAT}, initializers=[index])
    elif operator == "Scan":
        scanned = helper.make_graph(
            [node("Neg", "a", "b")],
            "body",
            [helper.make_tensor_value_info("a", FLOAT, [4])],
            [helper.make_tensor_value_info("b", FLOAT, [4])],
        )
        graph = model(node("Scan", "x", "out", body=scanned, num_scan_inputs=1))
    else:
        looped = helper.make_graph(
            [node("Identity", "on", "still"), node("Neg", "a", "b")],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("a", FLOAT, ["n", 4]),
            ],
            [
                helper.make_tensor_value_info("still", TensorProto.BOOL, []),
                helper.make_tensor_value_info("b", FLOAT, ["n", 4]),
            ],
        )
        trips = helper.make_tensor("trips", TensorProto.INT64, [], [2])
        graph = model(node("Loop", "trips x", "out", body=looped), initializers=[trips])
        graph.graph.node[0].input.insert(1, "")
    assert only(unsupported_nodes(graph)).startswith(f"it ({operator}): ")


def test_nodes_of_subgraphs_are_looked_at():
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [node("Det", "x", "inner", "inside")], "body", [], [helper.make_tensor_value_info("inner", FLOAT, None)]
    )
    graph = model(node("If", "yes", "out", then_branch=body, else_branch=body), initializers=[condition])
    assert "inside" in {problem.node for problem in unsupported_nodes(graph)}


def test_nodes_of_local_functions_are_looked_at():
    function = helper.make_function(
        "ours", "Volume", ["a"], ["b"], [node("Det", "a", "b", "inside")], [helper.make_opsetid("", 18)]
    )
    call = helper.make_node("Volume", ["x"], ["out"], name="call", domain="ours")
    assert "Det" in only(unsupported_nodes(model(call, functions=[function])))


def test_float64_is_refused_wherever_it_appears():
    inside = model(node("Cast", "x", "wide", to=DOUBLE), node("Cast", "wide", "out", "back", to=FLOAT))
    assert [problem.operator for problem in unsupported_nodes(inside)] == ["Cast", "Cast"]
    at_the_door = model(node("Cast", "x", "out", to=FLOAT), inputs={"x": DOUBLE})
    assert {problem.operator for problem in unsupported_nodes(at_the_door)} == {"input", "Cast"}
    constant = helper.make_tensor("wide", DOUBLE, [1], [0.5])
    assert "wide is double" in only(
        unsupported_nodes(model(node("Cast", "wide", "out", to=FLOAT), initializers=[constant]))
    )


def test_a_type_that_the_operator_does_not_take_is_named():
    graph = model(node("Mish", "x", "out"), inputs={"x": TensorProto.BFLOAT16}, opset=22)
    problems = [str(problem) for problem in unsupported_nodes(graph)]
    assert problems == [f"it (Mish): {name} is BF16; TensorRT takes FP16, FP32" for name in ("x", "out")]


def test_types_of_indices_and_axes_are_not_taken_for_the_datas():
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [1])
    assert unsupported_nodes(model(node("CumSum", "x axis", "out"), initializers=[axis])) == []


def test_what_must_be_a_constant_is_refused_as_a_computed_value():
    computed = (node("Shape", "x", "axes", start=1), node("ReduceMean", "x axes", "out", "mean"))
    assert "input 1 (axes) must be a constant" in only(unsupported_nodes(model(*computed)))
    constant = (node("Constant", "", "axes", value=axes(1)), node("ReduceMean", "x axes", "out", "mean"))
    assert unsupported_nodes(model(*constant)) == []


def test_outputs_that_the_parser_does_not_make_are_refused():
    scale = helper.make_tensor("scale", FLOAT, [4], [1.0] * 4)
    one = node("LayerNormalization", "x scale", "out")
    three = node("LayerNormalization", "x scale", "out mean deviation")
    assert unsupported_nodes(model(one, initializers=[scale])) == []
    assert "output 1 (mean)" in only(unsupported_nodes(model(three, initializers=[scale])))


@pytest.mark.parametrize("operator", ["Add", "Mul", "Pow", "MatMul"])
def test_operands_of_two_types_are_refused(operator):
    graph = model(node(operator, "x y", "out"), inputs={"x": FLOAT, "y": HALF})
    assert "operands are FP16 and FP32" in only(unsupported_nodes(graph))


def test_a_value_whose_type_is_unknown_is_reported_rather_than_passed():
    foreign = helper.make_node("Unknown", ["x"], ["strange"], name="strange", domain="elsewhere")
    graph = model(foreign, node("Neg", "strange", "out"))
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))
    assert "the type of strange cannot be inferred" in [problem.reason for problem in unsupported_nodes(graph)]


def test_a_model_whose_types_contradict_each_other_is_an_error():
    nodes = (node("Reshape", "x shape", "out"),)
    shape = helper.make_tensor("shape", FLOAT, [1], [4.0])
    with pytest.raises(ValueError, match="onnx"):
        unsupported_nodes(model(*nodes, initializers=[shape]))


def test_weights_beyond_two_gigabytes_may_lie_beside_the_file(tmp_path: Path):
    columns = 2**28
    weight = TensorProto(name="weight", data_type=FLOAT, dims=[4, columns], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights")
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(4 * columns * 4)
    graph = model(node("MatMul", "x weight", "product"), node("Det", "product", "out"), initializers=[weight])
    onnx.save(graph, tmp_path / "model.onnx")
    assert only(unsupported_in_file(tmp_path / "model.onnx")).startswith("it (Det)")
