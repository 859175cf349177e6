"""Metadata names at most one tenant, by a plain word."""

from __future__ import annotations

from typing import Any

import pytest

from cinecat.server.errors import RequestError
from cinecat.server.services.tenants import TENANT_KEY, tenant_of


def test_nobody_is_named() -> None:
    assert tenant_of(None) == tenant_of([]) == tenant_of([("user-agent", "grpc")]) == ""


@pytest.mark.parametrize("name", ["a", "studio-7", "A.b_C", "x" * 64])
def test_a_tenant_is_named(name: str) -> None:
    assert tenant_of([("user-agent", "grpc"), (TENANT_KEY, name)]) == name


@pytest.mark.parametrize("values", [[""], ["x" * 65], ["a b"], ["../a"], ["ä"], [b"a"], ["a", "b"], ["a\n"]])
def test_what_names_none_is_refused(values: list[Any]) -> None:
    with pytest.raises(RequestError) as refused:
        tenant_of([(TENANT_KEY, value) for value in values])
    assert [violation.field for violation in refused.value.violations] == [TENANT_KEY]
