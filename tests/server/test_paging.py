"""Page sizes and tokens: what a list gave out it takes back, anything else is refused."""

from __future__ import annotations

import base64
import json

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.server.errors import RequestError
from cinecat.server.services.paging import decode_token, encode_token, page_size


def token_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(("asked", "given_out"), [(0, 50), (1, 1), (1000, 1000)])
def test_page_sizes_within_the_limit_are_taken(asked: int, given_out: int) -> None:
    assert page_size(asked) == given_out


@pytest.mark.parametrize("asked", [-1, 1001, 2**31 - 1])
def test_other_page_sizes_are_refused(asked: int) -> None:
    with pytest.raises(RequestError, match=f"page_size: {asked} is not between 1 and 1000") as refused:
        page_size(asked)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_no_token_is_the_first_page() -> None:
    assert decode_token("", int, str) is None


@given(st.integers(0, 2**63 - 1), st.text(st.characters(min_codepoint=1, max_codepoint=127)))
def test_tokens_come_back_as_the_place_they_stand_for(created_us: int, job_id: str) -> None:
    assert decode_token(encode_token(created_us, job_id), int, str) == (created_us, job_id)


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "!!!!",
        "ünïcode",
        encode_token(5),
        encode_token("5", "a"),
        encode_token(5, "a", "b"),
        token_of({"a": 1}),
        token_of([True, "a"]),
        token_of([1.0, "a"]),
        token_of([-1, "a"]),
        token_of([2**63, "a"]),
        token_of([1, "\ud800"]),
        base64.urlsafe_b64encode(b"[" * 100_000).decode(),
        base64.urlsafe_b64encode(b"[" + b"9" * 5000 + b', "a"]').decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
    ids=lambda token: token[:16],
)
def test_forged_tokens_are_refused(token: str) -> None:
    with pytest.raises(RequestError, match=r"^page_token: is not a next_page_token of this list") as refused:
        decode_token(token, int, str)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


@given(st.text() | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_no_token_is_an_internal_error(token: str) -> None:
    try:
        place = decode_token(token, int, str)
    except RequestError:
        return
    assert place is None or [type(part) for part in place] == [int, str]
