"""Pictures of a clip in the making, as files that a viewer may keep open."""

import re
from pathlib import Path

from cinecat.events import Event, Progress
from cinecat.previews import Preview

_OWN = re.compile(r"(estimate|frame)-\d{4,}\.webp(\.part)?", re.ASCII)


class PreviewFolder:
    """Writes the newest estimate as estimate-0000.webp, estimate-0004.webp and so on, and each decoded frame, as it
    comes, as frame-0000.webp and so on; the number is that of the clip's frame.

    Makes the folder and clears it of such files of an earlier clip. Raises OSError when it cannot.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            if _OWN.fullmatch(file.name):
                file.unlink()

    def show(self, event: Event) -> None:
        """Writes the pictures of `event`, where it has some; none is ever seen half written."""
        if isinstance(event, Progress) and event.preview is not None:
            self._write(event.preview)

    def _write(self, preview: Preview) -> None:
        kind = "estimate" if preview.is_estimate else "frame"
        for frame in preview.frames:
            path = self._path / f"{kind}-{frame.index:04d}.webp"
            part = path.with_name(f"{path.name}.part")
            part.write_bytes(frame.webp)
            part.replace(path)
