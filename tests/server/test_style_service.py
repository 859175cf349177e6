"""Removing, warming and describing styles over a real connection, with a stand-in for the engine core."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc

from cinecat.plugins.registry import BUNDLED
from cinecat.v1 import clip_pb2, styles_pb2
from tests.server.samples import FRAME
from tests.server.style_uploads import upload, weights
from tests.server.styles_server import ALWAYS, Served, served

WEIGHTS = weights()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, NOT_FOUND = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND


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
            s.replica.lost()
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
            for _ in range(2):
                s.catalogue.activity.used(s.catalogue.find("noir").fingerprint)
            style = await s.get("noir")
            assert style.uses == 2
            assert style.last_use_time.seconds > 0

    asyncio.run(scenario())
