"""Generic tools work against the server: health, reflection, Prometheus; and the README's example runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from cinecat import Client
from cinecat.server.local_server import LocalServer

SERVICES = ["cinecat.v1.Generation", "cinecat.v1.Models", "cinecat.v1.Styles"]


def test_the_standard_health_service_says_serving_for_all_and_each(server: LocalServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answers = [health.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", *SERVICES)]
    assert answers == [health_pb2.HealthCheckResponse.SERVING] * 4


def test_reflection_describes_every_service(server: LocalServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(SERVICES) <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName("cinecat.v1.Generation")
    assert [method.name for method in service.methods] == [
        "Generate",
        "Submit",
        "Watch",
        "GetJob",
        "ListJobs",
        "CancelJob",
        "ProfileJob",
        "Download",
    ]


def test_the_models_service_tells_limits_and_defaults(client: Client) -> None:
    (model,) = client.models()
    assert model.name == "wan-tiny"
    assert model.engine == "torch"
    assert model.limits.size_multiple == 16


@pytest.fixture(scope="module")
def fresh(start_server: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server that has done nothing but its warm-up, with a styles folder of its own beside its log."""
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "styles").mkdir()
    with start_server(folder, "--styles-dirs", str(folder / "styles")) as server:  # type: ignore[operator]
        yield server


def scrape(server: LocalServer) -> dict[tuple[str, str], float]:
    """Values by name and stage, or by name and all labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, sample.labels.get("stage") or ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_have_jobs_stages_steps_and_queue_and_no_warm_up(fresh: LocalServer, photograph: Path) -> None:
    before = scrape(fresh)
    assert not any(name == "cinecat_step_seconds_count" for name, _ in before)
    with Client(fresh.address) as client:
        client.generate(image=photograph, prompt="a cat", size="64x64", frames=5, steps=3).result()
    after = scrape(fresh)
    assert after["cinecat_jobs_ended_total", "succeeded,interactive"] == 1
    assert after["cinecat_step_seconds_count", "32,1,uniform"] == 3
    assert after["cinecat_queue_depth", "interactive"] == 0
    stages = {label for name, label in after if name == "cinecat_stage_seconds_count"}
    assert {"queue", "text_encode", "image_encode", "vae_encode", "denoise", "vae_decode", "mux"} <= stages


def test_a_style_put_into_the_folder_is_found_and_one_taken_away_is_gone(fresh: LocalServer, photograph: Path) -> None:
    bundled = Path(__file__).parents[2] / "plugins" / "bundled" / "noir"
    mine = fresh.log.parent / "styles" / "mine"
    with Client(fresh.address) as client:
        shutil.copytree(bundled, mine)
        manifest = mine / "style.toml"
        manifest.write_text(manifest.read_text().replace('name = "noir"', 'name = "mine"'))
        assert [style.name for style in client.styles()] == ["amber", "blueprint", "mine", "noir"]
        clip = client.generate(image=photograph, prompt="a cat", style="mine", size="32x32", frames=1, steps=1).result()
        assert clip.styles[0].name == "mine"
        shutil.rmtree(mine)
        assert [style.name for style in client.styles()] == ["amber", "blueprint", "noir"]


def test_the_example_in_the_readme_runs(server: LocalServer, photograph: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copy(photograph, tmp_path / "cat.jpg")
    script = example.replace("localhost:50051", server.address)
    assert script != example
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.glob("*.mp4"))
