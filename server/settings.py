"""The server's settings: one typed model, filled from flags over environment over a TOML file."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_serializer, field_validator

from cinecat.engines.backends.store_folder import DEFAULT_MAX_GIB, default_engine_folder
from cinecat.engines.sharding.layout import parse_layout
from cinecat.server.cards import ANY_CARD, device_names
from cinecat.server.database import check_url, masked

ENVIRONMENT_PREFIX = "CINECAT_"

# Read by the client and by the command line, so no settings of the server.
_OTHER_VARIABLES = frozenset({"CINECAT_SERVER", "CINECAT_TENANT", "CINECAT_CONFIG"})

# Set by Kubernetes in every pod beside a Service named cinecat.
_SERVICE_LINKS = re.compile(r"CINECAT_(PORT|SERVICE)(_.*)?")


# In errors: the first may hold passwords, the last says itself what is wrong.
_NOT_SHOWN = frozenset({"database_url", "page_keys", "trace_endpoint", "models"})

NOT_INHERITED = frozenset({"model", "model_variant", "replicas", "default_size"})
"""Settings of the first model alone."""

PER_MODEL = NOT_INHERITED | {
    *("device", "dtype", "offload", "storage_dtype", "threads", "style_slots", "max_rank", "cache_mib"),
    *("style_cache_mib", "engine", "missing_engine", "engine_sizes", "engine_options", "max_batch", "max_tokens"),
    *("max_steps", "shard", "shard_weights", "rank_timeout_seconds", "ray_cpus"),
}
"""Settings that a further model may have of its own; what it does not give is as for the first model."""

MODEL_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")

_GPU = re.compile(r"cuda:\d{1,3}")

TENANT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

_PAGE_KEY = re.compile(r"[A-Za-z0-9._~-]{16,128}")


class SettingsError(ValueError):
    """Settings that cannot be used; the message has one line for each problem."""


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cinecat"


def clip_size(word: str) -> tuple[int, int, int]:
    """Width, height and frames of a word such as "832x480x81". Raises ValueError for another."""
    parts = word.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and part.isascii() and len(part) < 6 for part in parts):
        raise ValueError(f"{word!r} is not WIDTHxHEIGHTxFRAMES, e.g. 832x480x81")
    width, height, frames = map(int, parts)
    return width, height, frames


def page_key(word: str) -> tuple[str, str]:
    """Key and tenant of a word such as "2x9T...=grading". Raises ValueError for another, and shows nothing of it."""
    key, separator, tenant = word.partition("=")
    if not separator or not _PAGE_KEY.fullmatch(key):
        raise ValueError("one is not KEY=TENANT with a key of 16 to 128 of the characters A-Z a-z 0-9 . _ ~ -")
    if tenant and not TENANT_NAME.fullmatch(tenant):
        raise ValueError("a tenant is 1 to 64 of the characters A-Z a-z 0-9 . _ -, or empty for callers that name none")
    return key, tenant


Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """What an operator may decide. `cinecat serve --print-config` shows the values in force."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    address: str = Field("127.0.0.1:50051", description="host:port of the gRPC services; port 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", description="host of the Prometheus endpoint and the status page")
    metrics_port: Port = Field(9464, description="port of the Prometheus endpoint; 0 picks a free one")
    page_keys: tuple[str, ...] = Field(
        (),
        repr=False,
        description="KEY=TENANT of those who may use the status page, ',' between them; none draws a key at the start "
        "where metrics_host is this machine alone, and logs the link",
    )
    ready_file: Path | None = Field(None, description="file to write {address, metrics_port} to once ready")

    model: str = Field("wan-tiny", description="wan-tiny, a folder in the diffusers layout, or a hub id")
    model_variant: Path | None = Field(
        None, description="file whose changes are fused into the model at its start, such as a step-distill LoRA"
    )
    replicas: int = Field(
        1, ge=1, le=256, description="engine cores that serve the model side by side, each with weights of its own"
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="where engine cores run: on this machine, or placed on the nodes of a Ray cluster"
    )
    ray_address: str = Field(
        "auto", description="host:port of the head of the Ray cluster that this machine is a node of; auto finds it"
    )
    ray_cpus: float = Field(
        1.0,
        gt=0,
        le=1024,
        description="CPUs of a node that a replica takes up on a Ray cluster, beside its GPU; also its threads where "
        "threads is 0",
    )
    device: str = Field(
        "auto",
        description="auto, cpu, cuda or cuda:N, or several GPUs, as in cuda:0,cuda:1, for as many replicas; with auto "
        "or cuda every replica takes a GPU that no other one is on",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of transformer and text encoder"
    )
    offload: Literal["none", "encoders", "blocks"] = Field(
        "none",
        description="what waits in the host's memory while it does not work: text and image encoder, or with blocks "
        "the transformer's blocks too, each copied to the device for every forward; blocks is for the engine torch",
    )
    storage_dtype: Literal["none", "float8_e4m3fn"] = Field(
        "none", description="of the blocks' matrices while they do not work; lossy, and for the engine torch"
    )
    shard: str = Field(
        "none",
        description="how GPUs, or processes of a CPU, share a replica's work: ulysses=N, ring=N and cfg=2 with ',' "
        "between them, whose product is their number; none is one; auto chooses by the GPUs and the size of clips",
    )
    shard_weights: Literal["none", "fsdp"] = Field(
        "none",
        description="of the blocks: whole on every rank, or with fsdp spread over the ulysses x ring ranks, for models "
        "that do not fit one card",
    )
    rank_timeout_seconds: float = Field(
        60.0,
        ge=1,
        le=3600,
        description="without a sign of life, after which a rank is taken for dead and its replica starts anew",
    )
    default_size: str = Field(
        "", description="WIDTHxHEIGHTxFRAMES of a clip that asks for no size; empty is the model's own"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine core; 0 leaves it to torch")
    style_slots: int = Field(8, ge=1, le=1024, description="styles resident at once")
    max_rank: int = Field(32, ge=1, le=512, description="LoRA rank of a slot, summed over styles worn together")
    cache_mib: int = Field(1024, ge=0, description="memory for encoded prompts, images and conditions")
    style_cache_mib: int = Field(
        2048,
        ge=0,
        description="memory for styles as they were read; one that has no slot then gets it by a copy",
    )

    engine: Literal["auto", "torch", "inductor", "onnxruntime", "tensorrt", "torch_tensorrt"] = Field(
        "auto",
        description="backend that runs the denoiser; auto is the preferred one of those that are built, else torch",
    )
    missing_engine: Literal["auto", "refuse", "torch"] = Field(
        "auto",
        description="where the engine is not built: refuse and name the command that builds it, or serve from torch "
        "and build it meanwhile; auto is torch where memory for the weights twice is free",
    )
    engine_sizes: tuple[str, ...] = Field(
        (), description="WIDTHxHEIGHTxFRAMES of clips that engines of fixed shapes are built for, ',' between them"
    )
    engine_options: tuple[str, ...] = Field(
        (),
        description="of tensorrt, ',' between them: version_compatible, and same_compute_capability or ampere_plus for "
        "engines that run on other GPUs too",
    )
    engine_cache_dir: Path = Field(default_factory=default_engine_folder, description="built engines")
    engine_cache_gib: float = Field(DEFAULT_MAX_GIB, gt=0, le=1_000_000, description="of all of them at most")

    data_dir: Path = Field(default_factory=_state_folder, description="job database, inputs and uploaded styles")
    database_url: str = Field(
        "",
        repr=False,
        description="postgresql+psycopg://USER:PASSWORD@HOST/DATABASE for the job database; empty is a SQLite file in "
        "data_dir",
    )
    artifact_url: str = Field("", description="fsspec URL for finished clips; empty puts them into data_dir")
    retain_days: float = Field(
        0.0,
        ge=0,
        le=36_500,
        description="how long a job that has ended is kept, with its files; 0 keeps it for ever, and is the default "
        "because nobody gets back what a server deletes unasked",
    )
    retain_gib: float = Field(
        0.0,
        ge=0,
        le=1_000_000_000,
        description="of all finished clips at most: the oldest go first, none within ten minutes of its end; 0 is no "
        "limit",
    )
    styles_dirs: tuple[Path, ...] = Field((), description="folders of styles beside the bundled ones, ':' between them")

    max_style_mib: int = Field(2048, ge=1, le=1_048_576, description="size of an uploaded style's weights file")

    max_queue: int = Field(1000, ge=1, description="jobs that may wait")
    scheduling: Literal["steps", "fcfs"] = Field(
        "steps",
        description="who is next: decided anew before every step, or whole clips one at a time in the order of their "
        "arrival, as a baseline to measure against",
    )
    max_batch: int = Field(
        8,
        ge=1,
        le=256,
        description="clips that may share a forward, where that was measured to be quicker; with 1 no clip's last bits "
        "depend on what else is running",
    )
    checkpoint_steps: int = Field(8, ge=1, description="a running clip is saved after so many denoising steps")
    checkpoint_seconds: float = Field(
        10.0, ge=0, le=86_400, description="or after so many seconds of them, where that is sooner"
    )
    max_tokens: int = Field(
        0, ge=0, le=2**31 - 1, description="tokens of one clip; 0 is 20480 on a CPU and 680400 (4K) on a GPU"
    )
    max_steps: int = Field(200, ge=1, le=10_000, description="denoising steps of one clip")
    max_image_mib: int = Field(32, ge=1, le=32, description="size of an uploaded image file")
    max_image_megapixels: int = Field(100, ge=1, le=1000, description="pixels of an uploaded image")

    grace_seconds: float = Field(
        60.0, ge=0, le=86_400, description="how long an attached job outlives its last watcher"
    )
    drain_seconds: float = Field(30.0, ge=0, le=86_400, description="how long a shutdown waits for the running job")
    profile_dir: Path | None = Field(
        None, description="folder for what cinecat jobs profile records of steps; none refuses to record any"
    )
    trace_endpoint: str = Field(
        "",
        description="OTLP collector that gets a trace of every job, e.g. http://127.0.0.1:4318/v1/traces; its "
        "credentials go into OTEL_EXPORTER_OTLP_HEADERS",
    )
    log_format: Literal["console", "json"] = Field("console", description="log lines for people or for machines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line logged")
    # After what its tables may override, so that it is checked with it.
    models: dict[str, dict[str, Any]] = Field(
        {},
        description="further models, each a table [models.NAME] of its own settings in the TOML file, or all of them "
        "as JSON; NAME is what requests call it",
    )

    @property
    def served(self) -> dict[str, Settings]:
        """The settings of each model by its name, which is empty for the first: the checkpoint's own."""
        inherited = self.model_dump(exclude={*NOT_INHERITED, "models", "page_keys", "database_url"})
        return {"": self} | {name: Settings.model_validate(inherited | table) for name, table in self.models.items()}

    @field_validator("models", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        try:
            return json.loads(value or "{}") if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from error

    @field_validator("models")
    @classmethod
    def _are_models(cls, value: dict[str, dict[str, Any]], others: ValidationInfo) -> dict[str, dict[str, Any]]:
        inherited = {
            name: other for name, other in others.data.items() if name in PER_MODEL - NOT_INHERITED | {"executor"}
        }
        for name, table in value.items():
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not 1 to 64 of the characters A-Z a-z 0-9 . _ + -")
            if "model" not in table:
                raise ValueError(f"{name}.model is missing: say which model it is")
            for key in table.keys() - PER_MODEL:
                near = difflib.get_close_matches(key, PER_MODEL, n=1)
                hint = f"did you mean {near[0]}?" if near else f"a model's are {', '.join(sorted(PER_MODEL))}"
                raise ValueError(f"{name}.{key} is no setting of a model; {hint}")
            try:
                cls.model_validate(inherited | table)
            except ValidationError as error:
                raise ValueError("; ".join(f"{name}.{_detail(each)}" for each in error.errors())) from error
        return value

    @field_validator("device")
    @classmethod
    def _has_a_device_for_each_replica(cls, value: str, others: ValidationInfo) -> str:
        names, replicas = device_names(value), others.data.get("replicas", 1)
        if others.data.get("executor") == "ray" and value not in (*ANY_CARD, "cpu"):
            raise ValueError("must be auto, cpu or cuda where executor is ray: Ray says which GPU a replica gets")
        if len(names) == 1 and (value in ANY_CARD or not value.startswith("cuda:")):
            return value  # the engine core knows what there is
        if not all(_GPU.fullmatch(name) for name in names):
            raise ValueError("is a list of which not each is cuda:N; name GPUs alone, e.g. cuda:0,cuda:1")
        if len(names) < replicas:
            more = ",".join([value, *(f"cuda:{number}" for number in range(len(names), replicas))])
            raise ValueError(f"names {len(names)} of the {replicas} GPUs that {replicas} replicas take; e.g. {more}")
        return value

    @field_validator("ray_address")
    @classmethod
    def _is_of_a_node(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value != "auto" and not (host and port.isdigit() and "/" not in host):
            raise ValueError(
                "must be auto or host:port of the cluster's head; a machine joins it by "
                "ray start --address=HOST:PORT --num-cpus=0"
            )
        return value

    @field_validator("default_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if value:
            clip_size(value)
        return value

    @field_validator("styles_dirs", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("engine_sizes", "engine_options", "page_keys", mode="before")
    @classmethod
    def _split_words(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("engine_sizes")
    @classmethod
    def _are_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            clip_size(word)
        return value

    @field_validator("shard")
    @classmethod
    def _is_a_layout(cls, value: str, others: ValidationInfo) -> str:
        if parse_layout(value) is None and others.data.get("executor") == "ray":
            raise ValueError(
                "must say how many ranks, e.g. ulysses=2, where executor is ray: Ray is asked for their GPUs"
            )
        return value

    @field_validator("page_keys")
    @classmethod
    def _are_page_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({page_key(word)[0] for word in value}) < len(value):
            raise ValueError("the same key is there twice; give each tenant its own")
        return value

    @field_serializer("page_keys")
    def _without_keys(self, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"***={page_key(word)[1]}" for word in value)

    @field_validator("model_variant", "profile_dir", mode="before")
    @classmethod
    def _none_when_empty(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("database_url")
    @classmethod
    def _is_a_database(cls, value: str) -> str:
        if value:
            check_url(value)
        return value

    @field_serializer("database_url")
    def _without_password(self, value: str) -> str:
        return masked(value) if value else value

    @field_validator("trace_endpoint")
    @classmethod
    def _is_a_collector(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError("must be http://HOST:PORT/v1/traces or the same with https, without a user or password")
        return value

    @field_validator("address")
    @classmethod
    def _has_host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("must be host:port, e.g. 127.0.0.1:50051")
        return value


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str], config_file: Path | None = None
) -> Settings:
    """Merges the three sources.

    Args:
        flags: values given on the command line, by field name.
        environment: all of the process's; names outside CINECAT_ are ignored.
        config_file: TOML; its keys are the field names.

    Raises:
        SettingsError: a key is unknown (with the near miss) or a value is not allowed.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources = (
        _from_file(config_file),
        _from_environment(environment),
        {f"--{_flag(k)}": (k, v) for k, v in flags.items()},
    )
    for source in sources:
        for origin, (key, value) in source.items():
            values[key] = value
            origins[key] = origin
    unknown = [key for key in values if key not in Settings.model_fields]
    if unknown:
        raise SettingsError("\n".join(f"{origins[key]}: unknown setting{_near_miss(key)}" for key in unknown))
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(detail, origins) for detail in error.errors())) from error


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _from_file(path: Path | None) -> dict[str, tuple[str, object]]:
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as TOML: {error}") from error
    return {f"{key} in {path}": (key, value) for key, value in table.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, object]]:
    return {
        name: (name.removeprefix(ENVIRONMENT_PREFIX).lower(), value)
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _OTHER_VARIABLES and not _SERVICE_LINKS.fullmatch(name)
    }


def _near_miss(key: str) -> str:
    close = difflib.get_close_matches(key, Settings.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; settings are {', '.join(Settings.model_fields)}"


def _problem(detail: Any, origins: Mapping[str, str]) -> str:
    key = str(detail["loc"][0])
    return f"{origins.get(key, key)}: {_detail(detail, with_key=False)}"


def _detail(detail: Any, with_key: bool = True) -> str:
    key = str(detail["loc"][0])
    problem = detail["msg"].removeprefix("Value error, ")
    shown = problem if key in _NOT_SHOWN else f"{problem}, got {detail['input']!r}"
    return f"{key}: {shown}" if with_key else shown
