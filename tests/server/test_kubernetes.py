"""The Kubernetes manifests, as far as they can be told without a cluster: against the settings, the image and Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cinecat.server.endpoint import FRONT
from cinecat.server.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "server" / "deploy" / "kubernetes"
VARIANTS = ("base", "gpu", "ray")
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# What a shutdown takes beyond waiting for jobs: open streams, cores, and traces that are still to be sent.
SHUTDOWN_MARGIN_S = 20

# Frames of one decode in float32, at most 4 of 3840x2160.
FRAMES_BYTES = 4 * 3840 * 2160 * 3 * 4


def files(variant: str) -> list[dict[str, Any]]:
    """The objects and patches in a folder, but for kustomization.yaml."""
    paths = sorted(path for path in (FOLDER / variant).glob("*.yaml") if path.name != "kustomization.yaml")
    return [found for path in paths for found in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str, variant: str = "base") -> dict[str, Any]:
    (found,) = (each for each in files(variant) if each["kind"] == kind)
    return found


SERVER: dict[str, Any] = of_kind("StatefulSet")["spec"]
POD: dict[str, Any] = SERVER["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
RAY: dict[str, Any] = of_kind("RayCluster", "ray")


def ray_pods() -> list[dict[str, Any]]:
    return [RAY["spec"]["headGroupSpec"]["template"], *(group["template"] for group in RAY["spec"]["workerGroupSpecs"])]


@cache
def image_environment() -> dict[str, str]:
    """What the image sets."""
    lines = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    return dict(pair.split("=", 1) for line in lines for pair in line.replace("\\\n", " ").split())


@cache
def settings(variant: str) -> Settings:
    """Those in force in a pod: the file's under the environment's. Raises SettingsError for one that does not exist."""
    environment = image_environment() | {each["name"]: each["value"] for each in CONTAINER["env"]}
    return load_settings({}, environment, FOLDER / variant / "cinecat.toml")


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


def built(variant: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(FOLDER / variant)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True).stdout))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_exists_and_is_allowed(variant: str) -> None:
    assert settings(variant).log_format == "json"


def test_ports_are_those_that_the_server_listens_on() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    for variant in VARIANTS:
        host, _, port = settings(variant).address.rpartition(":")
        assert (host, settings(variant).metrics_host) == ("0.0.0.0", "0.0.0.0")
        assert ports == {"grpc": int(port), "metrics": settings(variant).metrics_port}
    assert f"EXPOSE {ports['grpc']} {ports['metrics']}" in DOCKERFILE
    service = of_kind("Service")["spec"]["ports"]
    assert {(port["port"], port["targetPort"]) for port in service} == {(ports[name], name) for name in ports}
    annotations = SERVER["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


def test_probes_ask_the_health_service_on_its_port() -> None:
    port = int(settings("base").address.rpartition(":")[2])
    probes = {name: CONTAINER[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {port}
    # A core that died makes a server not ready; to be killed for it would cost the other replicas' work too.
    assert probes["liveness"]["service"] == FRONT
    assert all("service" not in probes[name] for name in ("startup", "readiness"))


def test_a_start_may_take_the_download_of_a_checkpoint() -> None:
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert "--start-period=60m" in DOCKERFILE


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pod_is_killed_only_after_a_drain_of_jobs_and_their_files(variant: str) -> None:
    assert POD["terminationGracePeriodSeconds"] >= 2 * settings(variant).drain_seconds + SHUTDOWN_MARGIN_S
    for patch in files(variant):
        if variant != "base" and patch["kind"] == "StatefulSet":
            assert "terminationGracePeriodSeconds" not in patch["spec"]["template"]["spec"]


def test_data_models_and_frames_are_on_volumes() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in SERVER["volumeClaimTemplates"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert set(mounts.values()) == claims | set(volumes)
    data = str(settings("base").data_dir)
    assert mounts[data] in claims
    models = next(path for path in mounts if path != data and mounts[path] in claims)
    assert image_environment()["HF_HOME"].startswith(models)
    assert str(settings("base").engine_cache_dir).startswith(models)
    config = Path(next(each["value"] for each in CONTAINER["env"] if each["name"] == "CINECAT_CONFIG"))
    assert mounts[str(config.parent)] == "settings"
    assert (FOLDER / "base" / config.name).exists()
    frames = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert frames["medium"] == "Memory"
    assert gibibytes(frames["sizeLimit"]) * 2**30 >= 2 * FRAMES_BYTES
    assert gibibytes(frames["sizeLimit"]) < gibibytes(CONTAINER["resources"]["limits"]["memory"])


def test_one_server_has_the_data() -> None:
    assert SERVER["replicas"] == 1
    assert {claim["spec"]["accessModes"][0] for claim in SERVER["volumeClaimTemplates"]} == {"ReadWriteOnce"}


def test_pods_run_as_the_user_of_the_image_and_see_no_variables_of_other_services() -> None:
    found = re.search(r"useradd .*--uid (\d+)", DOCKERFILE)
    assert found is not None
    for spec in (POD, *(pod["spec"] for pod in ray_pods())):
        security = spec["securityContext"]
        assert {security["runAsUser"], security["fsGroup"]} == {int(found[1])}
        assert spec["enableServiceLinks"] is False  # CINECAT_RAY_... would be unknown settings
        assert spec["automountServiceAccountToken"] is False


def test_selectors_find_their_pods() -> None:
    labels = [SERVER["template"]["metadata"]["labels"], *(pod["metadata"]["labels"] for pod in ray_pods())]
    selectors = {
        "service": of_kind("Service")["spec"]["selector"],
        "set": SERVER["selector"]["matchLabels"],
        "budget": of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "nodes": of_kind("PodDisruptionBudget", "ray")["spec"]["selector"]["matchLabels"],
    }
    matched = {
        name: [index for index, found in enumerate(labels) if selector.items() <= found.items()]
        for name, selector in selectors.items()
    }
    assert matched == {"service": [0], "set": [0], "budget": [0], "nodes": [2]}


def test_the_server_joins_the_ray_cluster_that_is_beside_it() -> None:
    found = settings("ray")
    assert found.executor == "ray"
    head = RAY["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert found.ray_address == f"{RAY['metadata']['name']}-head-svc:{head['ports'][0]['containerPort']}"
    (sidecar,) = of_kind("StatefulSet", "ray")["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["command"][:3] == ["ray", "start", f"--address={found.ray_address}"]
    assert {"--num-cpus=0", "--num-gpus=0", "--block"} < set(sidecar["command"])
    for pod in ray_pods():
        probes = [each[f"{name}Probe"] for each in pod["spec"]["containers"] for name in ("readiness", "liveness")]
        addresses = {probe["exec"]["command"][-1] for probe in probes}
        assert addresses <= {found.ray_address, "127.0.0.1:6379"}


def test_the_servers_pod_holds_rays_objects_beside_its_frames() -> None:
    spec = of_kind("StatefulSet", "ray")["spec"]["template"]["spec"]
    (sidecar,) = spec["initContainers"]
    (objects,) = (int(word.partition("=")[2]) for word in sidecar["command"] if "object-store" in word)
    (frames,) = (each["emptyDir"] for each in spec["volumes"] if each["name"] == "frames")
    assert frames["medium"] == "Memory"
    assert gibibytes(frames["sizeLimit"]) * 2**30 >= objects + 2 * FRAMES_BYTES * settings("ray").replicas
    shared = {mount["mountPath"]: mount["name"] for mount in sidecar["volumeMounts"]}
    own = {
        mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"] + spec["containers"][0]["volumeMounts"]
    }
    assert shared.items() <= own.items()
    assert set(shared) == {"/tmp", "/dev/shm"}
    assert spec["shareProcessNamespace"] is True


def test_every_replica_fits_a_node_of_its_own() -> None:
    (group,) = RAY["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    found = settings("ray")
    assert (found.device, limits["nvidia.com/gpu"]) == ("cuda", 1)
    assert found.ray_cpus <= float(limits["cpu"])
    assert found.replicas == group["replicas"]
    assert RAY["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_image_has_the_ray_of_the_cluster() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert RAY["spec"]["rayVersion"] == pinned[1]
    extras = re.search(r"'\.\[(.*)\]'", DOCKERFILE)
    assert extras is not None
    assert "ray" in extras[1].split(",")


@pytest.mark.parametrize("variant", VARIANTS)
def test_kustomize_builds_it_with_one_image(variant: str) -> None:
    objects = built(variant)
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    assert {("StatefulSet", "cinecat"), ("Service", "cinecat"), ("PodDisruptionBudget", "cinecat")} < names
    assert (("RayCluster", "cinecat-ray") in names) == (variant == "ray")
    (config,) = (each for each in objects if each["kind"] == "ConfigMap")
    assert config["data"]["cinecat.toml"] == (FOLDER / variant / "cinecat.toml").read_text()
    (server,) = (each for each in objects if each["kind"] == "StatefulSet")
    spec = server["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in [each.get("configMap", {}).get("name") for each in spec["volumes"]]
    images = set(re.findall(r"image: (\S+)", yaml.safe_dump_all(objects)))
    assert images == {f"cinecat:{_version()}"}


def _version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_gpu_server_has_memory_for_its_checkpoint_and_a_card() -> None:
    patch = of_kind("StatefulSet", "gpu")["spec"]
    limits = patch["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert settings("gpu").device == "cuda"
    claims = {
        each["metadata"]["name"]: each["spec"]["resources"]["requests"]["storage"]
        for each in patch["volumeClaimTemplates"]
    }
    assert set(claims) == {each["metadata"]["name"] for each in SERVER["volumeClaimTemplates"]}
    assert gibibytes(claims["models"]) >= 100
