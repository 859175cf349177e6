"""A collector of OpenTelemetry traces on loopback."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Collector:
    """What was sent to it: opentelemetry.proto's Spans."""

    endpoint: str
    spans: list[Any] = field(default_factory=list)

    def trace(self, trace_id: str, seconds: float = 15.0) -> dict[str, Any]:
        """The spans of a trace by name, once its `job` is there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}
            if "job" in found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"no trace {trace_id} within {seconds} s, but {[s.trace_id.hex() for s in self.spans]}")


@contextmanager
def collector() -> Iterator[Collector]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    started.spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield started
    server.shutdown()
    server.server_close()
    thread.join()
