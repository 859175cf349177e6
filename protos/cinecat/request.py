"""Turns keyword arguments into a ClipSpec, and refuses what cannot be right on any server.

Nothing is sent and nothing is asked here; limits that depend on the server (sizes, steps, known styles) are its own.
"""

import math
import operator
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Required, TypedDict, TypeVar, Unpack, cast

from cinecat import image, styles
from cinecat.clip import FORMATS
from cinecat.errors import FieldViolation, RequestTooLarge, refuse
from cinecat.previews import Previews
from cinecat.states import JobState
from cinecat.v1 import clip_pb2, generation_pb2, job_pb2

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Room for the request id and the framing around the clip.
_ENVELOPE_BYTES = 4096
_MAX_INT32 = 2**31 - 1
_MAX_SEED = 2**63 - 1
_T = TypeVar("_T")
_Asked = TypeVar("_Asked", generation_pb2.GenerateRequest, generation_pb2.SubmitRequest)
_SIZE = re.compile(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", re.ASCII)

_FITS = {"crop": clip_pb2.FIT_CROP, "pad": clip_pb2.FIT_PAD, "stretch": clip_pb2.FIT_STRETCH}
_MODES = {"uniform": clip_pb2.Tokenization.UNIFORM, "cat": clip_pb2.Tokenization.CAT}
_PRIORITIES = {"interactive": job_pb2.PRIORITY_INTERACTIVE, "batch": job_pb2.PRIORITY_BATCH}


class ClipArguments(TypedDict, total=False):
    """The clip to make. What is left out or None takes the default of its styles, or else the model's.

    `image` is the first frame: a path, bytes or binary file holding a PNG, JPEG, WebP or TIFF of at most 32 MiB.
    `style` is "noir", "noir:0.8", "noir@1.2:0.8", a `Style`, or a list of those. The size in pixels is `size`
    ("832x480") or `width` and `height`. `frames` is 4k + 1; `fps` is in frames per second. `guidance` of 1 or less
    switches guidance off. `shift` is of the noise schedule, 0.01 to 100. `prompt_as_is` keeps the styles' prompt
    templates away from the prompt. `seed` is 0 to 2^63 - 1. `tokenization="cat"` shares tokens between redundant
    regions, within `keep_ratio` (above 0, at most 1) or down to `target_psnr_db`. `run_steps` is how many of the
    steps run the model, 2 to `steps`, while the others carry its predictions on; lossy, and not with "cat". `artifacts`
    are the files to write; the first one is the clip that `generate` fetches.
    """

    image: Required["image.ImageArgument"]
    prompt: Required[str]
    style: "styles.StylesArgument"
    prompt_as_is: bool
    negative_prompt: str
    model: str
    fit: Literal["crop", "pad", "stretch"] | None
    size: str | None
    width: int | None
    height: int | None
    frames: int | None
    fps: float | None
    steps: int | None
    run_steps: int | None
    guidance: float | None
    shift: float | None
    seed: int | None
    tokenization: Literal["uniform", "cat"] | None
    keep_ratio: float | None
    target_psnr_db: float | None
    artifacts: Sequence[Literal["mp4", "frames_f32"]]


class RequestArguments(ClipArguments, total=False):
    """A clip, how soon it is wanted, and the pictures of it that its events carry.

    `priority` is "interactive", for clips that somebody waits for, which take over from others between two steps, or
    "batch". Left out or None, it is interactive for `generate` and batch for `submit`. `previews` is none by default.
    """

    priority: Literal["interactive", "batch"] | None
    previews: Previews | None


def build_request(kind: type[_Asked], **arguments: Unpack[RequestArguments]) -> _Asked:
    """A request for a new job, under an id of its own; raises as `build_clip` does."""
    violations: list[FieldViolation] = []
    clip = {name: value for name, value in arguments.items() if name not in ("priority", "previews")}
    request = kind(clip=_clip(cast(ClipArguments, clip), violations), request_id=str(uuid.uuid4()))
    chosen = _choice("priority", arguments.get("priority"), _PRIORITIES, violations)
    request.priority = chosen or job_pb2.PRIORITY_UNSPECIFIED
    if (previews := arguments.get("previews")) is not None:
        request.previews.CopyFrom(_previews(previews, violations))
    _refuse_any(violations, request.clip)
    return request


def build_clip(**arguments: Unpack[ClipArguments]) -> clip_pb2.ClipSpec:
    """The ClipSpec for `arguments`. Raises InvalidRequest naming every field that is wrong, RequestTooLarge when the
    whole would not fit into one message, and TypeError for an argument that does not exist.
    """
    violations: list[FieldViolation] = []
    clip = _clip(arguments, violations)
    _refuse_any(violations, clip)
    return clip


def list_request(
    states: Iterable[JobState | str] = (),
    since: datetime | None = None,
    until: datetime | None = None,
    style: str = "",
) -> generation_pb2.ListJobsRequest:
    """The request for the first page of the jobs that `Client.jobs` is asked for.

    Raises InvalidRequest for a state that is none and for moments in the wrong order.
    """
    violations: list[FieldViolation] = []
    request = generation_pb2.ListJobsRequest(style=_text("style", style, violations))
    if violations:
        raise refuse(violations)
    if since is not None:
        request.created_after.FromDatetime(since.astimezone(UTC))
    if until is not None:
        request.created_before.FromDatetime(until.astimezone(UTC))
    if since is not None and until is not None and until.astimezone(UTC) <= since.astimezone(UTC):
        raise refuse([FieldViolation("created_before", f"{until} is not later than {since}, where the span begins")])
    known = [state.value for state in JobState if state is not JobState.UNKNOWN]
    for index, state in enumerate(states):
        if state not in known:
            raise refuse([FieldViolation(f"states[{index}]", f"{state!r} is unknown; allowed: {', '.join(known)}")])
        request.states.append(JobState(state).to_proto())
    return request


def _clip(arguments: ClipArguments, violations: list[FieldViolation]) -> clip_pb2.ClipSpec:
    unknown = sorted(set(arguments) - set(ClipArguments.__annotations__))
    missing = sorted(ClipArguments.__required_keys__ - set(arguments))
    if unknown or missing:
        raise TypeError(f"unknown arguments: {unknown}" if unknown else f"missing arguments: {missing}")
    clip = clip_pb2.ClipSpec(
        image=image.read(arguments["image"], violations),
        styles=styles.to_protos(arguments.get("style"), violations),
    )
    _set_texts(clip, arguments, violations)
    _set_size(clip, arguments, violations)
    _set_numbers(clip, arguments, violations)
    _set_tokenization(clip, arguments, violations)
    clip.fit = _choice("clip.fit", arguments.get("fit"), _FITS, violations) or clip_pb2.FIT_UNSPECIFIED
    for index, name in enumerate(arguments.get("artifacts", ())):
        chosen = _choice(f"clip.artifact_formats[{index}]", name, FORMATS, violations)
        clip.artifact_formats.append(chosen or clip_pb2.ARTIFACT_FORMAT_UNSPECIFIED)
    return clip


def _refuse_any(violations: list[FieldViolation], clip: clip_pb2.ClipSpec) -> None:
    if violations:
        raise refuse(violations)
    if clip.ByteSize() + _ENVELOPE_BYTES > MAX_MESSAGE_BYTES:
        raise RequestTooLarge(
            f"the request has {clip.ByteSize()} bytes; allowed: {MAX_MESSAGE_BYTES - _ENVELOPE_BYTES}. "
            "Shorten the prompt or scale the image down"
        )


def _set_texts(clip: clip_pb2.ClipSpec, arguments: ClipArguments, violations: list[FieldViolation]) -> None:
    clip.prompt = _text("clip.prompt", arguments["prompt"], violations)
    clip.negative_prompt = _text("clip.negative_prompt", arguments.get("negative_prompt"), violations)
    clip.model = _text("clip.model", arguments.get("model"), violations)
    clip.prompt_as_is = bool(arguments.get("prompt_as_is"))


def _set_size(clip: clip_pb2.ClipSpec, arguments: ClipArguments, violations: list[FieldViolation]) -> None:
    width, height, size = arguments.get("width"), arguments.get("height"), arguments.get("size")
    if size is not None:
        match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        if match is None:
            violations.append(FieldViolation("clip.width", f"the size {size!r} is not WIDTHxHEIGHT, e.g. 832x480"))
            return
        if width is not None or height is not None:
            violations.append(FieldViolation("clip.width", "is given twice; give size, or width and height"))
            return
        width, height = int(match[1]), int(match[2])
    sizes = {"width": width, "height": height}
    _assign(clip, {name: _integer(f"clip.{name}", size, 1, _MAX_INT32, violations) for name, size in sizes.items()})


def _set_numbers(clip: clip_pb2.ClipSpec, arguments: ClipArguments, violations: list[FieldViolation]) -> None:
    frames = _integer("clip.frames", arguments.get("frames"), 1, _MAX_INT32, violations)
    if frames is not None and frames % 4 != 1:
        lower = frames - (frames - 1) % 4
        nearest = f"{frames} is not 4k + 1; the nearest are {lower} and {lower + 4}"
        violations.append(FieldViolation("clip.frames", nearest))
    fps = _number("clip.fps", arguments.get("fps"), violations)
    if fps is not None and fps <= 0:
        violations.append(FieldViolation("clip.fps", f"{fps} is not above 0"))
    steps = _integer("clip.steps", arguments.get("steps"), 1, _MAX_INT32, violations)
    run_steps = _integer("clip.run_steps", arguments.get("run_steps"), 2, _MAX_INT32, violations)
    if run_steps is not None:
        if steps is not None and run_steps > steps:
            more = f"{run_steps} is more than the {steps} steps; leave it out to run all of them"
            violations.append(FieldViolation("clip.run_steps", more))
        if arguments.get("tokenization") == "cat":
            violations.append(FieldViolation("clip.run_steps", "cannot go with tokenization 'cat'; give one of them"))
    numbers = {
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "run_steps": run_steps,
        "guidance_scale": _number("clip.guidance_scale", arguments.get("guidance"), violations),
        "shift": _number("clip.shift", arguments.get("shift"), violations),
        "seed": _integer("clip.seed", arguments.get("seed"), 0, _MAX_SEED, violations),
    }
    _assign(clip, numbers)


def _set_tokenization(clip: clip_pb2.ClipSpec, arguments: ClipArguments, violations: list[FieldViolation]) -> None:
    name = arguments.get("tokenization")
    keep_ratio = _number("clip.tokenization.keep_ratio", arguments.get("keep_ratio"), violations)
    target = _number("clip.tokenization.target_psnr_db", arguments.get("target_psnr_db"), violations)
    mode = _choice("clip.tokenization.mode", name, _MODES, violations)
    if mode is not None:
        clip.tokenization.mode = mode
    if keep_ratio is not None:
        field = "clip.tokenization.keep_ratio"
        if not 0 < keep_ratio <= 1:
            violations.append(FieldViolation(field, f"{keep_ratio} is out of range; allowed: above 0 and at most 1"))
        if name != "cat":
            violations.append(FieldViolation(field, "is only for tokenization 'cat'"))
        clip.tokenization.keep_ratio = keep_ratio
    if target is not None:
        field = "clip.tokenization.target_psnr_db"
        if target <= 0:
            violations.append(FieldViolation(field, f"{target} is not above 0"))
        if name != "cat":
            violations.append(FieldViolation(field, "is only for tokenization 'cat'"))
        if keep_ratio is not None:
            violations.append(FieldViolation(field, "cannot go with keep_ratio; give one of them"))
        clip.tokenization.target_psnr_db = target


def _previews(previews: object, violations: list[FieldViolation]) -> job_pb2.Previews:
    if not isinstance(previews, Previews):
        example = f"{previews!r} is no Previews, e.g. Previews(every_steps=5, frames=True)"
        violations.append(FieldViolation("previews", example))
        return job_pb2.Previews()
    every_steps = _integer("previews.every_steps", previews.every_steps, 0, _MAX_INT32, violations)
    return job_pb2.Previews(every_steps=every_steps or 0, frames=bool(previews.frames))


def _text(field: str, value: object, violations: list[FieldViolation]) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        violations.append(FieldViolation(field, f"{value!r} is not a string"))
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        violations.append(FieldViolation(field, "holds half of a surrogate pair and cannot be sent as UTF-8"))
        return ""
    return value


def _number(field: str, value: object, violations: list[FieldViolation]) -> float | None:
    if value is None:
        return None
    try:
        # str is excluded: "7" would pass here and fail elsewhere.
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        violations.append(FieldViolation(field, f"{value!r} is not a finite number"))
        return None
    return number


def _integer(field: str, value: object, low: int, high: int, violations: list[FieldViolation]) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        violations.append(FieldViolation(field, f"{value!r} is not a whole number"))
        return None
    if isinstance(value, bool) or not low <= number <= high:
        violations.append(FieldViolation(field, f"{value!r} is out of range; allowed: {low} to {high}"))
        return None
    return number


def _assign(clip: clip_pb2.ClipSpec, values: Mapping[str, float | None]) -> None:
    # A field that is left out must stay unset: 0 is a value, and a wrong one.
    for name, value in values.items():
        if value is not None:
            setattr(clip, name, value)


def _choice(field: str, name: object, choices: dict[str, _T], violations: list[FieldViolation]) -> _T | None:
    if name is None:
        return None
    chosen = choices.get(name) if isinstance(name, str) else None
    if chosen is None:
        violations.append(FieldViolation(field, f"{name!r} is unknown; allowed: {', '.join(choices)}"))
    return chosen
