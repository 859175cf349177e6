"""The status page over HTTP: whoever has a key sees and does what is theirs, and nobody anything else."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cinecat import Client, Clip
from cinecat.server.local_server import LocalServer, running_server

NOBODY_KEY, ACME_KEY = "0123456789abcdef", "acme-0123456789abcdef"
SECRET = "a secret <img src=x onerror=alert(1)>"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Visitor:
    """Somebody with a key, or without one."""

    port: int
    key: str = ""

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if self.key:
            headers["Cookie"] = f"cinecat_key_{self.port}={self.key}"
        if body is not None:
            headers = {"Content-Type": "application/json"} | headers
        payload = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        connection.request(method, path, payload, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.ask("POST", path, {} if body is None else body, **headers)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    keys = f"{NOBODY_KEY}=,{ACME_KEY}=acme"
    with running_server(tmp_path_factory.mktemp("page"), "--threads", "1", "--page-keys", keys) as started:
        yield started


@pytest.fixture(scope="module")
def acme_clip(server: LocalServer, photograph: Path) -> Clip:
    """A finished clip of the tenant acme."""
    with Client(server.address, tenant="acme") as client:
        return client.generate(image=photograph, prompt=SECRET, size="64x64", frames=5, steps=2).result()


@pytest.fixture
def reader(server: LocalServer) -> Visitor:
    return Visitor(server.metrics_port)


@pytest.fixture
def nobody(server: LocalServer) -> Visitor:
    """May act for callers who name no tenant."""
    return Visitor(server.metrics_port, NOBODY_KEY)


@pytest.fixture
def acme(server: LocalServer) -> Visitor:
    return Visitor(server.metrics_port, ACME_KEY)


def clip(photograph: Path, **changes: object) -> dict[str, object]:
    image = base64.b64encode(photograph.read_bytes()).decode()
    return {"image": image, "prompt": "a cat", "width": 64, "height": 64, "frames": 5, "steps": 2, **changes}


def test_the_page_comes_with_its_parts_and_keeps_strangers_out(reader: Visitor) -> None:
    page = reader.get("/")
    assert page.status == 200
    for name in re.findall(r'(?:src|href)="(page\.\w+|icon\.svg)"', page.body.decode()):
        assert reader.get(f"/{name}").status == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert b"<script>" not in page.body
    assert reader.get("/..%2fapp.py").status == 404
    assert reader.get("/app.py").status == 404


def test_another_tenants_clip_is_nowhere(reader: Visitor, nobody: Visitor, acme: Visitor, acme_clip: Clip) -> None:
    for stranger in (reader, nobody, Visitor(reader.port, "not-a-key-of-this-server")):
        state = stranger.get("/api/status")
        assert acme_clip.job_id.encode() not in state.body
        assert b"a secret" not in state.body
        job = f"/api/jobs/{acme_clip.job_id}"
        for path in ("events", "poster", "artifacts/clip.mp4"):
            assert stranger.get(f"{job}/{path}").status == 404
    assert nobody.post(f"/api/jobs/{acme_clip.job_id}/cancel").status == 404
    (mine,) = acme.get("/api/status").json["recent"]
    assert (mine["job_id"], mine["clip"]["prompt"]) == (acme_clip.job_id, SECRET)


def test_poster_and_video_come_whole_or_in_ranges(acme: Visitor, acme_clip: Clip) -> None:
    job = f"/api/jobs/{acme_clip.job_id}"
    poster = Image.open(io.BytesIO(acme.get(f"{job}/poster").body))
    assert (poster.format, poster.size) == ("WEBP", (64, 64))
    name = acme_clip.artifacts[0].name
    whole = acme.get(f"{job}/artifacts/{name}")
    size = acme_clip.artifacts[0].size_bytes
    assert (whole.status, len(whole.body), whole.headers["content-type"]) == (200, size, "video/mp4")
    part = acme.get(f"{job}/artifacts/{name}", Range="bytes=10-19")
    assert (part.status, part.body, part.headers["content-range"]) == (206, whole.body[10:20], f"bytes 10-19/{size}")
    assert acme.get(f"{job}/artifacts/{name}", Range="bytes=10-").body == whole.body[10:]
    assert acme.get(f"{job}/artifacts/{name}", Range=f"bytes={size}-").status == 416
    told = acme.ask("HEAD", f"{job}/artifacts/{name}")
    assert (told.status, told.body, told.headers["content-length"]) == (200, b"", f"{size}")
    for other in ("../../jobs.sqlite", "..%2f..%2fjobs.sqlite", "clip.mov", "owner"):
        assert acme.get(f"{job}/artifacts/{other}").status == 404


def test_a_clip_is_submitted_followed_and_finished(nobody: Visitor, photograph: Path) -> None:
    asked = {"clip": clip(photograph), "previews": {"every_steps": 1}, "priority": "PRIORITY_INTERACTIVE"}
    accepted = nobody.post("/api/jobs", asked)
    assert accepted.status == 201, accepted.body
    job_id = accepted.json["job_id"]
    events = nobody.get(f"/api/jobs/{job_id}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    told = [json.loads(line.removeprefix("data: ")) for line in events.body.decode().splitlines() if "data: " in line]
    assert told[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert any(event.get("preview", {}).get("step") for event in told)
    last = told[-1]["sequence"]
    assert nobody.get(f"/api/jobs/{job_id}/events", Last_Event_ID=last).body == b""
    state = nobody.get("/api/status").json
    assert job_id in [job["job_id"] for job in state["recent"]]
    assert state["throughput"]["uniform"]["frames"] >= 5


def test_whoever_has_no_key_changes_nothing(reader: Visitor, photograph: Path) -> None:
    assert reader.get("/api/status").json["viewer"] == {"tenant": "", "may_act": False}
    assert reader.post("/api/jobs", {"clip": clip(photograph)}).status == 403
    assert reader.post("/api/jobs/" + "0" * 32 + "/cancel").status == 403
    for key in (5, None, "", "wrong", ["a"], NOBODY_KEY + "\0"):
        assert reader.post("/api/session", {"key": key}).status == 403
    assert reader.post("/api/session", b'{"key": "\\ud800"}').status == 400


def test_a_key_becomes_a_cookie_that_no_script_reads_and_no_site_sends(reader: Visitor) -> None:
    signed_in = reader.post("/api/session", {"key": ACME_KEY})
    cookie = signed_in.headers["set-cookie"]
    assert signed_in.json == {"tenant": "acme"}
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    linked = reader.get(f"/?key={NOBODY_KEY}")
    assert (linked.status, linked.headers["location"]) == (303, "/")
    assert NOBODY_KEY in linked.headers["set-cookie"]
    assert "set-cookie" not in reader.get("/?key=wrong").headers
    assert "set-cookie" not in reader.get(f"/?key={NOBODY_KEY}", Sec_Fetch_Site="cross-site").headers


def test_servers_on_one_machine_do_not_sign_each_other_out(reader: Visitor) -> None:
    cookie = reader.post("/api/session", {"key": ACME_KEY}).headers["set-cookie"]
    assert cookie.startswith(f"cinecat_key_{reader.port}=")


def test_a_web_site_that_resolves_to_this_machine_reads_nothing(
    server: LocalServer, reader: Visitor, nobody: Visitor, photograph: Path
) -> None:
    with Client(server.address) as client:
        made = client.generate(image=photograph, prompt="for this machine", size="64x64", frames=5, steps=2).result()
    for host in (f"localhost:{reader.port}", f"127.0.0.1:{reader.port}", f"[::1]:{reader.port}"):
        assert reader.get("/api/status", Host=host).json["models"][0]["name"] == "wan-tiny"
    paths = [f"/api/jobs/{made.job_id}/{what}" for what in ("events", "poster", "artifacts/clip.mp4")]
    for host in (f"rebound.example:{reader.port}", "localhost.rebound.example", "127.0.0.1.rebound.example", "["):
        stranger = reader.get("/api/status", Host=host)
        assert stranger.json == {"ready": True, "viewer": {"tenant": "", "may_act": False}}
        assert {reader.get(path, Host=host).status for path in paths} == {403}
    behind_a_proxy = nobody.get("/api/status", Host="clips.studio.example")
    assert b"for this machine" in behind_a_proxy.body


def test_whoever_only_reads_keeps_no_clip_alive(server: LocalServer, reader: Visitor, photograph: Path) -> None:
    with Client(server.address) as client:
        made = client.generate(image=photograph, prompt="a cat", size="64x64", frames=5, steps=2).result()
    assert reader.get(f"/api/jobs/{made.job_id}/events").status == 403
    assert reader.get(f"/api/jobs/{made.job_id}/poster").status == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/"), ("PUT", "/api/jobs"), ("GET", "/api/nothing"), ("GET", "/a/b")]
)
def test_what_is_not_there_is_told_as_carefully_as_what_is(reader: Visitor, method: str, path: str) -> None:
    answer = reader.ask(method, path)
    assert answer.status in (404, 405)
    assert answer.json["violations"] == []
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_another_sites_page_cannot_act(nobody: Visitor, photograph: Path) -> None:
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ):
        assert nobody.post("/api/jobs", {"clip": clip(photograph)}, **headers).status == 403
    assert nobody.post("/api/jobs", {"clip": clip(photograph)}, Content_Type="text/plain").status == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "request"),
        (b"[]", "request"),
        (b"\xff", "request"),
        (b'{"\\ud800": 1}', "request"),
        (b'{"clip": ' + b"[" * 100_000, "request"),
        ({"clip": {"unknown": 1}}, "request"),
        ({"clip": {"image": "!!!"}}, "clip.image"),
        ({"clip": {"prompt": "a cat"}}, "clip.image"),
        ({"clip": {"image": "AAAA", "width": 63, "height": 64}}, "clip.width"),
        (b'{"clip": "' + b"a" * 50_000_000 + b'"}', "request"),
    ],
)
def test_a_bad_request_is_told_by_field(nobody: Visitor, body: Any, field: str) -> None:
    refused = nobody.post("/api/jobs", body)
    assert refused.status == 400, refused.body
    assert field in [violation["field"] for violation in refused.json["violations"]]


def test_metrics_are_served_in_the_form_that_is_asked_for(reader: Visitor) -> None:
    plain = reader.get("/metrics")
    assert "cinecat_ready 1.0" in plain.body.decode()
    opened = reader.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.body.endswith(b"# EOF\n")
    assert reader.get("/metrics", Accept="application/openmetrics-text;version=x;q=z").status == 200
