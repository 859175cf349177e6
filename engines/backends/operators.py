"""What TensorRT would refuse of an ONNX graph, told without TensorRT: every node and type against the operator table
that its parser publishes, kept beside this file with its version and source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, defs, inliner, shape_inference

Version = tuple[int, int]
"""Of TensorRT: major and minor."""

OLDEST: Version = (10, 13)
"""The oldest TensorRT whose operators are known here, and that the backend `tensorrt` takes."""

_TABLE = Path(__file__).with_name("tensorrt_operators.json")

_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.INT4: "INT4",
}
"""ONNX types as the table calls them; TensorRT has no others."""

_FORBIDDEN = {
    "If": "control flow splits the graph and cannot be captured",
    "Loop": "control flow splits the graph and cannot be captured",
    "Scan": "control flow splits the graph and cannot be captured",
    "ScatterND": "in-place writes stop fusion; write the tensor as a whole",
}
"""Operators that TensorRT has and a stack of blocks has no need for."""

_SAME_TYPE = frozenset("Add Sub Mul Div Min Max Mean Sum Pow Where Equal Greater Less MatMul Gemm".split())
"""Operators whose operands must have one type in a strongly typed network, which never casts by itself."""

_CONVERTING = frozenset({"Cast", "CastLike", "ConstantOfShape", "EyeLike"})
"""Operators whose output has a type of its own, which the table speaks of too."""


@dataclass(frozen=True)
class Problem:
    """A node that TensorRT, or this project, does not take.

    Attributes:
        node: its name, or that of its first output where it has none; of a graph's input where that is at fault.
        operator: its type.
        reason: what is wrong, in one line.
    """

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.reason}"


@dataclass(frozen=True)
class _Operator:
    """One row of the table; see the file's `keys`."""

    types: frozenset[str]
    since: Version = OLDEST
    constant_inputs: frozenset[int] = frozenset()
    inputs: int | None = None
    outputs: int | None = None


@dataclass
class _Scope:
    """What is known of the values of a graph, and of the graphs around it."""

    types: dict[str, int] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)


def unsupported_nodes(model: onnx.ModelProto, version: Version = OLDEST) -> list[Problem]:
    """What a TensorRT of some version would refuse of a model, or this project does not want in one.

    Local functions are looked into, and so are subgraphs. Weights may lie outside the model, and must where they take
    more than 2 GB, which protobuf writes into no message.

    Raises:
        ValueError: the types of the model do not fit each other.
    """
    model = _inferred(inliner.inline_local_functions(model))
    problems = [problem for opset in model.opset_import for problem in _opset_problems(opset, version)]
    opset = next((each.version for each in model.opset_import if _is_onnx(each.domain)), 1)
    return problems + list(_graph_problems(model.graph, opset, version, _Scope()))


def unsupported_in_file(path: Path, version: Version = OLDEST) -> list[Problem]:
    """`unsupported_nodes` of a file, whose external weights are not read."""
    return unsupported_nodes(onnx.load(path, load_external_data=False), version)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types of all values."""
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as error:
        raise ValueError(f"onnx: {error}") from error


def _opset_problems(opset: onnx.OperatorSetIdProto, version: Version) -> Iterator[Problem]:
    if not _is_onnx(opset.domain):
        return
    ranges = _table()["opsets"]
    known = max((each for each in map(_version, ranges) if each <= version), default=min(map(_version, ranges)))
    least, most = ranges[".".join(map(str, known))]
    if not least <= opset.version <= most:
        yield Problem("model", "opset", f"{opset.version}; TensorRT {_spelt(version)} takes {least} to {most}")


def _graph_problems(graph: onnx.GraphProto, opset: int, version: Version, around: _Scope) -> Iterator[Problem]:
    scope = _Scope(dict(around.types), set(around.constants))
    for value in (*graph.input, *graph.output, *graph.value_info):
        scope.types[value.name] = value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        scope.types[tensor.name] = tensor.data_type
        scope.constants.add(tensor.name)
    for value in graph.input:
        if scope.types[value.name] not in _NAMES:
            yield Problem(value.name, "input", f"{_type_name(scope.types[value.name])}: TensorRT has no such type")
    for node in graph.node:
        if node.op_type == "Constant":
            scope.constants.update(node.output)
        yield from _node_problems(node, opset, version, scope)
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graph_problems(subgraph, opset, version, scope)


def _node_problems(node: onnx.NodeProto, opset: int, version: Version, scope: _Scope) -> Iterator[Problem]:
    def problem(reason: str) -> Problem:
        return Problem(node.name or node.output[0], node.op_type, reason)

    if not _is_onnx(node.domain):
        yield problem(f"an operator of {node.domain}, which TensorRT does not know")
        return
    operator = _operators().get(node.op_type)
    if operator is None or not operator.types:
        yield problem(f"TensorRT {_spelt(version)} has no such operator")
        return
    if operator.since > version:
        yield problem(f"TensorRT has it from {_spelt(operator.since)} on, not {_spelt(version)}")
    if node.op_type in _FORBIDDEN:
        yield problem(_FORBIDDEN[node.op_type])
    yield from _type_problems(node, opset, operator, scope.types, problem)
    for index in sorted(operator.constant_inputs):
        if index < len(node.input) and node.input[index] and node.input[index] not in scope.constants:
            yield problem(f"input {index} ({node.input[index]}) must be a constant")
    for kind, values, most in (("input", node.input, operator.inputs), ("output", node.output, operator.outputs)):
        if most is not None and any(values[most:]):
            yield problem(f"{kind} {most} ({next(filter(None, values[most:]))}) is not supported")


def _type_problems(
    node: onnx.NodeProto,
    opset: int,
    operator: _Operator,
    types: Mapping[str, int],
    problem: Callable[[str], Problem],
) -> Iterator[Problem]:
    named = dict.fromkeys(name for name in (*node.input, *node.output) if name)
    known = {name: types.get(name, TensorProto.UNDEFINED) for name in named}
    unknown = [name for name, kind in known.items() if kind == TensorProto.UNDEFINED]
    for name in unknown:
        yield problem(f"the type of {name} cannot be inferred")
    foreign = [name for name, kind in known.items() if kind not in _NAMES and name not in unknown]
    for name in foreign:
        yield problem(f"{name} is {_type_name(known[name])}, a type that TensorRT does not have")
    for name in _data_values(node, opset):
        if name in unknown or name in foreign:
            continue
        if _NAMES[known[name]] not in operator.types:
            yield problem(f"{name} is {_type_name(known[name])}; TensorRT takes {', '.join(sorted(operator.types))}")
    if node.op_type in _SAME_TYPE:
        operands = node.input[1:] if node.op_type == "Where" else node.input
        kinds = sorted({_type_name(known[name]) for name in operands if name})
        if len(kinds) > 1:
            yield problem(f"operands are {' and '.join(kinds)}; strongly typed networks need a cast")


def _data_values(node: onnx.NodeProto, opset: int) -> list[str]:
    """Inputs and outputs of the type that the table speaks of: that of the data, not of indices, axes or shapes."""
    schema = defs.get_schema(node.op_type, opset, node.domain)
    inputs, outputs = _formal_types(schema.inputs, node.input), _formal_types(schema.outputs, node.output)
    shared = not inputs or outputs[0] in inputs
    data = {outputs[0] if shared else inputs[0]}
    if node.op_type in _CONVERTING:
        data.add(outputs[0])
    actual = zip((*inputs, *outputs), (*node.input, *node.output), strict=True)
    return list(dict.fromkeys(name for kind, name in actual if kind in data and name))


def _formal_types(parameters: Any, actual: Any) -> list[str]:
    """The type variable of each value given; the last parameter of a schema may take any number of them."""
    return [parameters[min(index, len(parameters) - 1)].type_str for index in range(len(actual))]


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text())
    return table


@cache
def _operators() -> dict[str, _Operator]:
    return {
        name: _Operator(
            types=frozenset(row["types"]),
            since=_version(row["since"]) if "since" in row else OLDEST,
            constant_inputs=frozenset(row.get("constant_inputs", ())),
            inputs=row.get("inputs"),
            outputs=row.get("outputs"),
        )
        for name, row in _table()["operators"].items()
    }


def _is_onnx(domain: str) -> bool:
    return domain in ("", "ai.onnx")


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)


def _spelt(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _type_name(kind: int) -> str:
    return _NAMES.get(kind) or TensorProto.DataType.Name(kind).lower()
