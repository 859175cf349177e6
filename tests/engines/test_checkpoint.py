"""What is served, and what is refused with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from cinecat.engines import checkpoint
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.errors import ModelError
from cinecat.engines.model import load_model
from cinecat.engines.tiny import build_tiny
from tests.engines.conftest import MICRO


@pytest.fixture
def copy(micro: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro, tmp_path / "copy"))


def test_a_complete_folder_is_named_after_itself(micro: Path) -> None:
    checkpoint = find_checkpoint(str(micro))
    assert (checkpoint.name, checkpoint.folder) == ("micro", micro)


def test_the_same_config_gives_the_same_bytes(micro: Path, tmp_path: Path) -> None:
    build_tiny(tmp_path / "again", MICRO)
    files = sorted(path.relative_to(micro) for path in micro.glob("**/*") if path.is_file())
    assert len(files) > 10
    assert [(micro / file).read_bytes() for file in files] == [
        (tmp_path / "again" / file).read_bytes() for file in files
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ("model_index.json", "model_index.json"),
        ("vae", "vae/config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/*.safetensors"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json"),
    ],
)
def test_what_is_missing_is_named(copy: Path, remove: str, named: str) -> None:
    target = copy / remove
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ModelError, match="missing: ") as refused:
        find_checkpoint(str(copy))
    assert f"{refused.value}".endswith(f"missing: {named}")


def test_a_shard_that_the_index_names_must_be_there(copy: Path) -> None:
    index = copy / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (copy / "vae" / "one.safetensors").touch()
    with pytest.raises(ModelError, match=r"missing: vae/two\.safetensors$"):
        find_checkpoint(str(copy))


def test_pickled_weights_do_not_count_as_weights(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="missing: vae/"):
        find_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_channels": 16}, "image-to-video takes 36"),
        ({"image_dim": None}, "image_dim is null"),
        ({"_class_name": "FluxTransformer2DModel"}, "not a 'WanTransformer3DModel'"),
    ],
)
def test_another_model_is_refused_by_its_config(copy: Path, change: dict[str, object], says: str) -> None:
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=says):
        find_checkpoint(str(copy))


def test_a_name_that_is_nothing_says_what_it_could_be() -> None:
    with pytest.raises(ModelError, match="neither 'wan-tiny', nor a folder that exists, nor a hub id"):
        find_checkpoint("/no/such/folder")


def test_changed_weights_change_the_fingerprint(copy: Path) -> None:
    before = find_checkpoint(str(copy)).fingerprint
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert find_checkpoint(str(copy)).fingerprint != before


def test_the_fingerprint_does_not_depend_on_the_machine(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_checkpoint(str(copy)).fingerprint
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, (1, 1))
    assert find_checkpoint(str(copy)).fingerprint == before

    # Too large to be read, but from the hub: a link to a file that is called by its hash.
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 0)
    blob = copy / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    from_hub = find_checkpoint(str(copy)).fingerprint
    os.utime(blob, (2, 2))
    assert find_checkpoint(str(copy)).fingerprint == from_hub
    weights.unlink()
    other = blob.rename(blob.with_name("0" * 64))
    weights.symlink_to(other)
    assert find_checkpoint(str(copy)).fingerprint != from_hub


def test_damaged_weights_are_refused_with_their_folder(copy: Path) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"transformer/\S* cannot be loaded"):
        load_model(find_checkpoint(str(copy)), "cpu", "auto")


@pytest.mark.parametrize(("device", "dtype"), [("tpu9", "auto"), ("cuda:99", "auto"), ("cpu", "float8")])
def test_an_absent_device_or_dtype_is_refused(micro: Path, device: str, dtype: str) -> None:
    with pytest.raises(ModelError, match=r"^(device|dtype): .* is not"):
        load_model(find_checkpoint(str(micro)), device, dtype)


def test_only_flow_solvers_are_instantiated(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "os"}')
    with pytest.raises(ModelError, match="scheduler 'os' is not one of"):
        load_model(find_checkpoint(str(copy)), "cpu", "auto")
