"""Structured logs on stderr, alike in the front and in the engine core."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

LogFormat = Literal["console", "json"]


def configure_logging(log_format: LogFormat, log_level: str) -> None:
    """One line an event, for people or as JSON; what libraries log comes in the same form, from warnings on.

    Fields bound by `structlog.contextvars` are in every line.
    """
    level = getattr(logging, log_level.upper())
    as_json = log_format == "json"
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default prints the locals of every frame: prompts, whole requests.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [*([structlog.processors.format_exc_info] if as_json else []), renderer]
    structlog.configure(
        processors=[*first, structlog.processors.StackInfoRenderer(), *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=first, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("cinecat").setLevel(level)
