"""`cinecat evaluate --blind`: a page on this machine alone that shows pairs of clips and takes votes."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from cinecat.engines.quality.ballot import Answer, Ballot
from cinecat.engines.quality.videos import FolderError, pair_files
from cinecat.engines.quality.votes import VoteFile

HOST = "127.0.0.1"

_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
"""What browsers play, by suffix."""
_CLIP = re.compile(r"/clip/(\d{1,9})/(first|second)")
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")
_LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
_MOST_BODY, _CHUNK = 1000, 2**16
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; media-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'",
}


def run_blind(a: Path, b: Path, out: Path, question: str, voter: str, port: int, json_only: bool) -> None:
    """Serves the page until every pair is judged or Ctrl-C is pressed, then prints what the votes say.

    Args:
        out: CSV of votes, to which new ones are added.
        port: 0 takes a free one.

    Raises:
        FolderError: a folder cannot be read, or no pair can be shown.
        VotesError: `out` holds something else.
        OSError: the port is taken.
    """
    pairs, left_out = pair_files(a, b, tuple(_TYPES))
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    ballot = Ballot((a, b), pairs, VoteFile(out), voter, question, random.SystemRandom())
    if ballot.current() is not None:
        try:
            server = BlindServer(ballot, port)
        except OSError as error:
            raise FolderError(f"port: {port} cannot be used ({error.strerror}); give another, or 0") from error
        server.serve_until_done()
    result = ballot.result()
    if json_only:
        print(json.dumps({**result.as_json(), "pairs": ballot.total, "judged": ballot.done, "votes": str(out)}))
    else:
        print(f"{question}\n{result}")


class BlindServer(ThreadingHTTPServer):
    """Serves a ballot on this machine's own address.

    Attributes:
        finished: set when the answer to the last vote is sent.
    """

    daemon_threads = True

    def __init__(self, ballot: Ballot, port: int) -> None:
        """Raises OSError where the port is taken."""
        super().__init__((HOST, port), _Handler)
        self.ballot = ballot
        self.finished = threading.Event()

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def serve_until_done(self) -> None:
        """Serves until the last vote, or until Ctrl-C."""
        to_judge = self.ballot.total - self.ballot.done
        print(f"Open {self.address} ({to_judge} to judge); Ctrl-C ends it, votes are kept", file=sys.stderr)
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        try:
            self.finished.wait()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """The page, the current pair, its two clips, and votes; there is nothing else."""

    protocol_version = "HTTP/1.1"
    server: BlindServer

    @property
    def _ballot(self) -> Ballot:
        return self.server.ballot

    def do_GET(self) -> None:
        if not self._is_local():
            return
        if self.path == "/":
            page = resources.files("cinecat.engines.quality").joinpath("blind.html").read_bytes()
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page)
        elif self.path == "/pair":
            self._send_pair()
        elif clip := _CLIP.fullmatch(self.path):
            self._send_clip(int(clip[1]), clip[2])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        vote = self._posted()
        if self.path != "/vote" or vote is None:
            self._refuse(HTTPStatus.BAD_REQUEST, "vote: is not {pair, answer}, with answer first, second or same")
            return
        try:
            taken = self._ballot.answer(*vote)
        except OSError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the vote could not be written: {error.strerror}")
            return
        if not taken:
            self._refuse(HTTPStatus.CONFLICT, "that pair is not the current one")
            return
        self._send_pair()
        if self._ballot.current() is None:
            self.server.finished.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the result."""

    def _is_local(self) -> bool:
        """Refuses what other sites make a browser send here."""
        if _LOCAL.fullmatch(self.headers.get("Host", "")):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        return False

    def _posted(self) -> tuple[int, Answer] | None:
        length = self.headers.get("Content-Length", "")
        # A form of another site cannot send JSON without asking first.
        is_json = self.headers.get("Content-Type", "").partition(";")[0].strip() == "application/json"
        if not (is_json and length.isdecimal() and int(length) <= _MOST_BODY):
            self.close_connection = True
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
            number, answer = body["pair"], body["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return (number, answer) if type(number) is int and answer in get_args(Answer) else None

    def _send_pair(self) -> None:
        showing = self._ballot.current()
        state: dict[str, Any] = {
            "question": self._ballot.question,
            "done": self._ballot.done,
            "total": self._ballot.total,
            "pair": showing.number if showing else None,
        }
        if showing is None:
            result, (a, b) = self._ballot.result(), self._ballot.titles
            span = {"share": result.share, "low": result.low, "high": result.high}
            state["result"] = {"text": str(result), "a": a, "b": b, **span}
        self._send(HTTPStatus.OK, "application/json", json.dumps(state).encode())

    def _send_clip(self, number: int, which: str) -> None:
        showing = self._ballot.showing(number)
        if showing is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such pair")
            return
        path = showing.first if which == "first" else showing.second
        try:
            file = path.open("rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND, "the clip is gone")
            return
        with file:
            size = path.stat().st_size
            span = _span(self.headers.get("Range"), size)
            if span is None:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, stop = span
            part = "Range" in self.headers
            self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
            self.send_header("Accept-Ranges", "bytes")
            if part:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self._end_headers(_TYPES[path.suffix.lower()], stop - start)
            file.seek(start)
            try:
                _copy(file, self.wfile, stop - start)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # a browser drops what it has seen enough of

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True
        self._send(status, "application/json", json.dumps({"error": reason}).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self._end_headers(content_type, len(body))
        self.wfile.write(body)

    def _end_headers(self, content_type: str, length: int) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last of a Range header; all without one, None where it cannot be met."""
    if header is None:
        return 0, size
    asked = _RANGE.fullmatch(header.strip())
    if asked is None or not (asked[1] or asked[2]):
        return None
    if not asked[1]:
        start, stop = max(0, size - int(asked[2])), size
    else:
        start, stop = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
    return (start, stop) if start < stop else None


def _copy(source: Any, target: Any, count: int) -> None:
    while count > 0 and (chunk := source.read(min(count, _CHUNK))):
        target.write(chunk)
        count -= len(chunk)
