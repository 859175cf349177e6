"""What the client refuses before it sends anything, and what it sends otherwise."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat import InvalidRequest, Previews, RequestTooLarge, Style, request
from cinecat.image import MAX_IMAGE_BYTES
from cinecat.request import build_clip, build_request
from cinecat.v1 import clip_pb2, generation_pb2, job_pb2
from tests.protos.scripted_server import PNG

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="@:", exclude_categories=("Z", "C")), min_size=1)
STRENGTHS = st.floats(-4, 4)


def build(**changes: Any) -> clip_pb2.ClipSpec:
    return build_clip(**({"image": PNG, "prompt": "a cat"} | changes))


def test_steps_that_run_reach_their_field() -> None:
    assert build(steps=12, run_steps=6) == clip_pb2.ClipSpec(image=PNG, prompt="a cat", steps=12, run_steps=6)
    assert build(run_steps=6).run_steps == 6


@pytest.mark.parametrize(
    "wrong",
    [{"run_steps": 1}, {"run_steps": 2.5}, {"steps": 4, "run_steps": 5}, {"run_steps": 4, "tokenization": "cat"}],
)
def test_steps_that_cannot_run_are_refused(wrong: dict[str, Any]) -> None:
    assert refused_fields(**wrong) == ["clip.run_steps"]


def refused_fields(**changes: Any) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        build(**changes)
    return [violation.field for violation in caught.value.violations]


def test_what_is_left_out_stays_unset() -> None:
    assert build() == clip_pb2.ClipSpec(image=PNG, prompt="a cat")


def test_every_argument_reaches_its_field() -> None:
    clip = build(
        style=["noir@1.2:0.8", Style("amber")],
        negative_prompt="blur",
        model="wan-tiny",
        fit="pad",
        size="832x480",
        frames=81,
        fps=16,
        steps=30,
        guidance=0,
        seed=0,
        tokenization="cat",
        keep_ratio=0.5,
        artifacts=("mp4", "frames_f32"),
    )
    assert clip == clip_pb2.ClipSpec(
        model="wan-tiny",
        image=PNG,
        fit=clip_pb2.FIT_PAD,
        prompt="a cat",
        negative_prompt="blur",
        styles=[clip_pb2.StyleRef(name="noir", version="1.2", strength=0.8), clip_pb2.StyleRef(name="amber")],
        width=832,
        height=480,
        frames=81,
        fps=16,
        steps=30,
        guidance_scale=0,
        seed=0,
        tokenization=clip_pb2.Tokenization(mode=clip_pb2.Tokenization.CAT, keep_ratio=0.5),
        artifact_formats=[clip_pb2.ARTIFACT_FORMAT_MP4_H264, clip_pb2.ARTIFACT_FORMAT_FRAMES_F32],
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": -1}, "clip.seed"),
        ({"seed": 2**63}, "clip.seed"),
        ({"seed": 1.5}, "clip.seed"),
        ({"seed": True}, "clip.seed"),
        ({"steps": 0}, "clip.steps"),
        ({"steps": 2**31}, "clip.steps"),
        ({"frames": 0}, "clip.frames"),
        ({"frames": 80}, "clip.frames"),
        ({"fps": 0}, "clip.fps"),
        ({"fps": math.nan}, "clip.fps"),
        ({"guidance": math.nan}, "clip.guidance_scale"),
        ({"guidance": math.inf}, "clip.guidance_scale"),
        ({"guidance": "5"}, "clip.guidance_scale"),
        ({"guidance": 10**400}, "clip.guidance_scale"),
        ({"width": 0, "height": 480}, "clip.width"),
        ({"width": 832, "height": -1}, "clip.height"),
        ({"size": "832"}, "clip.width"),
        ({"size": "832x480", "width": 832}, "clip.width"),
        ({"prompt": 7}, "clip.prompt"),
        ({"prompt": "\ud800"}, "clip.prompt"),
        ({"fit": "squash"}, "clip.fit"),
        ({"tokenization": "dog"}, "clip.tokenization.mode"),
        ({"tokenization": "cat", "keep_ratio": 0}, "clip.tokenization.keep_ratio"),
        ({"tokenization": "cat", "keep_ratio": 1.1}, "clip.tokenization.keep_ratio"),
        ({"tokenization": "uniform", "keep_ratio": 0.5}, "clip.tokenization.keep_ratio"),
        ({"keep_ratio": 0.5}, "clip.tokenization.keep_ratio"),
        ({"tokenization": "cat", "target_psnr_db": -3}, "clip.tokenization.target_psnr_db"),
        ({"tokenization": "cat", "target_psnr_db": 30, "keep_ratio": 0.5}, "clip.tokenization.target_psnr_db"),
        ({"artifacts": ("mp4", "gif")}, "clip.artifact_formats[1]"),
        ({"style": "noir:loud"}, "clip.styles[0]"),
        ({"style": ":0.5"}, "clip.styles[0]"),
        ({"style": ["noir", "amber:nan"]}, "clip.styles[1].strength"),
        ({"style": "noir:4.1"}, "clip.styles[0].strength"),
        ({"style": Style("noir", math.inf)}, "clip.styles[0].strength"),
        ({"style": Style("")}, "clip.styles[0].name"),
        ({"style": [None]}, "clip.styles[0]"),
        ({"image": b""}, "clip.image"),
        ({"image": b"GIF89a..."}, "clip.image"),
        ({"image": 7}, "clip.image"),
        ({"image": "missing.png"}, "clip.image"),
        ({"image": "."}, "clip.image"),
        ({"image": "nul\0.png"}, "clip.image"),
        ({"image": io.StringIO("text")}, "clip.image"),
        ({"image": PNG + bytes(MAX_IMAGE_BYTES)}, "clip.image"),
    ],
)
def test_a_field_that_no_server_can_take_is_named(changes: dict[str, Any], field: str) -> None:
    assert refused_fields(**changes) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    assert refused_fields(image=b"", seed=-1, steps=0) == ["clip.image", "clip.steps", "clip.seed"]


def test_the_message_says_what_is_wrong_and_what_is_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"clip\.frames: 80 is not 4k \+ 1; the nearest are 77 and 81"):
        build(frames=80)


@pytest.mark.parametrize(
    "start", [PNG, b"\xff\xd8\xff\xe0", b"RIFF\x00\x00\x00\x00WEBPVP8 ", b"II*\x00\x08", b"MM\x00*\x00", b"II+\x00\x08"]
)
def test_all_four_formats_pass(start: bytes) -> None:
    assert build(image=start).image == start


def test_an_image_may_be_a_path_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shot.png"
    path.write_bytes(PNG)
    assert build(image=path).image == PNG
    assert build(image=str(path)).image == PNG
    assert build(image=io.BytesIO(PNG)).image == PNG


def test_a_request_that_fits_no_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "MAX_MESSAGE_BYTES", 8192)
    with pytest.raises(RequestTooLarge, match="Shorten the prompt"):
        build(prompt="x" * 10_000)


def test_arguments_that_do_not_exist_are_type_errors() -> None:
    with pytest.raises(TypeError, match="sed"):
        build(sed=3)
    with pytest.raises(TypeError, match="prompt"):
        build_clip(image=PNG)  # type: ignore[call-arg]


@given(st.builds(Style, NAMES, st.none() | STRENGTHS, st.just("") | NAMES))
def test_a_style_is_read_back_from_its_spelling(style: Style) -> None:
    assert Style.parse(str(style)) == style


@given(st.from_regex(r"[:@].*", fullmatch=True) | st.from_regex(r"noir[:@].*[:@].*[:@].*", fullmatch=True))
def test_a_spelling_without_a_name_or_with_too_many_parts_is_refused(text: str) -> None:
    assert refused_fields(style=text) == ["clip.styles[0]"]


@given(st.floats(max_value=-4, exclude_max=True) | st.floats(min_value=4, exclude_min=True) | st.just(math.nan))
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    assert refused_fields(style=["amber", f"noir:{strength!r}"]) == ["clip.styles[1].strength"]


@given(st.integers(0, 2**63 - 1))
def test_a_seed_in_range_is_sent_exactly(seed: int) -> None:
    assert build(seed=seed).seed == seed


@given(st.integers(max_value=-1) | st.integers(min_value=2**63))
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    assert refused_fields(seed=seed) == ["clip.seed"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_finite_guidance_is_sent_exactly(guidance: float) -> None:
    assert build(guidance=guidance).guidance_scale == guidance


def test_without_priority_and_previews_the_server_decides() -> None:
    built = build_request(generation_pb2.GenerateRequest, image=PNG, prompt="a cat")
    assert built.priority == job_pb2.PRIORITY_UNSPECIFIED
    assert not built.HasField("previews")
    assert built.clip == build()
    assert len(built.request_id) == 36


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"previews": Previews(every_steps=-1)}, "previews.every_steps"),
        ({"previews": Previews(every_steps=2**31)}, "previews.every_steps"),
        ({"previews": Previews(every_steps=1.5)}, "previews.every_steps"),  # type: ignore[arg-type]
        ({"previews": True}, "previews"),
    ],
)
def test_what_no_server_takes_beside_the_clip_is_refused_with_what_is_wrong_in_it(
    asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_request(generation_pb2.SubmitRequest, image=PNG, prompt="a cat", seed=-1, **asked)
    assert [violation.field for violation in caught.value.violations] == ["clip.seed", field]
    with pytest.raises(InvalidRequest):
        build_request(generation_pb2.SubmitRequest, image=PNG, prompt="a cat", **asked)
