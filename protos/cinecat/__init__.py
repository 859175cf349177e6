"""Client for a Cinecat server: an image, a prompt and a style become a clip.

    from cinecat import Client

    with Client() as client:
        for event in client.generate(image="shot.png", prompt="rain", style="noir:0.8", output="out.mp4"):
            print(event)

Names are imported on first use, so that a process that only wants a subpackage does not load gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cinecat.aio import AsyncClient
    from cinecat.client import Client
    from cinecat.clip import Clip, Job
    from cinecat.errors import (
        AlreadyExists,
        CinecatError,
        Conflict,
        DownloadCorrupted,
        InvalidRequest,
        JobCancelled,
        JobFailed,
        NotFound,
        RequestTooLarge,
        ServerUnavailable,
    )
    from cinecat.events import Event, Finished, Progress
    from cinecat.previews import Preview, PreviewFrame, Previews
    from cinecat.states import JobState
    from cinecat.styles import Style

_MODULE_OF = {
    "AlreadyExists": "errors",
    "AsyncClient": "aio",
    "CinecatError": "errors",
    "Client": "client",
    "Clip": "clip",
    "Conflict": "errors",
    "DownloadCorrupted": "errors",
    "Event": "events",
    "Finished": "events",
    "InvalidRequest": "errors",
    "Job": "clip",
    "JobCancelled": "errors",
    "JobFailed": "errors",
    "JobState": "states",
    "NotFound": "errors",
    "Preview": "previews",
    "PreviewFrame": "previews",
    "Previews": "previews",
    "Progress": "events",
    "RequestTooLarge": "errors",
    "ServerUnavailable": "errors",
    "Style": "styles",
}

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "CinecatError",
    "Client",
    "Clip",
    "Conflict",
    "DownloadCorrupted",
    "Event",
    "Finished",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobState",
    "NotFound",
    "Preview",
    "PreviewFrame",
    "Previews",
    "Progress",
    "RequestTooLarge",
    "ServerUnavailable",
    "Style",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cinecat' has no attribute {name!r}")
    value = getattr(import_module(f"cinecat.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
