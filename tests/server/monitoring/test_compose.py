"""docker-compose.yml, as far as it can be told without Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cinecat.server.monitoring.dashboards import FOLDER
from cinecat.server.settings import load_settings
from tests.server.monitoring.prometheus import RULES

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_what_is_mounted_exists() -> None:
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service["volumes"]]
    for source, target, *_ in volumes:
        assert (ROOT / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"], source
        assert target.startswith("/")
    assert {source for source, *_ in volumes if not source.startswith(".")} == set(COMPOSE["volumes"])


def test_images_have_versions() -> None:
    images = {name: service["image"] for name, service in SERVICES.items() if "image" in service}
    assert set(images) == {"prometheus", "grafana"}
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images.values())
    assert (ROOT / SERVICES["server"]["build"] / "Dockerfile").exists()


def test_every_service_is_health_checked() -> None:
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"server"}
    assert "\nHEALTHCHECK " in (ROOT / "Dockerfile").read_text()


def test_ports_are_of_this_machine_alone() -> None:
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service["ports"])


def test_the_servers_environment_is_of_settings() -> None:
    environment = {
        key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", text) for key, text in SERVICES["server"]["environment"].items()
    }
    assert load_settings({}, environment).model == "wan-tiny"


def test_prometheus_scrapes_the_server_and_finds_its_rules() -> None:
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in SERVICES
    assert any(published.endswith(f":{port}") for published in SERVICES[host]["ports"])
    assert {name for name in config["rule_files"] if not (RULES / name).exists()} == set()


def test_grafana_is_given_the_dashboards_and_the_prometheus() -> None:
    provisioning = FOLDER.parent / "provisioning"
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounted["./server/monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "cinecat.yaml").read_text())["providers"]
    assert mounted["./server/monitoring/grafana/dashboards"] == provider["options"]["path"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FOLDER / Path(home).relative_to(provider["options"]["path"])).exists()
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    scrape_interval = yaml.safe_load((RULES / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape_interval


def test_the_gpu_is_added_to_the_server_alone() -> None:
    added = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    assert list(added) == ["server"]
    (device,) = added["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
