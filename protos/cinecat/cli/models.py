"""`cinecat models`: what the server has loaded."""

import dataclasses

from cinecat.cli import output as out
from cinecat.cli.options import DEFAULT_ADDRESS, Json, Server, Tenant, connect


def models(server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """List the models of the server, with their defaults and limits."""
    with connect(server, tenant) as client:
        found = client.models()
    if as_json:
        out.show_json({"models": [dataclasses.asdict(model) for model in found]})
        return
    header = ("MODEL", "FAMILY", "DEVICE", "DTYPE", "ENGINE", "PARAMETERS", "DEFAULT", "LIMITS")
    rows = [
        (
            model.name,
            model.family,
            model.device,
            model.dtype,
            model.engine,
            f"{model.parameters:,}",
            f"{model.width}x{model.height}, {model.frames} frames, {model.steps} steps, guidance {model.guidance:g}",
            f"sizes of {model.limits.min_size} to {model.limits.max_size} by {model.limits.size_multiple}, "
            f"{model.limits.max_frames} frames, {model.limits.max_tokens} tokens",
        )
        for model in found
    ]
    out.show_table(header, rows)
