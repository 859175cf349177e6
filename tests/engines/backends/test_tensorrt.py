"""What of the TensorRT backends can be tested without TensorRT, and, marked `tensorrt`, what needs it."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from diffusers import WanTransformer3DModel

from cinecat.engines.backends.choice import engine_key
from cinecat.engines.backends.contract import GRAPH_OUTPUT, STYLE_INPUTS, Bucket, EngineSpec, Range
from cinecat.engines.backends.export import example_inputs, export_onnx, export_program, graph_names
from cinecat.engines.backends.operators import unsupported_in_file
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.tensorrt import Dressing, Options, TensorRt
from cinecat.engines.backends.torch_tensorrt import TorchTensorRt, compile_settings, input_settings
from cinecat.engines.errors import EngineError

BACKENDS = [TensorRt(), TorchTensorRt()]
BUCKETS = (
    Bucket(Range(1, 2, 2), Range(24, 24, 32), Range(16, 16, 64)),
    Bucket(Range(1, 1, 2), Range(8, 16, 24), Range(16, 16, 64)),
)
SPEC = EngineSpec("model", "cpu", "8.9", "bfloat16", 1, 2, 32, 48, 5, 2, 4, buckets=BUCKETS)


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> WanStack:
    folder = tmp_path_factory.mktemp("micro")
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=1,
        image_dim=16,
        added_kv_proj_dim=32,
    ).save_pretrained(folder)
    return WanStack(WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)).requires_grad_(False)


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    """Puts a package of that name and content where Python looks first."""

    def put(name: str, source: str | None) -> None:
        (tmp_path / name).mkdir()
        if source is not None:
            (tmp_path / name / "__init__.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield put
    for name in ("tensorrt", "torch_tensorrt"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
class TestRefusal:
    def test_a_missing_library_is_told_in_one_line_with_what_to_install(self, backend, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        told = backend.missing(torch.device("cuda"))
        assert told == (
            f"{backend.name}: {backend.name} is not installed; pip install 'cinecat[tensorrt]', "
            "on a machine with an NVIDIA GPU and driver"
        )

    def test_a_folder_without_code_as_stubs_leave_one_is_no_library(self, backend, library):
        library(backend.name, None)
        assert "is not installed" in backend.missing(torch.device("cuda"))

    def test_a_library_that_cannot_be_loaded_is_told_with_its_reason(self, backend, library):
        library(backend.name, "raise ImportError('libnvinfer.so.11: cannot open\\nmore lines')")
        told = backend.missing(torch.device("cuda"))
        assert "cannot be loaded (libnvinfer.so.11: cannot open); install the NVIDIA driver" in told

    def test_an_old_library_is_told_with_what_is_wanted(self, backend, library):
        library(backend.name, "__version__ = '2.9.0'")
        told = backend.missing(torch.device("cuda"))
        assert "2.9.0" in told
        assert "pip install" in told

    def test_a_machine_without_a_gpu_is_told_to_want_the_driver(self, backend, library, monkeypatch):
        library(backend.name, f"__version__ = '{'10.13.0.35' if backend.name == 'tensorrt' else '2.13.0+cu130'}'")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert "install the NVIDIA driver" in backend.missing(torch.device("cuda"))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert "set device to cuda" in backend.missing(torch.device("cpu"))
        assert backend.missing(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("version", "runs"), [("10.12.0", False), ("10.13.0.35", True), ("11.4.0", True), ("12.0", False)]
)
def test_tensorrt_10_13_to_11_are_taken(version, runs, library, monkeypatch):
    library("tensorrt", f"__version__ = '{version}'")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (TensorRt().missing(torch.device("cuda")) is None) == runs


def test_versions_and_gpu_and_options_enter_the_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0.0.114"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(__version__="2.13.0"))
    assert TensorRt().versions() == {
        "tensorrt": "11.0.0.114",
        **{name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
    }
    assert TorchTensorRt().versions()["tensorrt"] == "11.0.0.114"
    assert TorchTensorRt().versions()["torch_tensorrt"] == "2.13.0"
    for backend in BACKENDS:
        digests = {engine_key(backend, SPEC).digest}
        for change in ({"architecture": "sm_90"}, {"options": ("ampere_plus",)}, {"buckets": BUCKETS[:1]}):
            digests.add(engine_key(backend, replace(SPEC, **change)).digest)
        with monkeypatch.context() as later:
            later.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
            digests.add(engine_key(backend, SPEC).digest)
        assert len(digests) == 5


def test_options_are_read_and_others_refused():
    assert Options.of(SPEC) == Options(version_compatible=False, hardware="own")
    both = replace(SPEC, options=("ampere_plus", "version_compatible"))
    assert Options.of(both) == Options(version_compatible=True, hardware="ampere_plus")
    with pytest.raises(EngineError, match="'refit' is none of tensorrt's"):
        Options.of(replace(SPEC, options=("refit",)))
    with pytest.raises(EngineError, match="exclude each other"):
        Options.of(replace(SPEC, options=("ampere_plus", "same_compute_capability")))
    with pytest.raises(EngineError, match="same_compute_capability is not torch_tensorrt's"):
        compile_settings(replace(SPEC, options=("same_compute_capability",)))


def test_the_bias_of_the_keys_is_not_taken_for_a_causal_mask_nor_are_weights_left_open():
    settings = compile_settings(SPEC)
    assert settings["attn_bias_is_causal"] is False
    assert settings["immutable_weights"] is True
    assert settings["require_full_compilation"] is True


def test_rows_that_wear_nothing_are_given_slot_0_of_the_banks_last_seen():
    dressing = Dressing(SPEC)
    plain = replace(example_inputs(SPEC, styled=False, rows=2), key_bias=None)
    empty = dressing(plain)
    assert tuple(empty) == graph_names(styled=True)
    assert not any(empty[name].any() for name in STYLE_INPUTS)
    worn = example_inputs(SPEC, styled=True, rows=2)
    assert worn.styles is not None
    assert dressing(worn)["bank_attn1_to_q_a"] is worn.styles.banks.a[0]
    again = dressing(plain)
    assert again["bank_attn1_to_q_a"] is worn.styles.banks.a[0]
    assert again["slots"].tolist() == [0, 0]
    assert tuple(Dressing(replace(SPEC, slots=0))(plain)) == graph_names(styled=False)


@pytest.mark.slow
def test_the_graphs_names_are_those_that_are_bound_and_tensorrt_takes_its_nodes(stack, tmp_path):
    export_onnx(stack, SPEC, styled=True, path=tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx", load_external_data=False).graph
    assert tuple(value.name for value in graph.input) == tuple(Dressing(SPEC)(example_inputs(SPEC, styled=False)))
    assert [value.name for value in graph.output] == [GRAPH_OUTPUT]
    assert [str(problem) for problem in unsupported_in_file(tmp_path / "graph.onnx")] == []


def test_a_programs_inputs_are_declared_in_order_with_the_hull_of_all_buckets(stack):
    settings = input_settings(export_program(stack, SPEC, styled=True), SPEC)
    assert tuple(each["name"] for each in settings) == graph_names(styled=True)
    by_name = {each.pop("name"): each for each in settings}
    assert by_name["tokens"] == {
        "min_shape": (1, 8, 32),
        "opt_shape": (2, 24, 32),
        "max_shape": (2, 32, 32),
        "dtype": torch.bfloat16,
    }
    assert by_name["slots"]["dtype"] == torch.int64
    assert by_name["bank_ffn_net_0_proj_b"] == {"shape": (1, 3, 48, 4), "dtype": torch.bfloat16}


@pytest.mark.tensorrt
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_built_engine_computes_what_the_stack_does(backend, stack, tmp_path):
    device = torch.device("cuda")
    if reason := backend.missing(device):
        pytest.skip(reason)
    stack = stack.to(device)
    major, minor = torch.cuda.get_device_capability()
    spec = replace(SPEC, device="cuda", architecture=f"{major}.{minor}")
    folder = tmp_path / "engine"
    folder.mkdir()
    backend.build(stack, spec, folder, print)
    engine = backend.load(stack, spec, folder)
    torch.manual_seed(0)
    # Each size three times: run, recorded, replayed.
    for rows, tokens, styled in [(2, 24, True), (1, 16, False), (2, 24, False)] * 3:
        blank = example_inputs(spec, styled, rows, tokens, text=16)
        floats = {name: torch.randn_like(value) for name, value in vars(blank).items() if torch.is_tensor(value)}
        inputs = replace(blank, **floats)
        assert engine.covers(inputs)
        torch.testing.assert_close(engine(inputs), stack(inputs), atol=0.05, rtol=0.05)
    assert not engine.covers(example_inputs(spec, False, 2, 64, text=16))
