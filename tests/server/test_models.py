"""What ListModels tells, as a client reads it."""

from __future__ import annotations

from dataclasses import replace

from cinecat.catalog import model_from_proto
from cinecat.server.models import describe_model
from cinecat.server.settings import Settings
from tests.server.samples import model_info


def test_a_model_tells_its_fingerprint_and_what_is_fused_into_it() -> None:
    info = replace(model_info(), name="wan-tiny+four-steps", variant="four-steps", fingerprint="f" * 16)
    model = model_from_proto(describe_model(info, Settings()))
    assert (model.name, model.variant, model.fingerprint) == ("wan-tiny+four-steps", "four-steps", "f" * 16)
