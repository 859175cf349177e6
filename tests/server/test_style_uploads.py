"""Uploads of styles over a real connection. Whatever goes wrong with one: one clear error, the old state intact,
nothing left on disk, the server serving.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cinecat.plugins.installed import InstalledStyles
from cinecat.plugins.manifest import MAX_PREVIEW_BYTES
from cinecat.server.style_installer import MAX_UPLOADS
from cinecat.v1 import styles_pb2
from tests.server.samples import until
from tests.server.style_uploads import toml, upload, weights, with_huge_header, with_nan
from tests.server.styles_server import ALWAYS, MAX_BYTES, HeldUpload, incoming, served

WEIGHTS = weights()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, NOT_FOUND = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND
PICTURE = b"\x89PNG\r\n\x1a\n a picture"


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
            assert await s.listed() == [*ALWAYS[:2], "dusk@1.0.0", *ALWAYS[2:]]
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
        (with_nan(np.float16), INVALID, "holds NaN, infinity"),
        (with_nan(np.float32), INVALID, "holds NaN, infinity"),
        (with_nan(np.float64), INVALID, "holds NaN, infinity"),
        (weights(size=128), PRECONDITION, "was made for a 128 -> 128 blocks.0.attn2.to_q"),
        (weights(target="blocks.39.attn2.to_q"), PRECONDITION, "changes blocks.39.attn2.to_q, which wan-tiny"),
        (weights(rank=33), PRECONDITION, "rank 33 is more than a slot holds (32;"),
        (weights(target="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"), INVALID, "down_blocks"),
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
    tmp_path: Path, data: bytes, code: grpc.StatusCode, said: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            found, ((place, problem),) = await s.refused(s.install(upload(data)))
            assert found is code
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
            parts = [*upload(WEIGHTS, preview="dusk.png"), part(preview=PICTURE[:5]), part(preview=PICTURE[5:])]
            described = (await s.install(parts)).style.preview
            assert (described.file_name, described.mime_type, described.size_bytes) == (
                "dusk.png",
                "image/png",
                len(PICTURE),
            )
            assert described.data == b""
            assert (await s.get("dusk", with_preview=True)).preview.data == PICTURE

    asyncio.run(scenario())


def test_a_style_of_another_family_whose_layers_fit_is_noted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            answer = await s.install(upload(WEIGHTS, base_model="wan2.1-t2v-tiny"))
            assert list(answer.notes) == [
                "base_model: made for wan2.1-t2v-tiny; the server has wan2.1-i2v-tiny, whose layers fit"
            ]

    asyncio.run(scenario())


def test_another_preview_for_the_same_version_is_not_dropped_in_silence(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            fields: dict[str, str] = {"version": "1.0.0", "preview": "dusk.png", "sha256": SHA256}
            await s.install([*upload(WEIGHTS, **fields), part(preview=PICTURE)])
            again = await s.install([*upload(WEIGHTS, **fields), part(preview=PICTURE)])
            assert again.unchanged
            code, ((place, problem),) = await s.refused(
                s.install([*upload(WEIGHTS, **fields), part(preview=PICTURE + b"x")])
            )
            assert (code, place) == (EXISTS, "upload.fields.version")
            assert "exists with another preview" in problem

    asyncio.run(scenario())


def test_a_preview_is_what_its_name_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            code, ((place, problem),) = await s.refused(
                s.install([*upload(WEIGHTS, preview="dusk.png"), part(preview=b"<script>")])
            )
            assert (code, place) == (INVALID, "preview")
            assert "is not what its name 'dusk.png' says" in problem
            assert s.on_disk() == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("name", "whose"), [("noir", "comes with Cinecat"), ("grain", "the Python package grain")])
def test_a_name_that_is_somebody_elses_is_not_taken_over(tmp_path: Path, name: str, whose: str) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            code, ((place, problem),) = await s.refused(s.install(upload(WEIGHTS, name=name)))
            assert (code, place) == (PRECONDITION, "name")
            assert whose in problem
            assert problem.endswith("give yours another name")
            assert (await s.get(name)).version == "1.0.0"

    asyncio.run(scenario())


def with_key(key: str) -> bytes:
    """A LoRA file with one more tensor, whose name is written as JSON has it."""
    length = int.from_bytes(WEIGHTS[:8], "little")
    header = WEIGHTS[8 : 8 + length].decode().strip()
    end = len(WEIGHTS) - 8 - length
    more = f', "{key}": {{"dtype": "F32", "shape": [1], "data_offsets": [{end}, {end + 4}]}}}}'
    text = (header[:-1] + more).encode()
    return len(text).to_bytes(8, "little") + text + WEIGHTS[8 + length :] + bytes(4)


def test_a_name_of_a_tensor_that_is_no_text_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            assert (await s.install(upload(with_key("lora_te_\\u00e4.weight")))).style.name == "dusk"
            code, ((place, _),) = await s.refused(s.install(upload(with_key("lora_te_\\ud800.weight"), name="half")))
            assert (code, place) == (INVALID, "weights")
            assert await s.listed() == [*ALWAYS[:2], "dusk@1.0.0", *ALWAYS[2:]]

    asyncio.run(scenario())


def test_an_endless_name_of_a_tensor_is_shown_cut(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            style = (await s.install(upload(with_key("lora_te_" + "a" * 5000)))).style
            assert [len(each.key) for each in style.ignored_keys] == [256]

    asyncio.run(scenario())


def test_tables_in_tables_are_refused_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            for text in ("a." * 8000 + "a = 1\n", toml() + "title." + "a." * 1100 + "a = 1\n", "[" + "a." * 9 + "a]\n"):
                code, ((place, problem),) = await s.refused(s.install(upload(WEIGHTS, toml=text)))
                assert (code, place) == (INVALID, "upload.toml")
                assert "has a key of more than 8 parts" in problem
            text = toml(description="www.a.b.c.d.e.f.g.h.i.j = a site")
            assert (await s.install(upload(WEIGHTS, toml=text))).style.name == "dusk"

    asyncio.run(scenario())


def test_a_version_after_the_last_one_and_past_a_damaged_one_is_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS, version="1.0.999999999"))
            assert (await s.install(upload(weights(1)))).style.version == "1.1.0"
            await s.install(upload(weights(2), version="1.999999999.999999999"))
            (s.root / "dusk@2.0.0").mkdir()
            assert (await s.install(upload(weights(3)))).style.version == "2.0.1"

    asyncio.run(scenario())


def test_a_name_that_no_file_system_takes_is_refused_as_such(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            text = toml(weights="ä" * 240 + ".safetensors")
            code, ((place, problem),) = await s.refused(s.install(upload(WEIGHTS, toml=text)))
            assert (code, place) == (INVALID, "upload.toml")
            assert "of at most 255 bytes" in problem

    asyncio.run(scenario())


def test_an_upload_that_trickles_is_given_up(tmp_path: Path) -> None:
    async def trickle() -> AsyncIterator[styles_pb2.InstallStyleRequest]:
        parts = upload(WEIGHTS, chunk=1)
        while (each := next(parts, None)) is not None:
            yield each
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with served(tmp_path, idle_seconds=0.2) as s:
            codes = set()
            for _ in range(3):
                code, _ = await s.refused(s.stub.InstallStyle(trickle()))
                codes.add(code)
                if code is not grpc.StatusCode.INTERNAL:
                    break  # which is what grpc.aio says where a message of its own came too late to be sent
            assert grpc.StatusCode.DEADLINE_EXCEEDED in codes
            assert s.on_disk() == []

    asyncio.run(scenario())


def test_removals_do_not_wait_for_uploads_that_take_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            await s.install(upload(WEIGHTS))
            held = [HeldUpload(upload(weights(n), name=f"dusk-{n}"), 2) for n in range(MAX_UPLOADS)]
            running = [asyncio.ensure_future(s.stub.InstallStyle(each)) for each in held]
            await until(lambda: len(s.on_disk()) == MAX_UPLOADS + 1)
            await s.stub.RemoveStyle(styles_pb2.RemoveStyleRequest(name="dusk"))
            for each in held:
                each.go_on.set()
            await asyncio.gather(*running)

    asyncio.run(scenario())


class FullDisk:
    """A file whose buffer cannot be written out at its end."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def close(self) -> None:
        self._file.close()
        raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_keeps_nothing_of_an_upload(tmp_path: Path) -> None:
    with InstalledStyles(tmp_path).begin(MAX_BYTES) as staged:
        staged._weights = FullDisk(staged._weights)  # type: ignore[assignment]
    assert list(tmp_path.iterdir()) == []


def test_a_style_that_cannot_be_made_durable_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsure(path: Path) -> None:
        if path.name == "styles":
            raise OSError(5, "Input/output error")

    async def scenario() -> None:
        async with served(tmp_path) as s:
            monkeypatch.setattr("cinecat.plugins.installed.sync", unsure)
            code, _ = await s.refused(s.install(upload(WEIGHTS)))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert (s.on_disk(), await s.listed()) == ([], ALWAYS)

    asyncio.run(scenario())


def test_a_folder_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as s:
            s.root.rmdir()
            assert (await s.install(upload(WEIGHTS))).style.name == "dusk"

    asyncio.run(scenario())
