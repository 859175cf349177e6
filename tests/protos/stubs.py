"""Generates the gRPC stubs: `python -m tests.protos.stubs OUT` writes them below OUT."""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).parents[2] / "protos"


def generate(out: Path) -> None:
    """Writes `cinecat/v1/*_pb2*.py` and `.pyi` below `out`. Raises RuntimeError when protoc fails."""
    sources = sorted(PROTOS.glob("cinecat/v1/*.proto"))
    services = [path for path in sources if "\nservice " in path.read_text()]
    _protoc(sources, [f"--python_out={out}", f"--mypy_out=quiet:{out}"])
    _protoc(services, [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"])


def _protoc(sources: list[Path], targets: list[str]) -> None:
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    names = [str(path.relative_to(PROTOS)) for path in sources]
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *targets, *names]) != 0:
        raise RuntimeError("protoc failed; its message is above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
