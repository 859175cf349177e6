"""A clip that cannot be served is refused with every field that is wrong; any other comes back complete."""

from __future__ import annotations

import io
import math
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cinecat.server.errors import RequestError
from cinecat.server.validation import AcceptableClip, check_clip
from cinecat.v1 import clip_pb2
from tests.server.samples import TARGETS, catalogue, model

MODEL = model()
STYLES = catalogue()
NOIR = STYLES.find("noir").fingerprint
INT32 = st.integers(-(2**31), 2**31 - 1)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGE = png(64, 64)


def clip(**fields: Any) -> clip_pb2.ClipSpec:
    """A clip that can be served, but for the fields given; None takes a field away."""
    wanted = {"image": IMAGE, "prompt": "a cat", "width": 64, "height": 64, "frames": 5, "steps": 2, **fields}
    return clip_pb2.ClipSpec(**{name: value for name, value in wanted.items() if value is not None})


def checked(**fields: object) -> AcceptableClip:
    return check_clip(clip(**fields), MODEL, STYLES)


def refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as refused:
        checked(**fields)
    return refused.value


def styles(*references: tuple[str, float | None]) -> list[Message]:
    return [clip_pb2.StyleRef(name=name, strength=strength) for name, strength in references]


@pytest.mark.parametrize(
    ("field", "value", "path", "said"),
    [
        ("image", None, "clip.image", "is missing"),
        ("image", IMAGE[:-40], "clip.image", ""),
        ("image", b"GIF89a" + bytes(40), "clip.image", ""),
        ("image", bytes(32 * 2**20 + 1), "clip.image", "at most 33554432 are allowed"),
        ("prompt", "x" * 4097, "clip.prompt", "has 4097 characters, at most 4096"),
        ("negative_prompt", "x" * 4097, "clip.negative_prompt", "has 4097 characters, at most 4096"),
        ("width", 60, "clip.width", "nearest: 64"),
        ("width", -16, "clip.width", "nearest: 32"),
        ("width", 16, "clip.width", "nearest: 32"),
        ("height", 0, "clip.height", "nearest: 32"),
        ("height", 100, "clip.height", "nearest: 96"),
        ("height", 2**31 - 1, "clip.height", "nearest: 16384"),
        ("width", None, "clip.width", "must be set"),
        ("height", None, "clip.height", "must be set"),
        ("frames", 0, "clip.frames", "nearest: 1"),
        ("frames", -7, "clip.frames", "nearest: 1"),
        ("frames", 6, "clip.frames", "nearest: 5"),
        ("frames", 8, "clip.frames", "nearest: 9"),
        ("frames", 10**6, "clip.frames", "nearest: 4093"),
        ("steps", 0, "clip.steps", "between 1 and 200"),
        ("steps", 10**6, "clip.steps", "between 1 and 200"),
        ("run_steps", 1, "clip.run_steps", "1 is not 2 or more; leave it unset"),
        ("run_steps", -3, "clip.run_steps", "-3 is not 2 or more"),
        ("run_steps", 9, "clip.run_steps", "9 is more than the clip's 2 steps; leave it unset"),
        ("guidance_scale", math.nan, "clip.guidance_scale", "between 0 and 30"),
        ("guidance_scale", math.inf, "clip.guidance_scale", "between 0 and 30"),
        ("guidance_scale", -0.5, "clip.guidance_scale", "between 0 and 30"),
        ("fps", math.nan, "clip.fps", "between 1 and 240"),
        ("fps", 0.0, "clip.fps", "between 1 and 240"),
        ("fps", 241.0, "clip.fps", "between 1 and 240"),
        ("seed", -1, "clip.seed", "between 0 and 9223372036854775807"),
        ("fit", 17, "clip.fit", "FIT_CROP, FIT_PAD, FIT_STRETCH"),
        ("tokenization", {"mode": 9}, "clip.tokenization.mode", "9 is not one of UNIFORM, CAT"),
        ("tokenization", {"mode": "CAT", "keep_ratio": 0.2}, "clip.tokenization.keep_ratio", "0.2 is not between 0.25"),
        ("tokenization", {"mode": "CAT", "keep_ratio": 1.01}, "clip.tokenization.keep_ratio", "64x64 with 5 frames"),
        ("tokenization", {"mode": "CAT", "keep_ratio": math.nan}, "clip.tokenization.keep_ratio", "nan is not between"),
        ("tokenization", {"mode": "CAT", "target_psnr_db": 14.9}, "clip.tokenization.target_psnr_db", "between 15 and"),
        ("tokenization", {"mode": "CAT", "target_psnr_db": math.nan}, "clip.tokenization.target_psnr_db", "and 60"),
        ("tokenization", {"mode": "UNIFORM", "keep_ratio": 0.5}, "clip.tokenization.keep_ratio", "unset unless"),
        ("tokenization", {"target_psnr_db": 40.0}, "clip.tokenization.target_psnr_db", "unset unless"),
        ("artifact_formats", [1, 9], "clip.artifact_formats[1]", "ARTIFACT_FORMAT_FRAMES_F32"),
        ("styles", styles(("noir", math.nan)), "clip.styles[0].strength", "between -4 and 4"),
        ("styles", styles(("noir", 4.5)), "clip.styles[0].strength", "between -4 and 4"),
        ("styles", styles(("noir", 1), ("noir", 1)), "clip.styles[1].name", "named twice"),
        ("styles", styles(*[("noir", 1)] * 9), "clip.styles", "at most 8"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(field: str, value: object, path: str, said: str) -> None:
    error = refusal(**{field: value})
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [path]
    assert said in error.violations[0].description
    assert path in error.message


@pytest.mark.parametrize(
    ("field", "value", "path", "said"),
    [
        ("model", "wan-huge", "clip.model", "loaded: wan-tiny"),
        ("styles", styles(("nior", None)), "clip.styles[0].name", "noir"),
        ("styles", styles(("", None)), "clip.styles[0].name", ""),
        ("styles", [clip_pb2.StyleRef(name="noir", version="9.9.9")], "clip.styles[0].name", "1.0.0"),
    ],
)
def test_what_does_not_exist_is_not_found(field: str, value: object, path: str, said: str) -> None:
    error = refusal(**{field: value})
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert [violation.field for violation in error.violations] == [path]
    assert said in error.violations[0].description


def test_all_that_is_wrong_is_told_at_once() -> None:
    error = refusal(
        model="other", image=None, prompt="x" * 5000, width=63, height=None, frames=4, steps=-1, fps=0.0, seed=-5, fit=9
    )
    assert {violation.field for violation in error.violations} == {
        "clip.model",
        "clip.image",
        "clip.prompt",
        "clip.height",
        "clip.frames",
        "clip.steps",
        "clip.fps",
        "clip.seed",
        "clip.fit",
    }


def test_something_missing_beside_something_wrong_is_invalid() -> None:
    assert refusal(model="other", steps=0).code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_clip_of_too_many_tokens_is_refused_by_their_number() -> None:
    (violation,) = refusal(width=512, height=512, frames=81).violations
    assert violation.field == "clip.frames"
    assert "takes 21504 tokens, at most 20480 are allowed" in violation.description
    assert checked(width=512, height=512, frames=77).clip.frames == 77


def test_a_long_name_is_not_echoed_in_full() -> None:
    assert len(refusal(model="x" * 100_000, styles=styles(("y" * 100_000, None))).message) < 2000


def test_what_is_left_unset_takes_the_models_defaults() -> None:
    resolved = check_clip(clip_pb2.ClipSpec(image=IMAGE), MODEL, STYLES).clip
    expected = clip_pb2.ClipSpec()
    expected.CopyFrom(MODEL.defaults)
    expected.seed = resolved.seed
    assert resolved == expected
    assert resolved.HasField("seed")


def test_what_is_set_is_kept_but_for_the_image() -> None:
    asked = clip(
        model="wan-tiny",
        fit=clip_pb2.FIT_PAD,
        negative_prompt="a dog",
        fps=23.976,
        guidance_scale=0.0,
        seed=2**63 - 1,
        tokenization={"mode": "UNIFORM"},
        artifact_formats=[2, 1],
        shift=2.5,
        prompt_as_is=True,
        styles=[clip_pb2.StyleRef(name="noir", version="1.0.0", strength=-0.25, fingerprint=NOIR)],
    )
    resolved = check_clip(asked, MODEL, STYLES).clip
    asked.ClearField("image")
    assert resolved == asked


@pytest.mark.parametrize(
    ("asked", "resolved", "noted"),
    [
        ({"mode": "CAT"}, {"mode": "CAT", "keep_ratio": 0.75}, ["cat is lossy; keep ratio 0.75"]),
        ({"mode": "CAT", "keep_ratio": 0.5}, {"mode": "CAT", "keep_ratio": 0.5}, ["cat is lossy; keep ratio 0.5"]),
        ({"mode": "CAT", "keep_ratio": 1.0}, {"mode": "CAT", "keep_ratio": 1.0}, []),
        ({"mode": "CAT", "target_psnr_db": 40}, {"mode": "CAT", "target_psnr_db": 40}, ["follows from 40 dB"]),
    ],
)
def test_cat_is_kept_with_its_budget_and_called_lossy(
    asked: dict[str, object], resolved: dict[str, object], noted: list[str]
) -> None:
    accepted = checked(tokenization=asked, width=128, height=128, frames=17, steps=8, image=png(128, 128))
    assert accepted.clip.tokenization == clip_pb2.Tokenization(**resolved)
    assert len(accepted.notes) == len(noted)
    assert all(part in note for part, note in zip(noted, accepted.notes, strict=True))


def test_cached_steps_are_kept_and_called_lossy() -> None:
    accepted = checked(steps=8, run_steps=4)
    assert accepted.clip.run_steps == 4
    assert [note for note in accepted.notes if "lossy" in note] == [
        "steps: caching is lossy; 4 of 8 steps run the model"
    ]
    assert not any("lossy" in note for note in checked(steps=8, run_steps=8).notes)
    assert not checked().clip.HasField("run_steps")


def test_cached_steps_with_merged_tokens_or_of_too_few_steps_are_refused() -> None:
    (both,) = refusal(steps=8, run_steps=4, tokenization={"mode": "CAT"}).violations
    assert (both.field, "cannot go with tokenization CAT" in both.description) == ("clip.run_steps", True)
    (few,) = refusal(steps=3, run_steps=4).violations
    assert (few.field, "4 is more than the clip's 3 steps" in few.description) == ("clip.run_steps", True)


def test_an_accepted_clip_of_cat_is_accepted_as_it_is() -> None:
    again = checked(tokenization={"mode": "CAT"}, seed=3, styles=styles(("noir", None))).clip
    resent = clip_pb2.ClipSpec()
    resent.CopyFrom(again)
    resent.image = IMAGE
    assert check_clip(resent, MODEL, STYLES).clip == again


def test_a_size_with_nothing_to_merge_keeps_every_token() -> None:
    accepted = checked(tokenization={"mode": "CAT"}, width=32, height=32, frames=1)
    assert accepted.clip.tokenization.keep_ratio == 1.0
    assert checked(tokenization={"mode": "CAT", "keep_ratio": 1.0}, width=32, height=32, frames=1)


def test_a_ratio_that_so_few_steps_cannot_hold_is_noted_with_what_it_will_be() -> None:
    _, told = checked(tokenization={"mode": "CAT", "keep_ratio": 0.3}, steps=2).notes
    assert "0.3 cannot be held by a clip of this size in 2 steps" in told
    assert "will be 0.62" in told


def test_default_steps_keep_within_the_limit() -> None:
    few = model(max_steps=3)
    assert check_clip(clip(steps=None), few, STYLES).clip.steps == 3


def test_seeds_are_drawn_when_unset_and_zero_is_a_seed() -> None:
    assert len({checked().clip.seed for _ in range(3)}) > 1
    assert checked(seed=0).clip.seed == 0


def test_an_unspecified_format_is_mp4_and_formats_are_written_once() -> None:
    assert list(checked(artifact_formats=[0, 1, 2, 2]).clip.artifact_formats) == [1, 2]


def test_a_style_gets_its_version_and_default_strength() -> None:
    (worn,) = checked(styles=[clip_pb2.StyleRef(name="noir")]).clip.styles
    assert (worn.name, worn.version, worn.strength) == ("noir", "1.0.0", 1.0)
    (off,) = checked(styles=styles(("noir", 0.0))).clip.styles
    assert off.strength == 0.0


def test_a_style_for_another_model_is_refused() -> None:
    narrow = catalogue(targets=dict.fromkeys(TARGETS, (128, 128)))
    with pytest.raises(RequestError, match=r"clip\.styles\[0\]\.name: 'noir' was made for a 256 -> 256") as refused:
        check_clip(clip(styles=styles(("noir", 1))), MODEL, narrow)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_styles_that_fit_a_slot_only_alone_are_refused_together() -> None:
    small = catalogue(max_rank=8)
    assert check_clip(clip(styles=styles(("noir", 1))), MODEL, small).clip.styles
    with pytest.raises(
        RequestError,
        match=r"clip\.styles: together, 'noir' \(rank 8\) and 'amber' \(rank 8\) add up to rank 16, a slot holds 8; "
        r"wear fewer of them, or raise the server's setting max_rank to 16",
    ):
        check_clip(clip(styles=styles(("noir", 1), ("amber", 1))), MODEL, small)
    assert check_clip(clip(styles=styles(("noir", 1), ("amber", 0))), MODEL, small).clip.styles


def test_what_was_done_to_the_image_is_noted() -> None:
    assert checked().notes == ()
    cropped = checked(image=png(80, 64))
    assert cropped.frame.shape == (64, 64, 3)
    assert any("80x64" in note for note in cropped.notes)


def test_an_image_with_too_many_pixels_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^clip\.image: "):
        check_clip(clip(image=png(1001, 1000)), model(max_image_megapixels=1), STYLES)


floats = st.floats(width=64) | st.sampled_from([0.0, 1.0, 8.0, 30.0])
sizes = st.sampled_from([32, 48, 64, 128, 60, 0]) | INT32
random_clips = st.builds(
    clip_pb2.ClipSpec,
    model=st.sampled_from(["", "wan-tiny", "other"]),
    image=st.sampled_from([IMAGE, png(33, 70), b"", b"\x89PNG\r\n\x1a\n"]),
    fit=st.sampled_from([0, 1, 2, 3, 7]),
    prompt=st.text(max_size=20),
    styles=st.lists(
        st.builds(
            clip_pb2.StyleRef,
            name=st.sampled_from(["noir", "amber", "nior"]),
            version=st.sampled_from(["", "1.0.0", "2"]),
            strength=st.none() | floats,
        ),
        max_size=3,
    ),
    width=st.none() | sizes,
    height=st.none() | sizes,
    frames=st.none() | st.sampled_from([1, 5, 17, 6]) | INT32,
    fps=st.none() | floats,
    steps=st.none() | st.sampled_from([1, 8]) | INT32,
    run_steps=st.none() | st.integers(0, 9) | INT32,
    guidance_scale=st.none() | floats,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    tokenization=st.none()
    | st.builds(clip_pb2.Tokenization, mode=st.sampled_from([0, 1, 2, 9]), keep_ratio=st.none() | floats)
    | st.builds(clip_pb2.Tokenization, mode=st.sampled_from([0, 2]), target_psnr_db=floats),
    artifact_formats=st.lists(st.sampled_from([0, 1, 2, 9]), max_size=3),
)
good_fields = st.fixed_dictionaries(
    {
        "width": st.sampled_from([32, 64, 80]),
        "height": st.sampled_from([32, 64, 80]),
        "image": st.sampled_from([IMAGE, png(33, 70), png(1, 90)]),
        "fit": st.sampled_from([0, 1, 2, 3]),
        "steps": st.integers(1, 200),
        "guidance_scale": st.floats(0, 30),
        "fps": st.floats(1, 240),
        "seed": st.integers(0, 2**63 - 1),
    }
)
quick = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


@quick
@given(random_clips)
def test_any_clip_is_either_refused_by_field_or_comes_back_complete(asked: clip_pb2.ClipSpec) -> None:
    try:
        accepted = check_clip(asked, MODEL, STYLES)
    except RequestError as error:
        assert_refused_by_field(error)
    else:
        assert_complete(accepted)


@quick
@given(good_fields)
def test_any_clip_within_the_limits_is_accepted(fields: dict[str, object]) -> None:
    assert_complete(checked(**fields))


def assert_refused_by_field(error: RequestError) -> None:
    assert error.violations
    assert all(violation.field.startswith("clip.") and violation.description for violation in error.violations)


def assert_complete(accepted: AcceptableClip) -> None:
    resolved = accepted.clip
    assert accepted.frame.shape == (resolved.height, resolved.width, 3)
    assert accepted.frame.dtype == np.uint8
    assert not resolved.image
    set_fields = {field.name for field, _ in resolved.ListFields()}
    assert set_fields >= {"model", "fit", "width", "height", "frames", "fps", "steps", "guidance_scale", "seed"}
    assert resolved.tokenization.mode
    assert bool(resolved.tokenization.WhichOneof("budget")) == (resolved.tokenization.mode == clip_pb2.Tokenization.CAT)
    assert resolved.artifact_formats
    assert all(worn.version and worn.HasField("strength") for worn in resolved.styles)
