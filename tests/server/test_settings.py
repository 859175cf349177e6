"""Settings come from flags over environment over a TOML file; what cannot be used is named with its origin."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cinecat.server.commands import serve
from cinecat.server.settings import Settings, SettingsError, load_settings

# A value other than the default for every setting, as a person would type it.
TYPED = {
    "address": "0.0.0.0:50052",
    "metrics_host": "0.0.0.0",
    "metrics_port": "9465",
    "page_keys": "0123456789abcdef=grading",
    "ready_file": "ready.json",
    "model": "Wan-AI/some-model",
    "model_variant": "four-steps.safetensors",
    "replicas": "2",
    "executor": "ray",
    "ray_address": "head.example.net:6379",
    "ray_cpus": "2.5",
    "device": "cuda",
    "default_size": "832x480x81",
    "dtype": "bfloat16",
    "offload": "encoders",
    "storage_dtype": "float8_e4m3fn",
    "shard": "ulysses=4,cfg=2",
    "shard_weights": "fsdp",
    "rank_timeout_seconds": "7.5",
    "threads": "3",
    "style_slots": "4",
    "max_rank": "64",
    "cache_mib": "7",
    "style_cache_mib": "64",
    "engine": "onnxruntime",
    "missing_engine": "refuse",
    "engine_sizes": "832x480x81,1280x720x81",
    "engine_options": "version_compatible,ampere_plus",
    "engine_cache_dir": "engines",
    "engine_cache_gib": "5.5",
    "data_dir": "data",
    "database_url": "postgresql+psycopg://cinecat@db/jobs",
    "artifact_url": "memory://clips",
    "retain_days": "30.5",
    "retain_gib": "500.5",
    "styles_dirs": "styles",
    "max_style_mib": "512",
    "max_queue": "5",
    "scheduling": "fcfs",
    "max_batch": "3",
    "checkpoint_steps": "4",
    "checkpoint_seconds": "7.5",
    "max_tokens": "2000",
    "max_steps": "50",
    "max_image_mib": "8",
    "max_image_megapixels": "12",
    "grace_seconds": "1.5",
    "drain_seconds": "2.5",
    "profile_dir": "profiles",
    "trace_endpoint": "http://127.0.0.1:4318/v1/traces",
    "log_format": "json",
    "log_level": "debug",
    "models": '{"other": {"model": "/models/other", "replicas": "3", "device": "cpu"}}',
}
LISTS = ("styles_dirs", "engine_sizes", "engine_options", "page_keys", "models")
PRINTED = {name: value for name, value in TYPED.items() if name not in LISTS}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "cinecat.toml"
    path.write_text('max_steps = 11\nmax_queue = 11\nmax_rank = 11\nstyles_dirs = ["/a", "/b"]\n')
    return path


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CINECAT_")]:
        monkeypatch.delenv(name)


def refusal(
    flags: dict[str, object] | None = None, environment: dict[str, str] | None = None, file: Path | None = None
) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(flags or {}, environment or {}, file)
    return f"{refused.value}"


def test_flags_win_over_environment_and_environment_over_the_file(toml: Path) -> None:
    environment = {"CINECAT_MAX_STEPS": "22", "CINECAT_MAX_QUEUE": "22", "HOME": "/nowhere"}
    settings = load_settings({"max_steps": "33"}, environment, toml)
    assert (settings.max_steps, settings.max_queue, settings.max_rank) == (33, 22, 11)


def test_what_nobody_sets_has_its_default() -> None:
    assert load_settings({}, {}) == Settings()


def test_an_unknown_flag_is_named_with_its_near_miss() -> None:
    assert refusal(flags={"max_step": "5"}) == "--max-step: unknown setting; did you mean max_steps?"


def test_an_unknown_variable_is_named_with_its_near_miss() -> None:
    assert refusal(environment={"CINECAT_METRIC_PORT": "5"}) == (
        "CINECAT_METRIC_PORT: unknown setting; did you mean metrics_port?"
    )


def test_an_unknown_key_of_the_file_is_named_with_its_near_miss(tmp_path: Path) -> None:
    file = tmp_path / "cinecat.toml"
    file.write_text("gracesecond = 5")
    assert refusal(file=file) == f"gracesecond in {file}: unknown setting; did you mean grace_seconds?"


def test_an_unknown_key_like_no_other_lists_those_there_are() -> None:
    assert "settings are address, metrics_host" in refusal(flags={"zzz": "5"})


def test_the_variables_of_the_client_are_no_settings() -> None:
    theirs = {"CINECAT_SERVER": "a:1", "CINECAT_TENANT": "grading", "CINECAT_CONFIG": "c.toml"}
    assert load_settings({}, theirs) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", "0"),
        ("max_steps", "many"),
        ("max_tokens", "2147483648"),
        ("metrics_port", "65536"),
        ("grace_seconds", "nan"),
        ("grace_seconds", "inf"),
        ("dtype", "int8"),
        ("address", "50051"),
        ("engine_sizes", "832x480"),
        ("default_size", "832x480"),
        ("engine", "tensor"),
        ("address", "localhost:99999"),
    ],
)
def test_a_bad_value_is_refused_with_its_origin_and_itself(name: str, value: str) -> None:
    message = refusal(environment={f"CINECAT_{name.upper()}": value})
    assert message.startswith(f"CINECAT_{name.upper()}: ")
    assert message.endswith(f"got {value!r}")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "cinecat.toml"
    file.write_text("max_queue = -1")
    message = refusal({"max_steps": "0"}, {"CINECAT_THREADS": "x"}, file)
    assert sorted(line.partition(":")[0] for line in message.splitlines()) == [
        "--max-steps",
        "CINECAT_THREADS",
        f"max_queue in {file}",
    ]


@pytest.mark.parametrize("content", ["max_steps =", "max_steps = 1\nmax_steps = 2", "\x00"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "cinecat.toml"
    file.write_text(content)
    assert refusal(file=file).startswith(f"{file}: cannot be read as TOML")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(file=tmp_path / "no.toml").startswith(f"{tmp_path / 'no.toml'}: cannot be read")


def test_styles_folders_are_split_like_a_search_path(toml: Path) -> None:
    folders = (Path("/a"), Path("/b"))
    assert load_settings({}, {"CINECAT_STYLES_DIRS": "/a::/b:"}).styles_dirs == folders
    assert load_settings({}, {}, toml).styles_dirs == folders
    assert load_settings({}, {}).styles_dirs == ()


@pytest.mark.usefixtures("bare_environment")
def test_every_setting_is_a_flag_of_serve() -> None:
    assert TYPED.keys() == Settings.model_fields.keys()
    app = typer.Typer()
    app.command()(serve)
    flags = [part for name, value in TYPED.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(app, ["--print-config", *flags])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown.pop("styles_dirs") == ["styles"]
    assert shown.pop("engine_options") == ["version_compatible", "ampere_plus"]
    assert shown.pop("page_keys") == ["***=grading"]
    assert shown.pop("engine_sizes") == ["832x480x81", "1280x720x81"]
    assert shown.pop("models") == {"other": {"model": "/models/other", "replicas": "3", "device": "cpu"}}
    assert {name: f"{value}" for name, value in shown.items()} == PRINTED


def test_a_further_model_takes_what_it_does_not_say_from_the_first(tmp_path: Path) -> None:
    file = tmp_path / "cinecat.toml"
    file.write_text(
        'model = "/models/480p"\nmodel_variant = "fast"\nreplicas = 2\ndefault_size = "832x480x81"\nmax_rank = 64\n'
        'device = "cuda:0,cuda:1"\n[models.wan-720p]\nmodel = "/models/720p"\noffload = "encoders"\n'
    )
    served = load_settings({"max_steps": "50"}, {}, file).served
    assert list(served) == ["", "wan-720p"]
    first, other = served.values()
    assert (first.replicas, first.model, first.offload) == (2, "/models/480p", "none")
    assert (other.model, other.offload, other.max_rank, other.max_steps) == ("/models/720p", "encoders", 64, 50)
    assert (other.replicas, other.model_variant, other.default_size) == (1, None, "")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('{"b": {}}', "b.model is missing"),
        ('{"b": {"model": "m", "devce": "cpu"}}', "b.devce is no setting of a model; did you mean device?"),
        ('{"b": {"model": "m", "data_dir": "x"}}', "b.data_dir is no setting of a model; a model's are cache_mib, "),
        ('{"b": {"model": "m", "replicas": 0}}', "b.replicas: Input should be greater than or equal to 1, got 0"),
        ('{"b c": {"model": "m"}}', "'b c' is not 1 to 64 of the characters"),
        ('{"b": ', "is not JSON"),
        ('{"b": 5}', "Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_with_a_further_model_is_told_by_its_name(table: str, problem: str) -> None:
    message = refusal(environment={"CINECAT_MODELS": table})
    assert message.startswith("CINECAT_MODELS: ")
    assert problem in message


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ("cuda:0", "names 1 of the 3 GPUs that 3 replicas take; e.g. cuda:0,cuda:1,cuda:2"),
        ("cuda:4,cuda:5", "names 2 of the 3 GPUs"),
        ("cpu,cuda:1,cuda:2", "is a list of which not each is cuda:N"),
    ],
)
def test_gpus_that_do_not_suffice_for_the_replicas_are_refused(device: str, problem: str) -> None:
    assert problem in refusal({"device": device, "replicas": "3"})
    for enough in ("cpu", "auto", "cuda", "cuda:0,cuda:1,cuda:2", "cuda:0,cuda:0,cuda:0"):
        load_settings({"device": enough, "replicas": "3"}, {})


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"device": "cuda:1"}, "must be auto, cpu or cuda where executor is ray"),
        ({"device": "cuda:0,cuda:1"}, "must be auto, cpu or cuda where executor is ray"),
        ({"shard": "auto"}, "must say how many ranks"),
        ({"ray_address": "ray://head:10001"}, "must be auto or host:port of the cluster's head"),
        ({"ray_address": "head"}, "must be auto or host:port of the cluster's head"),
        ({"ray_cpus": "0"}, "greater than 0"),
        ({"models": '{"b": {"model": "m", "device": "cuda:1"}}'}, "must be auto, cpu or cuda where executor is ray"),
    ],
)
def test_what_a_ray_cluster_cannot_place_is_refused(wrong: dict[str, str], problem: str) -> None:
    assert problem in refusal({"executor": "ray", **wrong})


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:secret-word@h/d",
        "mysql://u:secret-word@h/d",
        "postgresql+psycopg://u:secret-word@h:secret-word/d",
        "secret-word",
    ],
)
def test_a_database_of_another_kind_is_refused_without_its_password(url: str) -> None:
    message = refusal(environment={"CINECAT_DATABASE_URL": url})
    assert message.startswith("CINECAT_DATABASE_URL: ")
    assert "postgresql+psycopg://USER@HOST/DATABASE" in message
    assert "secret-word" not in message


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("url", ["://u:secret-word@h/d", "://u@h/d?password=secret-word&sslpassword=secret-word"])
def test_the_password_of_the_database_is_shown_nowhere(url: str) -> None:
    settings = load_settings({"database_url": f"postgresql+psycopg{url}"}, {})
    assert "secret-word" in settings.database_url
    app = typer.Typer()
    app.command()(serve)
    shown = CliRunner().invoke(app, ["--print-config", "--database-url", settings.database_url])
    assert json.loads(shown.stdout)["database_url"].startswith("postgresql+psycopg://u")
    assert "secret-word" not in f"{shown.output} {settings!r} {settings}"


@pytest.mark.usefixtures("bare_environment")
def test_serve_refuses_bad_settings_with_exit_code_2() -> None:
    app = typer.Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, ["--max-steps", "0"])
    assert result.exit_code == 2
    assert "cinecat serve: --max-steps: " in result.stderr


@pytest.mark.usefixtures("bare_environment")
def test_the_file_of_settings_may_come_from_the_environment(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINECAT_CONFIG", str(toml))
    app = typer.Typer()
    app.command()(serve)
    assert json.loads(CliRunner().invoke(app, ["--print-config"]).stdout)["max_queue"] == 11
