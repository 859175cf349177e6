"""Four clients at once, styles that come and are replaced meanwhile: every clip equals the one made alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.numpy import load

from cinecat import Client
from cinecat.server.local_server import LocalServer
from tests.server.style_uploads import weights

CLIENTS, CLIPS = 4, 3
# What each client asks for, in turn; `swell` comes only once the load is on.
ORDERS = [("ebb", "flow", "ebb"), ("flow", "swell", "ebb"), ("ebb", "swell", "swell"), ("flow", "ebb", "ebb")]


@pytest.fixture
def styles(server: LocalServer, tmp_path: Path) -> Iterator[Path]:
    """`ebb` and `flow`, installed; the folder of their files and of the replacements."""
    for seed, name in enumerate(("ebb", "flow", "swell", "ebb-again"), start=1000):
        (tmp_path / f"{name}.safetensors").write_bytes(weights(seed, rank=seed % 3 + 1))
    with Client(server.address) as client:
        for name in ("ebb", "flow"):
            client.install_style(tmp_path / f"{name}.safetensors", name=name, version="1.0.0")
        yield tmp_path
        for style in client.styles():
            if style.name in ("ebb", "flow", "swell"):
                client.remove_style(style.name, style.version)


def made(client: Client, image: bytes, style: str, seed: int) -> tuple[str, bytes]:
    """The style as it was worn, NAME@VERSION, and the clip's frames."""
    clip = client.generate(
        image=image, prompt="a cat", style=style, size="64x64", frames=5, steps=2, seed=seed, artifacts=("frames_f32",)
    ).result()
    assert clip.data is not None
    worn = clip.styles[0]
    return f"{worn.name}@{worn.version}", load(clip.data)["frames"].tobytes()


def test_every_clip_equals_its_reference_while_styles_come_and_are_replaced(
    server: LocalServer, styles: Path, frame_png: bytes
) -> None:
    third_is_there = threading.Event()

    def order(number: int) -> list[tuple[str, bytes]]:
        clips = []
        with Client(server.address) as client:
            for turn, style in enumerate(ORDERS[number]):
                if style == "swell":
                    assert third_is_there.wait(60)
                clips.append(made(client, frame_png, style, seed=10 * number + turn))
        return clips

    with ThreadPoolExecutor(CLIENTS) as pool, Client(server.address) as client:
        orders = [pool.submit(order, number) for number in range(CLIENTS)]
        client.install_style(styles / "swell.safetensors", name="swell", version="1.0.0")
        third_is_there.set()
        client.install_style(styles / "ebb-again.safetensors", name="ebb", version="1.0.1")
        clips = {(number, turn): clip for number in range(CLIENTS) for turn, clip in enumerate(orders[number].result())}
        alone = {
            (number, turn): made(client, frame_png, worn, seed=10 * number + turn)
            for (number, turn), (worn, _) in clips.items()
        }
    assert clips == alone
    assert {worn for worn, _ in clips.values()} >= {"flow@1.0.0", "swell@1.0.0", "ebb@1.0.1"}
    assert len({frames for _, frames in clips.values()}) == CLIENTS * CLIPS
