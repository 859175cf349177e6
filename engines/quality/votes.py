"""Votes of a blind comparison: a CSV file that only grows, and what it says."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from cinecat.engines.quality.intervals import sign_test, wilson_interval

Choice = Literal["a", "b", "same"]


class VotesError(Exception):
    """A file of votes that cannot be used; the message is one sentence with the fix."""


@dataclass(frozen=True)
class Vote:
    """One choice.

    Attributes:
        time: UTC, ISO 8601.
        a, b: the folders.
        clip: file name of the pair.
        first: whose clip was shown as the first, "a" or "b".
    """

    time: str
    voter: str
    question: str
    a: str
    b: str
    clip: str
    first: str
    choice: Choice


_COLUMNS = [field.name for field in fields(Vote)]


@dataclass(frozen=True)
class Preference:
    """What some votes say.

    Attributes:
        a, b, same: votes.
        share: of a among the votes for one of the two; None without such votes.
        low, high: its 95% interval (Wilson).
        p_value: two-sided binomial, of votes so uneven where both are liked alike.
    """

    voters: int
    a: int
    b: int
    same: int
    share: float | None
    low: float
    high: float
    p_value: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        votes = self.a + self.b + self.same
        counted = (
            f"{votes} {'vote' if votes == 1 else 'votes'} of {self.voters} {'voter' if self.voters == 1 else 'voters'}"
        )
        told = f"{counted}: A {self.a}, B {self.b}, no difference {self.same}"
        if self.share is None:
            return f"{told}; nothing can be said of a preference yet"
        interval = f"{self.low:.1%} to {self.high:.1%}"
        return f"{told}; A is preferred in {self.share:.1%} (95% interval {interval}, p = {self.p_value:.3g})"


def preference(votes: Iterable[Vote]) -> Preference:
    """Counts votes; each is taken for a sample of its own."""
    listed = list(votes)
    a, b, same = (sum(vote.choice == choice for vote in listed) for choice in get_args(Choice))
    low, high = wilson_interval(a, a + b)
    voters = len({vote.voter for vote in listed})
    return Preference(voters, a, b, same, a / (a + b) if a + b else None, low, high, sign_test(a, a + b))


class VoteFile:
    """A CSV file with one vote a row."""

    def __init__(self, path: Path) -> None:
        """Raises VotesError for a file that holds something else."""
        self._path = path
        try:
            header = path.read_text(encoding="utf-8").partition("\n")[0].strip() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise VotesError(f"out: {path} cannot be read as votes ({error}); name another file") from error
        if header and header != ",".join(_COLUMNS):
            raise VotesError(f"out: {path} holds something other than votes; name another file")

    def read(self) -> list[Vote]:
        """All votes; rows that a crash or a person has broken are passed over."""
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return [vote for row in csv.DictReader(file) if (vote := _vote(row)) is not None]

    def add(self, vote: Vote) -> None:
        """Appends a vote, which is on the disk when this returns. Raises OSError where it cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        row = io.StringIO()
        writer = csv.DictWriter(row, _COLUMNS, lineterminator="\n")
        with self._path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) == 0:
                writer.writeheader()
            else:
                file.seek(-1, os.SEEK_END)
                # A torn row ends here, so that the next one is whole.
                row.write("" if file.read(1) == b"\n" else "\n")
            writer.writerow(asdict(vote))
            file.write(row.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())


def _vote(row: Mapping[str | None, Any]) -> Vote | None:
    if set(row) != set(_COLUMNS) or None in row.values() or row["choice"] not in get_args(Choice):
        return None
    return Vote(**{name: row[name] for name in _COLUMNS})
