"""The command line, as a person and a script meet it."""

import json
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import grpc
import pytest

from cinecat.cli import extensions
from cinecat.cli.app import run
from cinecat.v1 import clip_pb2, generation_pb2, job_pb2
from tests.protos.scripted_server import (
    FRAMES,
    MP4,
    Break,
    Hold,
    Script,
    bad_request,
    cancelled,
    chunk,
    denoising,
    failed,
    job,
    picture,
    succeeded,
    with_preview,
)

WHOLE = [chunk(0, len(MP4))]
MAIN = [sys.executable, "-c", "from cinecat.cli import main; main()"]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _server_in_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINECAT_SERVER", request.getfixturevalue("address"))


def test_generate_prints_one_json_object(script: Script, shot: Path, tmp_path: Path, capsys: Captured) -> None:
    script.generate.append([denoising(1), succeeded(2)])
    script.download.append(WHOLE)
    output = tmp_path / "out.mp4"
    assert run(["generate", str(shot), "--prompt", "a cat", "-o", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = {
        "job_id": "job-1",
        "status": "succeeded",
        "output": str(output),
        "frames": 5,
        "width": 64,
        "height": 48,
        "fps": 8.0,
        "seed": 7,
        "style": "noir:0.8+amber:0.5",
        "tokenization": "uniform",
        "tokens_used": 12,
        "tokens_uniform": 24,
        "step_tokens": [24, 8, 8, 8],
        "keep_ratio": 0.5,
        "engine": "torch",
        "timings": {"denoise": 1.5, "text_encode": 0.001},
    }
    assert {name: printed[name] for name in expected} == expected
    assert output.read_bytes() == MP4


def test_every_option_reaches_the_request(script: Script, shot: Path, tmp_path: Path) -> None:
    script.generate.append([succeeded(1)])
    script.download.append(WHOLE)
    options = (
        "--style noir:0.8 --style amber --size 64x48 --frames 5 --steps 4 --guidance 5 --seed 7 --fps 8 --fit pad "
        "--negative-prompt blur --model wan-tiny --tokenization cat --keep-ratio 0.5"
    )
    assert run(["generate", str(shot), "--prompt", "a cat", "-o", str(tmp_path / "o.mp4"), *options.split()]) == 0
    (request,) = script.requests(generation_pb2.GenerateRequest)
    assert request.clip == clip_pb2.ClipSpec(
        model="wan-tiny",
        image=shot.read_bytes(),
        fit=clip_pb2.FIT_PAD,
        prompt="a cat",
        negative_prompt="blur",
        styles=[clip_pb2.StyleRef(name="noir", strength=0.8), clip_pb2.StyleRef(name="amber")],
        width=64,
        height=48,
        frames=5,
        fps=8,
        steps=4,
        guidance_scale=5,
        seed=7,
        tokenization=clip_pb2.Tokenization(mode=clip_pb2.Tokenization.CAT, keep_ratio=0.5),
    )


def test_a_quality_to_hold_reaches_the_request(script: Script, shot: Path, tmp_path: Path, capsys: Captured) -> None:
    script.generate.append([succeeded(1)])
    script.download.append(WHOLE)
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4")]
    assert run([*arguments, "--tokenization", "cat", "--target-psnr", "38"]) == 0
    (request,) = script.requests(generation_pb2.GenerateRequest)
    assert request.clip.tokenization == clip_pb2.Tokenization(mode="CAT", target_psnr_db=38)
    assert "(lossy) 12/24 tokens" in capsys.readouterr().out


def test_how_many_steps_run_reaches_the_request_and_is_told(
    script: Script, shot: Path, tmp_path: Path, capsys: Captured
) -> None:
    done = succeeded(1)
    done.job.clip.steps, done.job.result.run_steps = 4, 2
    script.generate.append([done])
    script.download.append(WHOLE)
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4")]
    assert run([*arguments, "--steps", "4", "--run-steps", "2"]) == 0
    (request,) = script.requests(generation_pb2.GenerateRequest)
    assert (request.clip.steps, request.clip.run_steps) == (4, 2)
    assert "2 of 4 steps run" in capsys.readouterr().out


def test_the_frames_are_saved_too(script: Script, shot: Path, tmp_path: Path, capsys: Captured) -> None:
    script.generate.append([succeeded(1)])
    script.download.extend([WHOLE, [chunk(0, len(FRAMES), FRAMES)]])
    frames = tmp_path / "frames.safetensors"
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--frames-f32", str(frames)]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames_f32"] == str(frames)
    assert frames.read_bytes() == FRAMES


def test_without_a_terminal_progress_is_plain_lines_on_stderr(
    script: Script, shot: Path, tmp_path: Path, capsys: Captured
) -> None:
    script.generate.append([denoising(1), denoising(2, step=2), succeeded(3)])
    script.download.append(WHOLE)
    assert run(["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4")]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "job job-1: denoising (step 1/4, ETA 0:02)",
        "job job-1: succeeded",
        "image: cropped",
    ]
    assert "5 frames 64x48" in printed.out


def test_on_a_terminal_a_bar_moves_on_stderr_and_stdout_stays_clean(script: Script, shot: Path, tmp_path: Path) -> None:
    script.generate.append([denoising(1), succeeded(2)])
    script.download.append(WHOLE)
    reader, writer = pty.openpty()
    command = [*MAIN, "generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--json"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, env=environment, check=True)
    os.close(writer)
    assert "\x1b[" in os.read(reader, 65536).decode()
    os.close(reader)
    assert json.loads(done.stdout)["status"] == "succeeded"


def test_a_clip_in_the_making_is_shown_in_a_folder(script: Script, shot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "seen"
    script.generate.append(
        [
            with_preview(denoising(1, 1), 1, 0, 4),
            with_preview(denoising(2, 2), 2, 0, 4),
            with_preview(denoising(3, 4), 0, 0),
            with_preview(denoising(4, 4), 0, 1, 2, 3, 4),
            succeeded(5),
        ]
    )
    script.download.append(WHOLE)
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--previews", str(folder)]
    assert run(arguments) == 0
    (request,) = script.requests(generation_pb2.GenerateRequest)
    assert request.previews == job_pb2.Previews(every_steps=1, frames=True)
    estimates = {f"estimate-{index:04d}.webp": picture(2, index) for index in (0, 4)}
    frames = {f"frame-{index:04d}.webp": picture(0, index) for index in range(5)}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == estimates | frames


def test_pictures_of_an_earlier_clip_go_and_nothing_else(script: Script, shot: Path, tmp_path: Path) -> None:
    mine = ("frame-1.webp", "estimate-0000.png", "my-frame-0000.webp")
    for name in (*mine, "frame-0080.webp", "estimate-0016.webp", "frame-0004.webp.part"):
        (tmp_path / name).write_bytes(b"old")
    script.generate.append([with_preview(denoising(1), 1, 0), succeeded(2)])
    script.download.append(WHOLE)
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--previews", str(tmp_path)]
    assert run([*arguments, "--preview-every", "3"]) == 0
    (request,) = script.requests(generation_pb2.GenerateRequest)
    assert request.previews.every_steps == 3
    assert {path.name for path in tmp_path.glob("*-*")} == {*mine, "estimate-0000.webp"}


def test_a_folder_that_cannot_be_is_told_before_any_work(
    script: Script, shot: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--previews", str(shot)]
    assert run(arguments) == 1
    assert "shot.png" in capsys.readouterr().err
    assert script.asked == []


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ([], job_pb2.PRIORITY_UNSPECIFIED),
        (["--priority", "batch"], job_pb2.PRIORITY_BATCH),
        (["--priority", "interactive"], job_pb2.PRIORITY_INTERACTIVE),
    ],
)
def test_the_priority_reaches_the_request(script: Script, shot: Path, options: list[str], number: int) -> None:
    assert run(["generate", str(shot), "-p", "a cat", "--detach", *options]) == 0
    (request,) = script.requests(generation_pb2.SubmitRequest)
    assert request.priority == number
    assert not request.HasField("previews")


def test_an_unknown_priority_exits_2(shot: Path, capsys: Captured) -> None:
    assert run(["generate", str(shot), "-p", "a cat", "--detach", "--priority", "high"]) == 2
    assert "interactive, batch" in capsys.readouterr().err


def test_jobs_tell_their_priority(script: Script, capsys: Captured) -> None:
    script.finished_job.priority = job_pb2.PRIORITY_BATCH
    assert run(["jobs"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert first[header.index("PRIORITY") :].startswith("batch ")
    assert run(["jobs", "show", "job-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["priority"] == "batch"


@pytest.mark.parametrize(
    "command", ["jobs", "jobs show job-1", "jobs cancel job-1", "styles", "styles warm x", "models"]
)
def test_commands_are_run_for_the_tenant(script: Script, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert run([*command.split(), "--tenant", "grading"]) == 0
    monkeypatch.setenv("CINECAT_TENANT", "editing")
    assert run(command.split()) == 0
    assert set(script.tenants) == {"grading", "editing"}


def test_a_name_that_is_no_tenants_exits_2(script: Script, capsys: Captured) -> None:
    assert run(["models", "--tenant", "two words"]) == 2
    assert "tenant: 'two words' is not 1 to 64" in capsys.readouterr().err
    assert script.asked == []


def test_detach_prints_the_job_id(script: Script, shot: Path, capsys: Captured) -> None:
    assert run(["generate", str(shot), "-p", "a cat", "--detach"]) == 0
    assert capsys.readouterr().out == "job-1\n"
    assert len(script.requests(generation_pb2.SubmitRequest)) == 1


def test_a_failed_job_exits_1_and_its_message_is_not_markup(
    script: Script, shot: Path, tmp_path: Path, capsys: Captured
) -> None:
    script.generate.append([failed(1)])
    assert run(["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4")]) == 1
    assert capsys.readouterr().err == "cinecat: out of [memory]\n"


def test_a_failed_job_is_one_json_object(script: Script, shot: Path, tmp_path: Path, capsys: Captured) -> None:
    script.generate.append([failed(1)])
    assert run(["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "status": "failed",
        "job_id": "job-1",
        "error": {"code": "RESOURCE_EXHAUSTED", "message": "out of [memory]", "violations": []},
    }


def test_a_cancelled_job_exits_4(script: Script, shot: Path, tmp_path: Path, capsys: Captured) -> None:
    script.generate.append([cancelled(1)])
    assert run(["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["status"] == "cancelled"


def test_a_request_that_the_server_refuses_exits_2_with_its_fields(
    script: Script, shot: Path, tmp_path: Path, capsys: Captured
) -> None:
    script.generate.append([bad_request(grpc.StatusCode.NOT_FOUND, ("clip.styles[0].name", "no style 'nori'"))])
    arguments = ["generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--style", "nori", "--json"]
    assert run(arguments) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "error"
    assert printed["error"]["violations"] == [{"field": "clip.styles[0].name", "description": "no style 'nori'"}]


def test_a_request_that_the_client_refuses_exits_2_and_names_every_field(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["generate", str(tmp_path / "missing.png"), "-p", "a cat", "-o", str(tmp_path / "o.mp4"), "--seed=-1"]
    assert run(arguments) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()[1:]] == ["  clip.image", "  clip.seed"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["genrate"], "Did you mean 'generate'"),
        (["generate", "shot.png", "-p", "x", "--step", "4"], "--steps"),
        (["generate", "shot.png", "-p", "x"], "-o FILE"),
        (["generate", "shot.png", "-p", "x", "--detach", "-o", "o.mp4"], "cinecat jobs download"),
        (["generate", "shot.png", "-p", "x", "--steps", "four"], "--steps"),
        (["generate", "shot.png", "-p", "x", "-o", "o.mp4", "--preview-every", "2"], "--previews DIR"),
        (["generate", "shot.png", "-p", "x", "--detach", "--previews", "d"], "--previews DIR"),
    ],
)
def test_wrong_usage_exits_2_with_a_hint(arguments: list[str], hint: str, capsys: Captured) -> None:
    assert run(arguments) == 2
    assert hint in capsys.readouterr().err
    assert run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["status"] == "error"


def test_no_server_exits_3_and_says_how_to_start_one(capsys: Captured) -> None:
    assert run(["styles", "--server", "127.0.0.1:9"]) == 3
    assert capsys.readouterr().err == "cinecat: no server at 127.0.0.1:9; start one with: cinecat serve\n"


def test_a_server_that_is_unavailable_for_its_own_reasons_says_them(script: Script, capsys: Captured) -> None:
    script.unary_breaks.extend([Break(details="draining")] * 4)
    assert run(["models"]) == 3
    assert capsys.readouterr().err == "cinecat: draining\n"


def test_ctrl_c_cancels_the_job_and_says_so(script: Script, shot: Path, tmp_path: Path) -> None:
    script.generate.append([denoising(1), Hold()])
    command = [*MAIN, "generate", str(shot), "-p", "a cat", "-o", str(tmp_path / "o.mp4")]
    # Whoever runs the tests in the background has them ignore SIGINT, and a child inherits that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        assert "denoising" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert said == "cinecat: interrupted; job job-1 cancelled\n"
    assert process.returncode == 130
    assert [request.job_id for request in script.requests(generation_pb2.CancelJobRequest)] == ["job-1"]


def test_styles_are_listed_with_the_servers_strings_as_they_are(capsys: Captured) -> None:
    assert run(["styles"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split() == [
        "amber",
        "1.0",
        "0.8",
        "[red]hot\N{REPLACEMENT CHARACTER}[2J",
        "installed",
    ]
    assert printed.err == "broken: no style.toml\n"


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["styles", "show", "noir"], "trigger_words", ["rain"]),
        (["styles", "show", "noir"], "sampler", {"steps": 4}),
        (["styles", "show", "noir"], "resident", False),
        (["styles", "remove", "noir@1.0"], "jobs", 2),
        (["styles", "warm", "noir"], "slots", [3]),
        (["jobs", "show", "job-1"], "status", "succeeded"),
        (["jobs", "cancel", "job-1"], "status", "denoising"),
    ],
)
def test_one_thing_is_one_json_object(arguments: list[str], name: str, value: object, capsys: Captured) -> None:
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[name] == value


@pytest.mark.parametrize(
    ("arguments", "name", "count"),
    [
        (["styles"], "styles", 2),
        (["styles", "list"], "styles", 2),
        (["jobs"], "jobs", 2),
        (["jobs", "--limit", "1"], "jobs", 1),
        (["models"], "models", 1),
    ],
)
def test_lists_are_one_json_object(arguments: list[str], name: str, count: int, capsys: Captured) -> None:
    assert run([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[name]) == count


@pytest.mark.parametrize(
    "arguments",
    [["styles", "show", "noir"], ["jobs"], ["jobs", "show", "job-1"], ["jobs", "cancel", "job-1"], ["models"]],
)
def test_people_get_text(arguments: list[str], capsys: Captured) -> None:
    assert run(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_jobs_can_be_filtered_by_state(script: Script) -> None:
    assert run(["jobs", "--state", "queued"]) == 0
    assert list(script.requests(generation_pb2.ListJobsRequest)[0].states) == [job_pb2.JOB_STATE_QUEUED]


def test_jobs_can_be_filtered_by_time_and_style(script: Script) -> None:
    assert run(["jobs", "--since", "2026-11-25", "--until", "2026-11-25T18:30", "--style", "noir"]) == 0
    request = script.requests(generation_pb2.ListJobsRequest)[0]
    span = request.created_before.ToMicroseconds() - request.created_after.ToMicroseconds()
    assert (span, request.style) == (18.5 * 3600e6, "noir")


def test_a_time_that_is_none_is_refused(capsys: Captured) -> None:
    assert run(["jobs", "--since", "yesterday"]) == 2
    assert "--since" in capsys.readouterr().err


def test_watching_ends_with_the_clip(script: Script, capsys: Captured) -> None:
    script.watch.append([denoising(1), succeeded(2)])
    assert run(["jobs", "watch", "job-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7


def test_a_clip_is_downloaded(script: Script, tmp_path: Path, capsys: Captured) -> None:
    script.download.append(WHOLE)
    assert run(["jobs", "download", "job-1", "-o", str(tmp_path / "o.mp4"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == len(MP4)
    assert (tmp_path / "o.mp4").read_bytes() == MP4


def test_an_unfinished_job_cannot_be_downloaded(script: Script, tmp_path: Path, capsys: Captured) -> None:
    script.finished_job = job(job_pb2.JOB_STATE_QUEUED)
    assert run(["jobs", "download", "job-1", "-o", str(tmp_path / "o.mp4")]) == 1
    assert "is queued" in capsys.readouterr().err


def test_the_version_is_printed(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cinecat 0.")


def test_no_command_prints_the_help(capsys: Captured) -> None:
    assert run([]) == 0
    assert "generate" in capsys.readouterr().out


def test_without_its_extra_main_says_what_to_install() -> None:
    command = [sys.executable, "-c", "import sys; sys.modules['typer'] = None; from cinecat.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "cinecat's command line needs an extra: pip install 'cinecat[cli]'\n"


def test_server_commands_are_listed_without_being_imported() -> None:
    code = "import sys; from cinecat.cli.app import run; run(['--help']); print('cinecat.server' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("  serve ", "  bench "))] == ["bench", "serve"]
    assert lines[-1] == "False"


@pytest.fixture
def _extra_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {
        "function": "tests.protos.extra_commands:function",
        "group": "tests.protos.extra_commands:app",
        "serve": "a_module_that_is_not_installed:app",
    }
    commands = {name: EntryPoint(name, target, extensions.GROUP) for name, target in targets.items()}
    monkeypatch.setattr(extensions, "installed", lambda: commands)


@pytest.mark.usefixtures("_extra_commands")
@pytest.mark.parametrize(
    ("arguments", "printed"),
    [(["function", "--count", "3"], "function 3\n"), (["group", "first", "x"], "first x\n")],
)
def test_a_command_may_be_a_function_or_a_typer(arguments: list[str], printed: str, capsys: Captured) -> None:
    assert run(arguments) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.usefixtures("_extra_commands")
def test_errors_of_such_a_command_are_reported_like_all_others(capsys: Captured) -> None:
    assert run(["group", "second"]) == 1
    assert capsys.readouterr().err == "cinecat: nothing here\n"
    assert run(["function", "--count", "three"]) == 2
    assert "cinecat function --help" in capsys.readouterr().err


@pytest.mark.usefixtures("_extra_commands")
def test_a_command_whose_extra_is_missing_says_which(capsys: Captured) -> None:
    assert run(["serve", "--port", "1"]) == 2
    assert capsys.readouterr().err.startswith("cinecat serve needs an extra: pip install 'cinecat[serve]'")
