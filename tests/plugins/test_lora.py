from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cinecat.plugins.errors import LoraError
from cinecat.plugins.lora import LoraShape, inspect_lora, load_lora
from tests.plugins.samples import TARGETS, Factors, lora_tensors, random_factors, write_lora, write_raw

TARGET = TARGETS[0]
A = f"{TARGET}.lora_A.weight"
B = f"{TARGET}.lora_B.weight"
ALPHA = f"{TARGET}.alpha"

_factors = st.builds(
    random_factors,
    rank=st.integers(1, 9),
    alpha=st.none() | st.floats(-64, 64, width=16),
    in_features=st.integers(1, 12),
    out_features=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
_loras = st.dictionaries(st.sampled_from(TARGETS), _factors, min_size=1, max_size=6)
_prefixes = st.sampled_from(["", "transformer.", "base_model.model.", "base_model.model.transformer."])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora") / "sepia.safetensors"


@given(lora=_loras, prefix=_prefixes)
@settings(deadline=None)
def test_the_header_gives_every_target_with_its_sizes(path: Path, lora: dict[str, Factors], prefix: str) -> None:
    header = inspect_lora(write_lora(path, lora, prefix))

    assert header.targets == {
        name: LoraShape(each.a.shape[0], each.a.shape[1], each.b.shape[0]) for name, each in lora.items()
    }
    assert header.max_rank == max(each.a.shape[0] for each in lora.values())
    assert (header.format, header.ignored) == ("diffusers", ())


@given(lora=_loras, prefix=_prefixes)
@settings(deadline=None)
def test_loading_folds_alpha_in_and_loses_nothing(path: Path, lora: dict[str, Factors], prefix: str) -> None:
    factors = load_lora(write_lora(path, lora, prefix))

    assert {tensor.dtype for pair in factors.values() for tensor in pair} == {torch.float32}
    torch.testing.assert_close(
        {name: b @ a for name, (a, b) in factors.items()},
        {name: each.delta.float() for name, each in lora.items()},
        rtol=1e-5,
        atol=1e-4,
    )


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_header_never_causes_more_than_an_error_that_names_the_file(path: Path, data: st.DataObject) -> None:
    write_lora(path, {TARGET: random_factors(2, alpha=4.0, in_features=3, out_features=3)})
    intact = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", intact[:8])[0]
    at = data.draw(st.integers(0, header_end - 1))
    path.write_bytes(intact[:at] + data.draw(st.binary(max_size=12)) + intact[at + 1 :])

    try:
        load_lora(path)
    except LoraError as error:
        assert f"{error}".startswith("sepia.safetensors: ")  # noqa: PT017


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_truncated_file_is_refused(path: Path, kept: float) -> None:
    intact = write_lora(path).read_bytes()
    path.write_bytes(intact[: int(kept * len(intact))])

    with pytest.raises(LoraError, match=r"truncated|not a safetensors file"):
        inspect_lora(path)


def test_a_pickle_renamed_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sepia.safetensors"
    path.write_bytes(pickle.dumps({A: [0.0] * 1000}))

    with pytest.raises(LoraError, match="not a safetensors file"):
        inspect_lora(path)


def test_a_torch_checkpoint_renamed_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sepia.safetensors"
    torch.save(lora_tensors({TARGET: random_factors(4)}), path)

    with pytest.raises(LoraError, match="not a safetensors file"):
        inspect_lora(path)


def test_a_header_that_claims_an_absurd_length_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sepia.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")

    with pytest.raises(LoraError, match=f"header claims {2**60} bytes"):
        inspect_lora(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"absent\.safetensors: cannot be read"):
        inspect_lora(tmp_path / "absent.safetensors")


_ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b"[1, 2]", 0, "not a JSON object"),
        (b"{}", 0, "it holds no LoRA"),
        (b'{"a": {}, "a": {}}', 0, "names a tensor twice"),
        (json.dumps({"__metadata__": {"format": 1}}).encode(), 0, "not a map of strings"),
        (json.dumps({A: [1]}).encode(), 0, "lacks its dtype, shape or data_offsets"),
        (json.dumps({A: {**_ENTRY, "dtype": "F33"}}).encode(), 16, "unknown dtype 'F33'"),
        (json.dumps({A: {**_ENTRY, "shape": [-2, -2]}}).encode(), 16, "impossible shape"),
        (json.dumps({A: {**_ENTRY, "shape": [2**60, 2**60]}}).encode(), 16, "impossible shape"),
        (json.dumps({A: {**_ENTRY, "shape": [1] * 7 + [2, 2]}}).encode(), 16, "impossible shape"),
        (json.dumps({A: {**_ENTRY, "shape": [4, 4]}}).encode(), 16, "its shape and dtype contradict"),
        (json.dumps({A: {**_ENTRY, "data_offsets": [-16, 0]}}).encode(), 16, "lacks its dtype, shape or data_offsets"),
        (json.dumps({A: _ENTRY, B: _ENTRY}).encode(), 16, "overlap"),
        (json.dumps({A: {**_ENTRY, "data_offsets": [16, 32]}}).encode(), 32, "leave gaps"),
        (json.dumps({A: _ENTRY}).encode(), 15, "truncated"),
        (json.dumps({A: _ENTRY}).encode(), 17, "1 bytes after its last tensor"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: bytes, size: int, reason: str) -> None:
    path = write_raw(tmp_path / "sepia.safetensors", header, bytes(size))

    with pytest.raises(LoraError, match=reason):
        inspect_lora(path)


_GOOD = {A: torch.ones(4, 6), B: torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({A: _GOOD[A]}, f"'{A}' has no lora_B or lora_up beside it"),
        ({B: _GOOD[B]}, f"'{B}' has no lora_A or lora_down beside it"),
        ({**_GOOD, "blocks.1.attn2.to_q.alpha": torch.ones(())}, "'blocks.1.attn2.to_q.alpha' has no lora_A"),
        ({**_GOOD, B: torch.ones(8, 5)}, f"'{A}' has rank 4, '{B}' 5"),
        ({**_GOOD, A: torch.ones(4, 6, dtype=torch.int32)}, f"'{A}' has dtype I32; save it as F32, F16 or BF16"),
        ({**_GOOD, A: torch.ones(4, 6).to(torch.float8_e4m3fn)}, f"'{A}' has dtype F8_E4M3"),
        ({**_GOOD, A: torch.ones(4, 6, 1, 1)}, "they must be [rank, in] and [out, rank]"),
        ({A: torch.ones(4), B: torch.ones(4)}, "they must be [rank, in] and [out, rank]"),
        ({A: torch.ones(4, 6, 3, 3), B: torch.ones(8, 4, 3, 3)}, "they must be [rank, in] and [out, rank]"),
        ({A: torch.ones(()), B: torch.ones(())}, "they must be [rank, in] and [out, rank]"),
        ({A: torch.ones(0, 6), B: torch.ones(8, 0)}, f"'{A}' has shape [0, 6], which holds nothing"),
        ({**_GOOD, ALPHA: torch.ones(2)}, f"'{ALPHA}' has shape [2]; it must be one number"),
        ({**_GOOD, f"transformer.{A}": _GOOD[A]}, f"'{A}' and 'transformer.{A}' are the same part of one layer"),
        ({**_GOOD, f"{TARGET}.lora_A.other.weight": _GOOD[A]}, "are the same part of one layer"),
        ({**_GOOD, f"{TARGET}.lora_B.bias": torch.ones(7)}, f"'{TARGET}.lora_B.bias' has shape [7]; it must be [8]"),
    ],
)
def test_tensors_that_are_no_lora_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    path = tmp_path / "sepia.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)

    with pytest.raises(LoraError) as caught:
        inspect_lora(path)

    assert reason in f"{caught.value}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [A, B, ALPHA])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, key: str, value: float) -> None:
    path = tmp_path / "sepia.safetensors"
    tensors = lora_tensors({TARGET: random_factors(4, alpha=2.0)}, prefix="")
    tensors[key].view(-1)[-1] = value
    save_file(tensors, path)

    with pytest.raises(LoraError, match=f"'{key}' holds NaN or infinity"):
        load_lora(path)


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    path = write_lora(
        tmp_path / "sepia.safetensors", {TARGET: Factors(torch.ones(1, 2), torch.full((2, 1), 10.0), 3e38)}
    )

    with pytest.raises(LoraError, match=f"{B}' holds NaN or infinity"):
        load_lora(path)


_CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (_CONFIG, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({**_CONFIG, "use_rslora": True}, 4.0),
        ({**_CONFIG, "alpha_pattern": {"to_q": 6}}, 1.5),
        ({**_CONFIG, "alpha_pattern": {r"^blocks\.0\.attn1\.to_q$": 6}}, 1.5),
        ({**_CONFIG, "alpha_pattern": {"^to_q": 6, "o_q": 6, "to_k": 6}}, 2.0),
        ({**_CONFIG, "r": 16, "rank_pattern": {"attn1.to_q": 4}}, 2.0),
    ],
)
def test_the_scale_in_the_metadata_counts(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    lora = random_factors(4)

    _, b = load_lora(write_lora(tmp_path / "sepia.safetensors", {TARGET: lora}, config=config))[TARGET]

    torch.testing.assert_close(b, scale * lora.b)


def test_an_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    lora = random_factors(4)
    path = write_lora(tmp_path / "sepia.safetensors", {TARGET: lora})
    tensors = load_file(path) | {f"transformer.{TARGET}.alpha": torch.tensor(8)}
    save_file(tensors, path)

    _, b = load_lora(path)[TARGET]

    torch.testing.assert_close(b, 2.0 * lora.b)


def test_a_targets_own_alpha_outweighs_the_metadata(tmp_path: Path) -> None:
    lora = random_factors(4, alpha=2.0)

    _, b = load_lora(write_lora(tmp_path / "sepia.safetensors", {TARGET: lora}, config=_CONFIG))[TARGET]

    torch.testing.assert_close(b, 0.5 * lora.b)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**_CONFIG, "r": 8}, "has rank 4, but lora_adapter_metadata says 8"),
        ({**_CONFIG, "rank_pattern": {"to_q": 2}}, "has rank 4, but lora_adapter_metadata says 2"),
        ({"r": 4}, "lora_alpha in its lora_adapter_metadata is None"),
        ({**_CONFIG, "lora_alpha": "8"}, "lora_alpha in its lora_adapter_metadata is '8'"),
        ({**_CONFIG, "lora_alpha": float("nan")}, "it must be a number"),
        ({**_CONFIG, "lora_alpha": True}, "it must be a number"),
        ({**_CONFIG, "use_dora": True}, "DoRA, which is not supported"),
        ({**_CONFIG, "alpha_pattern": [8]}, "must map module names to numbers"),
        ({**_CONFIG, "alpha_pattern": {"(a+)+b": 8}}, "only module names are read"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    path = write_lora(tmp_path / "sepia.safetensors", config=config)

    with pytest.raises(LoraError) as caught:
        inspect_lora(path)

    assert reason in f"{caught.value}"
