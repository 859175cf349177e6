"""Builds a TensorRT engine from the exported graph. Imported only where TensorRT is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import tensorrt as trt

from cinecat.engines.backends.contract import Bucket, EngineSpec
from cinecat.engines.backends.export import export_onnx, graph_names
from cinecat.engines.backends.operators import unsupported_in_file
from cinecat.engines.backends.profiles import input_shapes
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.tensorrt import Options, styled
from cinecat.engines.errors import EngineError

PLAN = "engine.plan"
"""What a build leaves in its folder."""

_SHOWN = 5
"""So many problems of a graph are told at once."""

_HARDWARE = {
    "own": trt.HardwareCompatibilityLevel.NONE,
    "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
}


class Log(trt.ILogger):
    """Keeps TensorRT's errors, which its calls do not return."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(msg)

    def told(self) -> str:
        """The last errors, in one line."""
        return "; ".join(self.errors[-_SHOWN:]) or "TensorRT gave no reason"


def build(stack: WanStack, spec: EngineSpec, options: Options, folder: Path, announce: Callable[[str], object]) -> None:
    """Writes PLAN into a folder, and what its tactics took to a timing cache beside the folder.

    Raises:
        EngineError: TensorRT does not take the graph, or cannot build it.
    """
    log = Log()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = Path(scratch) / "graph.onnx"
        announce("exporting")
        export_onnx(stack, spec, styled(spec), graph)
        _check_operators(graph)
        announce("parsing")
        builder = trt.Builder(log)
        network = builder.create_network(_network_flags())
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            raise EngineError(f"tensorrt: cannot parse the graph: {_reasons(parser) or log.told()}")
        config = _configure(builder, network, spec, options)
        monitor = _Monitor(announce)
        config.progress_monitor = monitor
        timings = _timing_path(spec, folder)
        cache = _timing_cache(config, timings)
        plan = _given(builder.build_serialized_network(network, config), log)
    with (folder / PLAN).open("wb") as file:
        file.write(plan)
    _keep(cache, timings)


def _reasons(parser: trt.OnnxParser) -> str:
    return "; ".join(parser.get_error(index).desc() for index in range(min(parser.num_errors, _SHOWN)))


def _given(plan: trt.IHostMemory | None, log: Log) -> trt.IHostMemory:
    if plan is None:
        raise EngineError(f"tensorrt: cannot build the engine: {log.told()}")
    return plan


def _check_operators(graph: Path) -> None:
    major, minor = (int(part) for part in trt.__version__.split(".")[:2])
    try:
        problems = unsupported_in_file(graph, (major, minor))
    except ValueError as error:
        raise EngineError(f"tensorrt: {error}") from error
    if problems:
        shown = "; ".join(map(str, problems[:_SHOWN]))
        raise EngineError(f"tensorrt: {len(problems)} nodes of the graph are not supported: {shown}")


def _network_flags() -> int:
    """Strongly typed: the graph's types are what is computed in. From 11 on networks are so without being asked."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(
    builder: trt.Builder, network: trt.INetworkDefinition, spec: EngineSpec, options: Options
) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    # Float32 is float32 here, as it is in torch.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = _HARDWARE[options.hardware]
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if set(names) != set(graph_names(styled(spec))):
        raise EngineError(f"tensorrt: the graph's inputs are {', '.join(names)}")
    for bucket in spec.buckets:
        _add_profile(builder, network, config, bucket)
    return config


def _add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, bucket: Bucket
) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = input_shapes(tensor.name, [tensor.shape[each] for each in range(len(tensor.shape))], bucket)
        ends = (shapes.least, shapes.best, shapes.most)
        profile.set_shape(tensor.name, *(trt.Dims(list(end)) for end in ends))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"tensorrt: refuses the bucket {bucket}")


def _timing_path(spec: EngineSpec, folder: Path) -> Path:
    return folder.parent / f"tensorrt-{trt.__version__}-{spec.architecture}.timing"


def _timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Sets what earlier builds measured; nothing where that was another GPU's, or cannot be read."""
    if path.exists():
        cache = config.create_timing_cache(path.read_bytes())
        if _taken(config, cache):
            return cache
    cache = config.create_timing_cache(b"")
    _taken(config, cache)
    return cache


def _taken(config: trt.IBuilderConfig, cache: trt.ITimingCache | None) -> bool:
    return cache is not None and config.set_timing_cache(cache, False)


def _keep(cache: trt.ITimingCache, path: Path) -> None:
    """Replaces the timing cache in one step; of two builds at once the later one's stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(cache.serialize())
    Path(file.name).replace(path)


class _Monitor(trt.IProgressMonitor):
    """Tells of the phases of a build that lie within no other."""

    def __init__(self, announce: Callable[[str], object]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._announce = announce
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name in self._steps:
            self._announce(f"{phase_name}: {step + 1} of {self._steps[phase_name]}")
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)
