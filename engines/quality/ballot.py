"""Which pair a voter sees next, which clip of it comes first, and what was chosen."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cinecat.engines.quality.videos import FilePair
from cinecat.engines.quality.votes import Choice, Preference, Vote, VoteFile, preference

Answer = Literal["first", "second", "same"]


@dataclass(frozen=True)
class Showing:
    """A pair as it is shown.

    Attributes:
        number: of the pair on this ballot; it tells nothing of the files.
        first, second: files, in the order in which they are shown.
        first_is: whose clip the first one is.
    """

    number: int
    name: str
    first: Path
    second: Path
    first_is: Literal["a", "b"]


class Ballot:
    """The pairs that a voter has not judged yet, in random order and with random sides; safe from several threads."""

    def __init__(
        self,
        folders: tuple[Path, Path],
        pairs: Sequence[FilePair],
        votes: VoteFile,
        voter: str,
        question: str,
        draw: random.Random,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.question = question
        self.total = len(pairs)
        self._a, self._b = (str(folder.resolve()) for folder in folders)
        self._votes = votes
        self._voter = voter
        self._now = now
        self._lock = threading.Lock()
        seen = {vote.clip for vote in self._cast() if vote.voter == voter}
        open_pairs = [pair for pair in pairs if pair.name not in seen]
        draw.shuffle(open_pairs)
        self._showings = [_shown(number, pair, draw) for number, pair in enumerate(open_pairs)]
        self._next = 0

    @property
    def titles(self) -> tuple[str, str]:
        """Names of the folders."""
        return Path(self._a).name, Path(self._b).name

    @property
    def done(self) -> int:
        """Pairs that this voter has judged, now or earlier."""
        return self.total - len(self._showings) + self._next

    def current(self) -> Showing | None:
        """The pair to be judged now; None when all are."""
        with self._lock:
            return self._showings[self._next] if self._next < len(self._showings) else None

    def showing(self, number: int) -> Showing | None:
        """A pair by its number, judged or not."""
        return self._showings[number] if 0 <= number < len(self._showings) else None

    def answer(self, number: int, answer: Answer) -> bool:
        """Records a choice, on the disk when this returns; False for a pair that is not the current one.

        Raises:
            OSError: the file of votes cannot be written; the pair stays current.
        """
        with self._lock:
            if number != self._next or number >= len(self._showings):
                return False
            showing = self._showings[number]
            time = self._now().isoformat(timespec="seconds")
            self._votes.add(
                Vote(
                    time=time,
                    voter=self._voter,
                    question=self.question,
                    a=self._a,
                    b=self._b,
                    clip=showing.name,
                    first=showing.first_is,
                    choice=_choice(showing, answer),
                )
            )
            self._next += 1
            return True

    def result(self) -> Preference:
        """Of all voters on these folders and this question."""
        return preference(self._cast())

    def _cast(self) -> list[Vote]:
        asked = (self.question, self._a, self._b)
        return [vote for vote in self._votes.read() if (vote.question, vote.a, vote.b) == asked]


def _shown(number: int, pair: FilePair, draw: random.Random) -> Showing:
    if draw.random() < 0.5:
        return Showing(number, pair.name, pair.a, pair.b, "a")
    return Showing(number, pair.name, pair.b, pair.a, "b")


def _choice(showing: Showing, answer: Answer) -> Choice:
    if answer == "same":
        return "same"
    return showing.first_is if answer == "first" else "b" if showing.first_is == "a" else "a"
