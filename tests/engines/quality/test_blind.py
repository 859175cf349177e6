"""The blind comparison: what is shown, what is kept, and what the page refuses."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cinecat.engines import commands
from cinecat.engines.quality.ballot import Ballot, Showing
from cinecat.engines.quality.blind import BlindServer
from cinecat.engines.quality.videos import pair_files
from cinecat.engines.quality.votes import Vote, VoteFile, VotesError, preference

QUESTION = "Which moves better?"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        for name in ("one.mp4", "two.mp4", "three.webm"):
            (folder / name).write_bytes(f"{folder.name} {name}".encode())
    return a, b


def ballot(folders: tuple[Path, Path], votes: Path, voter: str = "me", seed: int = 0) -> Ballot:
    pairs, _ = pair_files(*folders, (".mp4", ".webm"))
    return Ballot(folders, pairs, VoteFile(votes), voter, QUESTION, random.Random(seed))


def shown(paper: Ballot) -> Showing:
    showing = paper.current()
    assert showing is not None
    return showing


@pytest.fixture
def server(folders: tuple[Path, Path], tmp_path: Path) -> Iterator[BlindServer]:
    server = BlindServer(ballot(folders, tmp_path / "votes.csv"), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(
    server: BlindServer, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
    connection.request(method, path, content, {**(JSON if body is not None else {}), **(headers or {})})
    reply = connection.getresponse()
    told = reply.status, reply.read(), dict(reply.getheaders())
    connection.close()
    return told


def test_a_vote_is_for_the_clip_whatever_side_it_was_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for seed in range(4):
        paper = ballot(folders, tmp_path / f"{seed}.csv", seed=seed)
        for _ in range(3):
            showing = shown(paper)
            assert showing.first.parent.name == showing.first_is
            assert showing.second.parent.name != showing.first_is
            paper.answer(showing.number, "first" if showing.first.parent.name == "a" else "second")
        assert paper.current() is None
        result = paper.result()
        assert (result.a, result.b, result.share) == (3, 0, 1.0)


def test_order_and_sides_are_random(folders: tuple[Path, Path], tmp_path: Path) -> None:
    papers = [ballot(folders, tmp_path / "votes.csv", seed=seed) for seed in range(20)]
    firsts = [shown(paper) for paper in papers]
    assert {showing.name for showing in firsts} == {"one.mp4", "two.mp4", "three.webm"}
    assert {showing.first_is for showing in firsts} == {"a", "b"}


def test_a_voter_goes_on_where_they_stopped_and_others_begin_anew(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first = ballot(folders, tmp_path / "votes.csv")
    judged = shown(first)
    first.answer(judged.number, "same")
    again = ballot(folders, tmp_path / "votes.csv", seed=7)
    assert again.done == 1
    names = []
    while showing := again.current():
        names.append(showing.name)
        again.answer(showing.number, "first")
    assert sorted([judged.name, *names]) == ["one.mp4", "three.webm", "two.mp4"]
    assert ballot(folders, tmp_path / "votes.csv", voter="you").done == 0
    assert again.result().same == 1


def test_only_the_current_pair_is_judged_and_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    paper = ballot(folders, tmp_path / "votes.csv")
    assert paper.answer(0, "first")
    assert not paper.answer(0, "first")
    assert not paper.answer(2, "first")
    assert not paper.answer(-1, "first")
    assert len(VoteFile(tmp_path / "votes.csv").read()) == 1


def test_a_torn_row_costs_itself_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    votes = tmp_path / "votes.csv"
    paper = ballot(folders, votes)
    paper.answer(0, "first")
    votes.write_bytes(votes.read_bytes() + b"2026-01-01,me,Which")
    paper.answer(1, "second")
    assert [vote.clip for vote in VoteFile(votes).read()] == [paper.showing(0).name, paper.showing(1).name]  # type: ignore[union-attr]


def test_a_file_that_holds_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("name,price\n")
    with pytest.raises(VotesError, match="holds something other than votes"):
        VoteFile(tmp_path / "table.csv")


def test_a_preference_has_its_interval_and_p_value() -> None:
    def cast(choice: str) -> Vote:
        return Vote("", "me", QUESTION, "a", "b", "one.mp4", "a", choice)  # type: ignore[arg-type]

    result = preference([cast("a")] * 8 + [cast("b")] * 2 + [cast("same")] * 5)
    assert (result.share, result.p_value) == (0.8, pytest.approx(0.109375))
    assert (result.low, result.high) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert str(result) == (
        "15 votes of 1 voter: A 8, B 2, no difference 5; "
        "A is preferred in 80.0% (95% interval 49.0% to 94.3%, p = 0.109)"
    )
    assert "nothing can be said" in str(preference([cast("same")]))


def test_a_person_sees_every_pair_and_then_the_end(server: BlindServer) -> None:
    status, page, headers = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"http" not in page.replace(b"http-equiv", b"")
    for done in range(3):
        state = json.loads(ask(server, "/pair")[1])
        assert (state["done"], state["total"], state["question"]) == (done, 3, QUESTION)
        showing = server.ballot.showing(state["pair"])
        assert showing is not None
        assert ask(server, f"/clip/{state['pair']}/first")[1] == showing.first.read_bytes()
        assert ask(server, f"/clip/{state['pair']}/second")[1] == showing.second.read_bytes()
        assert not server.finished.is_set()
        status, body, _ = ask(server, "/vote", {"pair": state["pair"], "answer": "same"})
        assert status == 200
    told = json.loads(body)
    assert told["pair"] is None
    assert told["result"]["text"] == str(server.ballot.result())
    assert (told["result"]["a"], told["result"]["b"]) == ("a", "b")
    assert server.finished.wait(5)


def test_nothing_that_is_sent_tells_whose_clip_it_is(server: BlindServer, folders: tuple[Path, Path]) -> None:
    _, body, _ = ask(server, "/pair")
    _, _, headers = ask(server, "/clip/0/first")
    told = body.decode() + json.dumps(headers)
    assert not [text for text in (*map(str, folders), "one.mp4", "two.mp4", "three.webm") if text in told]


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-1", slice(0, 2)),
        ("bytes=2-", slice(2, None)),
        ("bytes=-3", slice(-3, None)),
        ("bytes=1-99", slice(1, 99)),
    ],
)
def test_a_browser_may_ask_for_a_part(server: BlindServer, asked: str, part: slice) -> None:
    whole = ask(server, "/clip/0/first")[1]
    status, body, headers = ask(server, "/clip/0/first", headers={"Range": asked})
    assert (status, body) == (206, whole[part])
    start, stop, _ = part.indices(len(whole))
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=900-", "bytes=-", "bytes=3-2", "bytes=-0", "words=1-2", "bytes=0-1,4-5"])
def test_a_part_that_is_not_there_is_refused(server: BlindServer, asked: str) -> None:
    status, body, headers = ask(server, "/clip/0/first", headers={"Range": asked})
    assert (status, body) == (416, b"")
    assert headers["Content-Range"].startswith("bytes */")


@pytest.mark.parametrize(
    "path",
    [
        "/clip/0/../../a/one.mp4",
        "/clip/99/first",
        "/clip/0/third",
        "/clip/-1/first",
        "/..%2f..%2fetc/passwd",
        "/../votes.csv",
        "/votes.csv",
        "/clip/0/first?x=1",
    ],
)
def test_no_other_file_is_served(server: BlindServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"pair": 0},
        {"pair": "0", "answer": "first"},
        {"pair": True, "answer": "first"},
        {"pair": 0, "answer": "a"},
        {"pair": 0, "answer": ["first"]},
        {"pair": 0, "answer": "first", "padding": "x" * 2000},
    ],
)
def test_a_vote_that_makes_no_sense_is_refused(server: BlindServer, body: object) -> None:
    assert ask(server, "/vote", body)[0] == 400
    assert server.ballot.done == 0


def test_a_vote_on_another_pair_is_refused(server: BlindServer) -> None:
    assert ask(server, "/vote", {"pair": 1, "answer": "first"})[0] == 409


def test_other_sites_cannot_reach_it(server: BlindServer) -> None:
    assert ask(server, "/pair", headers={"Host": "evil.example"})[0] == 403
    form = {"Content-Type": "text/plain"}
    assert ask(server, "/vote", {"pair": 0, "answer": "first"}, form)[0] == 400
    assert ask(server, "/vote", {"pair": 0, "answer": "first"}, {"Host": "evil.example"})[0] == 403
    assert server.ballot.done == 0


def test_it_listens_on_this_machine_alone(server: BlindServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_link_out_of_its_folder_is_not_shown(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (folders[0] / "two.mp4").unlink()
    (folders[0] / "two.mp4").symlink_to(tmp_path / "secret.mp4")
    pairs, problems = pair_files(*folders, (".mp4", ".webm"))
    assert [pair.name for pair in pairs] == ["one.mp4", "three.webm"]
    assert "leads out of its folder" in problems[0]


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(commands.evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def heeded() -> Iterator[None]:
    """Whoever runs the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_prints_the_preference(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = BlindServer.serve_forever

    def interrupted(self: BlindServer, poll_interval: float) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        serve(self, poll_interval)

    monkeypatch.setattr(BlindServer, "serve_forever", interrupted)
    paper = ballot(folders, tmp_path / "votes.csv")
    showing = shown(paper)
    paper.answer(showing.number, "first" if showing.first_is == "a" else "second")
    result = run(*folders, "--blind", "--out", tmp_path / "votes.csv", "--question", QUESTION)
    assert result.exit_code == 0, result.output
    assert "Open http://127.0.0.1:" in result.stderr
    assert "1 vote of 1 voter: A 1, B 0, no difference 0; A is preferred in 100.0%" in result.stdout


def test_when_all_is_judged_the_result_comes_at_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    paper = ballot(folders, tmp_path / "votes.csv")
    while showing := paper.current():
        paper.answer(showing.number, "second")
    result = run(*folders, "--blind", "--json", "--out", tmp_path / "votes.csv", "--question", QUESTION)
    told = json.loads(result.stdout)
    assert (told["pairs"], told["judged"], told["a"] + told["b"]) == (3, 3, 3)


def test_a_taken_port_is_refused(folders: tuple[Path, Path], tmp_path: Path, server: BlindServer) -> None:
    port = server.server_address[1]
    result = run(*folders, "--blind", "--port", port, "--out", tmp_path / "other.csv")
    assert result.exit_code == 2
    assert f"port: {port} cannot be used" in result.stderr
