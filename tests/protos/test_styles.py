"""Uploading, removing and warming styles: both clients, and the command line."""

import json
from hashlib import sha256
from pathlib import Path

import grpc
import pytest

from cinecat import Conflict, InvalidRequest, ServerUnavailable
from cinecat.cli.app import run
from cinecat.errors import AlreadyExists
from cinecat.upload import CHUNK_BYTES, StyleUpload
from cinecat.v1 import styles_pb2
from tests.protos.scripted_server import Break, Script, bad_request
from tests.protos.twins import AsyncTwin, SyncTwin, Twin

WEIGHTS = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"
TOML = 'name = "dusk"\nversion = "1.0.0"\nweights = "dusk.safetensors"\npreview = "dusk.png"\n'

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A style folder, as its author keeps it."""
    path = tmp_path / "dusk"
    path.mkdir()
    (path / "style.toml").write_text(TOML)
    (path / "dusk.safetensors").write_bytes(WEIGHTS)
    (path / "dusk.png").write_bytes(b"a picture")
    return path


def sent(script: Script) -> tuple[styles_pb2.StyleUpload, bytes, bytes]:
    """The one upload that arrived: what was said of it, its weights and its preview."""
    (parts,) = script.uploads
    weights = b"".join(part.weights for part in parts)
    return parts[0].upload, weights, b"".join(part.preview for part in parts)


def test_a_folder_is_sent_with_its_toml_and_files(script: Script, twin: Twin, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    installed = twin.call("install_style", folder, on_progress=lambda done, total: told.append((done, total)))
    upload, weights, preview = sent(script)
    assert (upload.toml, weights, preview) == (TOML, WEIGHTS, b"a picture")
    assert (upload.size_bytes, upload.sha256) == (len(WEIGHTS), sha256(WEIGHTS).hexdigest())
    assert told == [(CHUNK_BYTES, len(WEIGHTS)), (len(WEIGHTS), len(WEIGHTS))]
    assert installed.style.name == "from-toml"
    assert installed.notes == ("made for [another] model",)


def test_a_bare_file_is_sent_with_what_is_said_of_it(script: Script, twin: Twin, folder: Path) -> None:
    twin.call(
        "install_style",
        folder / "dusk.safetensors",
        name="dusk",
        trigger_words=["dusk"],
        prompt_template="{prompt}, dusk",
        default_strength=0.5,
        preview=folder / "dusk.png",
        steps=4,
        guidance=1.0,
    )
    upload, weights, preview = sent(script)
    assert (weights, preview) == (WEIGHTS, b"a picture")
    assert upload.fields == styles_pb2.StyleManifest(
        name="dusk",
        trigger_words=["dusk"],
        prompt_template="{prompt}, dusk",
        default_strength=0.5,
        preview="dusk.png",
        sampler=styles_pb2.SamplerDefaults(steps=4, guidance_scale=1.0),
    )


@pytest.mark.parametrize(
    ("toml", "field", "said"),
    [
        (TOML.replace("dusk.safetensors", "../secret.safetensors"), "weights", "is not the name of a file in"),
        (TOML.replace("dusk.png", "/etc/passwd"), "preview", "is not the name of a file in"),
        (TOML.replace("dusk.png", "link.png"), "preview", "is not the name of a file in"),
        (TOML.replace("dusk.png", "none.png"), "preview", "there is no file 'none.png'"),
        (TOML.replace('"dusk.png"', "7"), "preview", "is not the name of a file in"),
        (TOML.replace("dusk.png", "loop.png"), "preview", "is not the name of a file in"),
        (TOML.replace("dusk.png", "a\\u0000.png"), "preview", "is not the name of a file in"),
        ('name = "dusk"', "weights", "is missing"),
        ("name = ", "path", "is not valid TOML"),
    ],
)
def test_nothing_outside_the_folder_is_ever_sent(
    script: Script, twin: Twin, folder: Path, toml: str, field: str, said: str
) -> None:
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    (folder / "link.png").symlink_to(folder.parent / "secret.safetensors")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "style.toml").write_text(toml)
    with pytest.raises(InvalidRequest, match=said) as refused:
        twin.call("install_style", folder)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert script.uploads == []


@pytest.mark.parametrize(
    ("name", "arguments", "fields"),
    [
        ("dusk.safetensors", {}, ["name"]),
        ("dusk.png", {"name": "dusk"}, ["path"]),
        ("none.safetensors", {"name": "dusk", "preview": "none.png"}, ["path", "preview"]),
        (".", {"name": "dusk"}, ["path"]),
        ("dusk.safetensors", {"name": "dusk", "steps": "four"}, ["steps"]),
        ("dusk.safetensors", {"name": "dusk", "default_strength": "much"}, ["default_strength"]),
        ("dusk.safetensors", {"name": "dusk", "trigger_words": "dusk light"}, ["trigger_words"]),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(
    folder: Path, name: str, arguments: dict[str, object], fields: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        StyleUpload(folder / name, **arguments)  # type: ignore[arg-type]
    assert [violation.field for violation in refused.value.violations] == fields


def test_a_file_that_vanishes_while_it_is_sent_is_the_error(twin: Twin, folder: Path) -> None:
    def vanish(done: int, total: int) -> None:
        raise FileNotFoundError("dusk.safetensors")

    with pytest.raises(FileNotFoundError, match="dusk"):
        twin.call("install_style", folder, on_progress=vanish)


@pytest.mark.parametrize(
    ("code", "kind"), [(grpc.StatusCode.ABORTED, Conflict), (grpc.StatusCode.ALREADY_EXISTS, AlreadyExists)]
)
def test_the_servers_refusals_have_their_types(
    script: Script, twin: Twin, folder: Path, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    script.early_break = bad_request(code, ("upload.toml", "dusk 1.0.0 exists"))
    with pytest.raises(kind, match=r"dusk 1\.0\.0 exists"):
        twin.call("install_style", folder)


def test_an_upload_is_not_repeated_by_itself(script: Script, twin: Twin, folder: Path) -> None:
    script.unary_breaks.append(Break())
    with pytest.raises(Exception, match="scripted break"):
        twin.call("install_style", folder)
    assert script.uploads == []


def test_styles_are_removed_and_warmed(script: Script, twin: Twin) -> None:
    assert twin.call("remove_style", "noir", "1.0").jobs == 2
    assert twin.call("warm_style", "noir").resident
    assert script.requests(styles_pb2.RemoveStyleRequest) == [styles_pb2.RemoveStyleRequest(name="noir", version="1.0")]


@pytest.fixture
def _server_in_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINECAT_SERVER", address)


@pytest.mark.usefixtures("_server_in_environment")
def test_the_command_line_installs_a_file(script: Script, folder: Path, capsys: Captured) -> None:
    arguments = ["styles", "install", str(folder / "dusk.safetensors"), "--name", "dusk", "--trigger-word", "a"]
    assert run([*arguments, "--trigger-word", "b", "--strength", "0.7", "--shift", "3"]) == 0
    upload, weights, _ = sent(script)
    assert (list(upload.fields.trigger_words), upload.fields.default_strength) == (["a", "b"], 0.7)
    assert upload.fields.sampler.shift == 3.0
    assert weights == WEIGHTS
    printed = capsys.readouterr()
    assert printed.out == "dusk@1.0: installed, rank 0, 0 bytes\n"
    assert printed.err.splitlines() == ["made for [another] model", "ignored: img_emb: not a layer", "ignored: 1 more"]


@pytest.mark.usefixtures("_server_in_environment")
def test_the_command_line_installs_a_folder_as_one_json_object(folder: Path, capsys: Captured) -> None:
    assert run(["styles", "install", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["unchanged"], printed["style"]["name"]) == (False, "from-toml")


@pytest.mark.usefixtures("_server_in_environment")
def test_a_refused_upload_exits_2_and_names_the_field(script: Script, folder: Path, capsys: Captured) -> None:
    script.unary_breaks.append(bad_request(grpc.StatusCode.INVALID_ARGUMENT, ("weights", "it is truncated")))
    assert run(["styles", "install", str(folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["violations"] == [
        {"field": "weights", "description": "it is truncated"}
    ]


@pytest.mark.usefixtures("_server_in_environment")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["remove", "noir@1.0"], "noir@1.0: removed; 2 jobs finish with it\n"),
        (["warm", "noir"], "noir@1.0: in slot 3\n"),
    ],
)
def test_people_read_what_was_done(arguments: list[str], said: str, capsys: Captured) -> None:
    assert run(["styles", *arguments]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("_server_in_environment")
@pytest.mark.parametrize("option", [["--server", "127.0.0.1:1"], ["--json"]])
def test_an_option_before_the_command_is_not_ignored(option: list[str], capsys: Captured) -> None:
    assert run(["styles", *option, "remove", "noir@1.0"]) == 2
    assert f"{option[0]} goes behind the command: cinecat styles remove" in "".join(capsys.readouterr())


@pytest.mark.usefixtures("_server_in_environment")
def test_a_name_that_is_no_text_is_a_usage_error(capsys: Captured) -> None:
    assert run(["styles", "warm", "noir\udcff"]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_a_toml_with_a_byte_order_mark_is_sent_without_it(script: Script, twin: Twin, folder: Path) -> None:
    (folder / "style.toml").write_text(TOML, encoding="utf-8-sig")
    twin.call("install_style", folder)
    assert sent(script)[0].toml == TOML


@pytest.mark.usefixtures("_server_in_environment")
def test_a_preview_is_saved_and_not_printed(script: Script, tmp_path: Path, capsys: Captured) -> None:
    assert run(["styles", "show", "noir", "--preview", str(tmp_path / "rain.png"), "--json"]) == 0
    assert (tmp_path / "rain.png").read_bytes() == b"a picture"
    assert json.loads(capsys.readouterr().out)["preview"]["file_name"] == "rain.png"
    assert script.requests(styles_pb2.GetStyleRequest)[0].with_preview


@pytest.mark.parametrize("kind", [SyncTwin, AsyncTwin])
def test_without_a_server_an_upload_gives_up_soon(kind: type[SyncTwin | AsyncTwin], folder: Path) -> None:
    with pytest.raises(ServerUnavailable) as raised:
        kind("127.0.0.1:9").call("install_style", folder)
    assert not raised.value.connected
