"""On whose behalf a client asks."""

import re

from cinecat.errors import FieldViolation, refuse

TENANT_KEY = "cinecat-tenant"
Metadata = tuple[tuple[str, str], ...]
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def tenant_metadata(tenant: str | None) -> Metadata:
    """The metadata of every call for `tenant`; none for None. Raises InvalidRequest for a name that no server takes."""
    if tenant is None:
        return ()
    if not isinstance(tenant, str) or not _NAME.fullmatch(tenant):
        allowed = f"{tenant!r} is not 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_' and '-'"
        raise refuse([FieldViolation("tenant", allowed)])
    return ((TENANT_KEY, tenant),)
