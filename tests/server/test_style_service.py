"""The Styles service over a real connection, with a stand-in for the engine core. Whatever goes wrong with an upload:
one clear error, the old state intact, nothing left on disk, the server serving.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from cinecat.engines.errors import NoFreeSlot
from cinecat.engines.messages import ResidentStyle, Warm, Warmed
from cinecat.plugins.installed import InstalledStyles
from cinecat.plugins.manifest import MAX_PREVIEW_BYTES
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.plugins.sources import FolderSource, Origin, PackageSource
from cinecat.server.inputs import JobInputs
from cinecat.server.metrics import Metrics
from cinecat.server.services.errors import ErrorInterceptor
from cinecat.server.services.styles import StylesService
from cinecat.server.style_installer import MAX_UPLOADS, StyleInstaller
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, styles_pb2, styles_pb2_grpc
from tests.server.samples import FRAME, model_info, until
from tests.server.style_uploads import toml, upload, weights, with_huge_header, with_nan

MAX_BYTES = 100_000
WEIGHTS = weights()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, NOT_FOUND = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND


@dataclass
class FakeCore:
    """Puts every style into slot 1, or has no slot free."""

    warmed: list[Warm] = field(default_factory=list)
    full: bool = False

    async def call(self, call: Any, answer: type[Any]) -> Any:
        if self.full:
            raise NoFreeSlot("no style slot is free: 8 of 8 are worn by running clips")
        self.warmed.append(call)
        return Warmed((ResidentStyle(1, (call.style.fingerprint,), 4096),))


@dataclass
class Served:
    """A server with nothing but the Styles service, its parts, and a stub."""

    stub: Any
    root: Path
    catalogue: StyleCatalogue
    inputs: JobInputs
    core: FakeCore

    def on_disk(self) -> list[str]:
        """Everything that is in the folder for uploads."""
        return sorted(path.name for path in self.root.iterdir())

    async def install(self, parts: Iterable[styles_pb2.InstallStyleRequest]) -> styles_pb2.InstallStyleResponse:
        answer: styles_pb2.InstallStyleResponse = await self.stub.InstallStyle(iter(parts))
        return answer

    async def refused(self, call: Any) -> tuple[grpc.StatusCode, list[tuple[str, str]]]:
        """The status and the field violations of a call."""
        with pytest.raises(grpc.aio.AioRpcError) as answer:
            await call
        status = rpc_status.from_call(answer.value)
        details = error_details_pb2.BadRequest()
        if status is not None and status.details:
            status.details[0].Unpack(details)
        return answer.value.code(), [(each.field, each.description) for each in details.field_violations]

    async def listed(self) -> list[str]:
        answer = await self.stub.ListStyles(styles_pb2.ListStylesRequest())
        return [f"{style.name}@{style.version}" for style in answer.styles]

    async def get(self, name: str, **fields: Any) -> styles_pb2.Style:
        answer: styles_pb2.Style = await self.stub.GetStyle(styles_pb2.GetStyleRequest(name=name, **fields))
        return answer


@asynccontextmanager
async def served(folder: Path, idle_seconds: float = 30.0, max_bytes: int = MAX_BYTES) -> AsyncIterator[Served]:
    root = folder / "styles"
    installed = InstalledStyles(root)
    entry = EntryPoint("grain", "tests.plugins.example_style_package", "cinecat.styles")
    sources = [
        FolderSource(BUNDLED, Origin.BUNDLED),
        FolderSource(folder / "operator"),
        installed.source,
        PackageSource(lambda: [entry]),
    ]
    catalogue = StyleCatalogue(StyleRegistry(sources), model_info())
    inputs, core = JobInputs(folder / "inputs"), FakeCore()
    installer = StyleInstaller(installed, catalogue, max_bytes, idle_seconds)
    server = grpc.aio.server(interceptors=[ErrorInterceptor(Metrics(CollectorRegistry()))])
    styles_pb2_grpc.add_StylesServicer_to_server(StylesService(catalogue, installer, inputs, core), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(styles_pb2_grpc.StylesStub(channel), root, catalogue, inputs, core)
    finally:
        await server.stop(None)


ALWAYS = ["amber@1.0.0", "grain@1.0.0", "noir@1.0.0"]


def test_an_upload_becomes_a_style_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            answer = await s.install(upload(WEIGHTS, sha256=SHA256, size_bytes=len(WEIGHTS)))
            style = answer.style
            assert (style.name, style.version, style.title, style.base_model) == (
                "dusk",
                "1.0.0",
                "dusk",
                "wan2.1-i2v-tiny",
            )
            assert (style.rank, style.fingerprint, style.weights_size_bytes) == (2, SHA256, len(WEIGHTS))
            assert (style.compatible, style.format, style.origin) == (
                True,
                "diffusers",
                styles_pb2.STYLE_ORIGIN_INSTALLED,
            )
            assert not answer.unchanged
            assert await s.listed() == ["amber@1.0.0", "dusk@1.0.0", *ALWAYS[1:]]
            assert s.on_disk() == ["dusk@1.0.0"]

    asyncio.run(scenario())


def test_what_a_toml_says_is_kept(tmp_path: Path) -> None:
    said = toml(prompt_template='at \\"dusk\\", {prompt}', license="MIT") + "[sampler]\nsteps = 4\nshift = 3.5\n"

    async def scenario() -> None:
        async with served(tmp_path) as s:
            style = (await s.install(upload(WEIGHTS, toml=said))).style
            assert (style.prompt_template, style.license) == ('at "dusk", {prompt}', "MIT")
            assert style.sampler == styles_pb2.SamplerDefaults(steps=4, shift=3.5)
            assert await s.get("dusk") == style

    asyncio.run(scenario())


def test_versions_are_counted_up_when_none_is_given(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            for seed, version in enumerate(["1.0.0", "1.0.1", "1.0.2"]):
                assert (await s.install(upload(weights(seed)))).style.version == version
            assert (await s.get("dusk")).version == "1.0.2"

    asyncio.run(scenario())


@pytest.mark.parametrize("declared", ["", SHA256], ids=["checksum unknown", "checksum declared"])
@pytest.mark.parametrize("again", [{}, {"version": "1.0.0"}], ids=["unversioned", "versioned"])
def test_the_same_content_again_changes_nothing(tmp_path: Path, declared: str, again: dict[str, str]) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            first = await s.install(upload(WEIGHTS))
            second = await s.install(upload(WEIGHTS, sha256=declared, **again))
            assert (second.unchanged, second.style) == (True, first.style)
            assert s.on_disk() == ["dusk@1.0.0"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("data", "fields", "said"),
    [
        (weights(1), {"version": "1.0.0"}, "exists with other weights"),
        (WEIGHTS, {"version": "1.0.0", "title": "Another"}, "exists with another style.toml"),
        (WEIGHTS, {"name": "noir", "version": "1.0.0"}, "noir 1.0.0 exists with other weights"),
    ],
)
def test_a_version_that_exists_never_changes(tmp_path: Path, data: bytes, fields: dict[str, str], said: str) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            before = (await s.install(upload(WEIGHTS))).style
            code, ((place, problem),) = await s.refused(s.install(upload(data, **fields)))
            assert (code, place) == (EXISTS, "upload.fields.version")
            assert said in problem
            assert await s.get("dusk") == before
            assert s.on_disk() == ["dusk@1.0.0"]

    asyncio.run(scenario())


def pickled() -> bytes:
    return pickle.dumps({"lora_A.weight": [0.0] * 1000})


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (pickled(), INVALID, "is not a safetensors file"),
        (with_huge_header(), INVALID, f"its header claims {2**60} bytes"),
        (b"12345678" + WEIGHTS[8:], INVALID, "is not a safetensors file"),
        (WEIGHTS[:8] + b"[" + WEIGHTS[9:], INVALID, "is not a safetensors file; convert it"),
        (WEIGHTS[:-1], INVALID, "truncated"),
        (WEIGHTS[:5], INVALID, "not a safetensors file"),
        (b"", INVALID, "not a safetensors file"),
        (WEIGHTS + b"x", INVALID, "after its last tensor"),
        (with_nan(np.float16), INVALID, "holds NaN or infinity"),
        (with_nan(np.float32), INVALID, "holds NaN or infinity"),
        (with_nan(np.float64), INVALID, "holds NaN or infinity"),
        (weights(size=128), PRECONDITION, "was made for a 128 -> 128 blocks.0.attn2.to_q"),
        (weights(target="blocks.39.attn2.to_q"), PRECONDITION, "changes blocks.39.attn2.to_q, which wan-tiny"),
        (weights(rank=33), PRECONDITION, "rank 33 is more than a slot holds (32;"),
        (weights(target="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"), None, "down_blocks"),
        (weights(size=12_000), INVALID, f"has more than {MAX_BYTES} bytes"),
    ],
    ids=[
        "a pickle",
        "a header of 2^60 bytes",
        "noise",
        "a header that is no object",
        "truncated",
        "cut in its first bytes",
        "nothing",
        "bytes at its end",
        "NaN in float16",
        "NaN in float32",
        "NaN in float64",
        "another model's sizes",
        "another model's layers",
        "too high a rank",
        "SDXL",
        "too large",
    ],
)
def test_weights_that_no_style_can_have_leave_nothing_behind(
    tmp_path: Path, data: bytes, code: grpc.StatusCode | None, said: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            found, ((place, problem),) = await s.refused(s.install(upload(data)))
            assert found in ((code,) if code else (INVALID, PRECONDITION))
            assert place == "weights"
            assert said in problem
            assert s.on_disk() == []
            assert await s.listed() == ALWAYS
            assert (await s.install(upload(WEIGHTS))).style.name == "dusk"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sent", "place", "said"),
    [
        ({"sha256": "0" * 64}, "upload.sha256", "but the file that arrived has"),
        ({"sha256": "abc"}, "upload.sha256", "is not 64 hexadecimal digits"),
        ({"toml": toml(sha256="0" * 64)}, "upload.sha256", "but the file that arrived has"),
        ({"toml": toml(sha256="0" * 64), "sha256": SHA256}, "upload.sha256", "is not the sha256 of style.toml"),
        ({"size_bytes": MAX_BYTES + 1}, "upload.size_bytes", "max_style_mib"),
        ({"size_bytes": -1}, "upload.size_bytes", "-1 is not between"),
        ({"size_bytes": len(WEIGHTS) - 1}, "weights", "has more than the announced"),
        ({"size_bytes": len(WEIGHTS) + 1}, "weights", f"ended after {len(WEIGHTS)} of the announced"),
        ({"name": "Dusk!"}, "upload.fields.name", "lower-case letters"),
        ({"name": ""}, "upload.fields.name", "1 to 64"),
        ({"name": "../dusk"}, "upload.fields.name", "lower-case letters"),
        ({"version": "one"}, "upload.fields.version", "three numbers"),
        ({"default_strength": float("nan")}, "upload.fields.default_strength", "a number from -4 to 4"),
        ({"prompt_template": "dusk"}, "upload.fields.prompt_template", "holds {prompt}"),
        ({"preview": "../dusk.png"}, "upload.fields.preview", "without a path"),
        ({"preview": "dusk.png"}, "preview", "did not arrive"),
        ({"sampler": styles_pb2.SamplerDefaults(steps=0)}, "upload.fields.sampler.steps", "from 1 to 10000"),
        (
            {"base_dims": styles_pb2.BaseDims(dim=5120)},
            "weights",
            "was made for dim = 5120, wan-tiny (wan2.1-i2v-tiny) has 256",
        ),
        ({"base_dims": styles_pb2.BaseDims(layers=40)}, "weights", "was made for layers = 40"),
        ({"toml": toml(weights="../../dusk.safetensors")}, "upload.toml", "without a path"),
        ({"toml": toml(preview="/etc/passwd.png")}, "upload.toml", "without a path"),
        ({"toml": toml(name=None)}, "upload.toml", "name is missing"),
        ({"toml": "name = "}, "upload.toml", "is not valid TOML"),
        ({"toml": "x = " + "9" * 5000}, "upload.toml", "is not valid TOML"),
        ({"toml": "#" * 70_000}, "upload.toml", "has more than 65536 bytes"),
    ],
)
def test_what_is_said_wrongly_is_named_by_its_field(
    tmp_path: Path, sent: dict[str, Any], place: str, said: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            _, ((found, problem),) = await s.refused(s.install(upload(WEIGHTS, **sent)))
            assert found == place
            assert said in problem
            assert s.on_disk() == []

    asyncio.run(scenario())


def part(**fields: Any) -> styles_pb2.InstallStyleRequest:
    return styles_pb2.InstallStyleRequest(**fields)


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ([], "upload"),
        ([part(weights=WEIGHTS)], "upload"),
        ([part(upload=styles_pb2.StyleUpload())], "upload.fields"),
        ([*upload(b""), *upload(WEIGHTS)], "upload"),
        ([*upload(b""), part()], "weights"),
        ([*upload(WEIGHTS), part(preview=b"a picture")], "preview"),
        ([*upload(WEIGHTS, preview="a.png"), part(preview=bytes(MAX_PREVIEW_BYTES + 1))], "preview"),
    ],
)
def test_messages_in_another_order_are_refused(
    tmp_path: Path, parts: list[styles_pb2.InstallStyleRequest], place: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            code, ((found, _),) = await s.refused(s.install(parts))
            assert (code, found) == (INVALID, place)
            assert s.on_disk() == []

    asyncio.run(scenario())


class HeldUpload:
    """An upload that sends some messages, and the rest once it may."""

    def __init__(self, parts: Iterable[styles_pb2.InstallStyleRequest], held_after: int) -> None:
        self._parts = list(parts)
        self._held_after = held_after
        self.go_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[styles_pb2.InstallStyleRequest]:
        for index, each in enumerate(self._parts):
            if index == self._held_after:
                await self.go_on.wait()
            yield each


def incoming(s: Served) -> bool:
    return any(name.startswith(".incoming-") for name in s.on_disk())


def test_an_upload_that_is_cut_half_way_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            call = s.stub.InstallStyle(HeldUpload(upload(WEIGHTS), 3))
            await until(lambda: incoming(s))
            call.cancel()
            await until(lambda: not s.on_disk())
            assert await s.listed() == ALWAYS
            assert (await s.install(upload(WEIGHTS))).style.name == "dusk"

    asyncio.run(scenario())


def test_of_two_uploads_of_one_name_the_first_wins(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            held = HeldUpload(upload(WEIGHTS), 2)
            first = asyncio.ensure_future(s.stub.InstallStyle(held))
            await until(lambda: incoming(s))
            code, _ = await s.refused(s.install(upload(weights(1))))
            assert code is grpc.StatusCode.ABORTED
            held.go_on.set()
            assert (await first).style.fingerprint == SHA256
            assert s.on_disk() == ["dusk@1.0.0"]

    asyncio.run(scenario())


def test_uploads_of_different_names_go_side_by_side_but_not_ever_so_many(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            held = [HeldUpload(upload(weights(n), name=f"dusk-{n}"), 2) for n in range(MAX_UPLOADS)]
            running = [asyncio.ensure_future(s.stub.InstallStyle(each)) for each in held]
            await until(lambda: len(s.on_disk()) == MAX_UPLOADS)
            code, _ = await s.refused(s.install(upload(WEIGHTS)))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            for each in held:
                each.go_on.set()
            answers = await asyncio.gather(*running)
            assert [answer.style.name for answer in answers] == [f"dusk-{n}" for n in range(MAX_UPLOADS)]

    asyncio.run(scenario())


def test_an_upload_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, idle_seconds=0.1) as s:
            code, _ = await s.refused(s.stub.InstallStyle(HeldUpload(upload(WEIGHTS), 2)))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert s.on_disk() == []

    asyncio.run(scenario())


def test_a_disk_that_takes_no_more_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def scenario() -> None:
        async with served(tmp_path) as s:
            monkeypatch.setattr("cinecat.plugins.installed.os.fsync", full)
            code, _ = await s.refused(s.install(upload(WEIGHTS)))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert s.on_disk() == []

    asyncio.run(scenario())


def test_a_preview_is_kept_and_sent_when_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            parts = [*upload(WEIGHTS, preview="dusk.png"), part(preview=b"a pic"), part(preview=b"ture")]
            described = (await s.install(parts)).style.preview
            assert (described.file_name, described.mime_type, described.size_bytes) == ("dusk.png", "image/png", 9)
            assert described.data == b""
            assert (await s.get("dusk", with_preview=True)).preview.data == b"a picture"

    asyncio.run(scenario())


def test_a_style_of_another_family_whose_layers_fit_is_noted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            answer = await s.install(upload(WEIGHTS, base_model="wan2.1-t2v-tiny"))
            assert list(answer.notes) == [
                "base_model: made for wan2.1-t2v-tiny; the server has wan2.1-i2v-tiny, whose layers fit"
            ]

    asyncio.run(scenario())


def remove(s: Served, name: str, version: str = "") -> Any:
    return s.stub.RemoveStyle(styles_pb2.RemoveStyleRequest(name=name, version=version))


def test_a_removed_style_is_gone_and_its_version_is_free_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS))
            assert (await remove(s, "dusk")).style.fingerprint == SHA256
            assert (s.on_disk(), await s.listed()) == ([], ALWAYS)
            assert (await s.install(upload(weights(1), version="1.0.0"))).style.version == "1.0.0"

    asyncio.run(scenario())


def content(path: str) -> bytes | None:
    return Path(path).read_bytes() if Path(path).exists() else None


def test_a_style_that_is_removed_while_jobs_wear_it_keeps_its_weights_for_them(tmp_path: Path) -> None:
    ref = clip_pb2.StyleRef(name="dusk", version="1.0.0", strength=1.0, fingerprint=SHA256)

    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS))
            s.inputs.save("a-job", FRAME, {SHA256: s.catalogue.find("dusk").weights_path})
            assert (await s.get("dusk")).jobs == 1
            assert (await remove(s, "dusk")).style.jobs == 1
            (use,) = s.catalogue.uses([ref], s.inputs.weights)
            assert content(use.path) == WEIGHTS
            s.inputs.delete("a-job")
            assert s.inputs.weights(SHA256) is None
            assert content(use.path) is None

    asyncio.run(scenario())


def test_what_cannot_be_removed_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS))
            (s.root / "dusk@1.0.0").rename(tmp_path / "dusk")
            (tmp_path / "operator").mkdir()
            (tmp_path / "dusk").rename(tmp_path / "operator" / "dusk")
            reasons = {
                "noir": "'noir' comes with Cinecat and stays",
                "grain": "'grain' comes with the Python package grain; uninstall that",
                "dusk": f"'dusk' was not uploaded; its folder {tmp_path}/operator/dusk is the operator's to remove",
            }
            for name, reason in reasons.items():
                assert await s.refused(remove(s, name)) == (PRECONDITION, [("name", reason)])
            code, ((place, problem),) = await s.refused(remove(s, "dawn"))
            assert (code, place) == (NOT_FOUND, "name")
            assert "no style 'dawn'" in problem

    asyncio.run(scenario())


def test_which_of_several_versions_goes_must_be_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(weights(1)))
            await s.install(upload(weights(2)))
            assert await s.refused(remove(s, "dusk")) == (
                INVALID,
                [("version", "must be set, because 'dusk' has 1.0.1, 1.0.0")],
            )
            await remove(s, "dusk", "1.0.0")
            assert s.on_disk() == ["dusk@1.0.1"]

    asyncio.run(scenario())


def test_an_installed_style_that_was_damaged_is_a_problem_and_can_be_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS))
            (s.root / "dusk@1.0.0" / "dusk.safetensors").write_bytes(weights(1))
            answer = await s.stub.ListStyles(styles_pb2.ListStylesRequest())
            assert [Path(problem.folder).name for problem in answer.problems] == ["dusk@1.0.0"]
            assert "sha256 is" in answer.problems[0].reason
            await remove(s, "dusk", "1.0.0")
            assert s.on_disk() == []

    asyncio.run(scenario())


def test_a_warm_style_is_resident(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            assert not (await s.get("noir")).HasField("residency")
            style = await s.stub.WarmStyle(styles_pb2.WarmStyleRequest(name="noir"))
            assert (list(style.residency.slots), style.residency.size_bytes) == ([1], 4096)
            assert Path(s.core.warmed[0].style.path) == BUNDLED / "noir" / "noir.safetensors"
            s.catalogue.activity.resident = ()
            assert not (await s.get("noir")).HasField("residency")

    asyncio.run(scenario())


def test_a_style_that_cannot_be_warmed_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            code, ((place, _),) = await s.refused(s.stub.WarmStyle(styles_pb2.WarmStyleRequest(name="nior")))
            assert (code, place) == (NOT_FOUND, "name")
            s.core.full = True
            code, _ = await s.refused(s.stub.WarmStyle(styles_pb2.WarmStyleRequest(name="noir")))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(scenario())


def test_uses_are_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            assert not (await s.get("noir")).HasField("last_use_time")
            s.catalogue.uses([clip_pb2.StyleRef(name="noir")], lambda _: None)
            s.catalogue.uses([clip_pb2.StyleRef(name="noir")], lambda _: None)
            style = await s.get("noir")
            assert style.uses == 2
            assert style.last_use_time.seconds > 0

    asyncio.run(scenario())
