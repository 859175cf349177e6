"""The page of the blind comparison as a person meets it, in Chromium."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Debian's packages chromium and chromium-driver"
)

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800")
# Which key chooses the lighter of the two clips on the page.
LIGHTER = """
const [first, second] = [...document.querySelectorAll("video")].map((video) => {
  const context = document.createElement("canvas").getContext("2d");
  context.drawImage(video, 0, 0, 8, 8);
  return context.getImageData(0, 0, 8, 8).data.reduce((sum, value) => sum + value, 0);
});
return first > second ? "1" : "2";
"""
PLAYING = "return [...document.querySelectorAll('video')].every((video) => !video.paused)"
PAUSE = "document.querySelectorAll('video').forEach((video) => video.pause())"


def write_clip(path: Path, grey: int) -> None:
    """8 frames of 64x48, H.264 4:2:0."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The clips of the first are light, of the second dark."""
    light, dark = tmp_path / "light", tmp_path / "dark"
    for folder, grey in ((light, 220), (dark, 30)):
        folder.mkdir()
        for name in ("one", "two", "three"):
            write_clip(folder / f"{name}.mp4", grey)
    return light, dark


@pytest.fixture
def command(folders: tuple[Path, Path], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [*map(str, folders), "--blind", "--out", str(tmp_path / "votes.csv"), "--question", "Which is lighter?"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cinecat.cli", "evaluate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def shows(browser: webdriver.Chrome, element: str, text: str) -> None:
    """Waits until an element shows a text."""
    WebDriverWait(browser, 20).until(
        lambda page: text in page.find_element(By.ID, element).text, f"no {text!r} in #{element}"
    )


def plays(browser: webdriver.Chrome) -> None:
    WebDriverWait(browser, 20).until(
        lambda page: page.find_element(By.TAG_NAME, "button").is_enabled() and page.execute_script(PLAYING),
        "the clips do not play",
    )


def press(browser: webdriver.Chrome, key: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


def test_a_person_plays_through_with_the_keyboard_and_sees_the_result(
    command: subprocess.Popen[str], browser: webdriver.Chrome, tmp_path: Path
) -> None:
    assert command.stderr is not None
    address = re.search(r"http://\S+", command.stderr.readline())
    assert address is not None
    browser.get(address[0])
    shows(browser, "question", "Which is lighter?")
    for count in ("1 of 3", "2 of 3"):
        shows(browser, "count", count)
        plays(browser)
        press(browser, browser.execute_script(LIGHTER))
    shows(browser, "count", "3 of 3")
    plays(browser)
    browser.execute_script(PAUSE)
    press(browser, " ")
    plays(browser)
    press(browser, "0")

    told = "A 2, B 0, no difference 1; A is preferred in 100.0% (95% interval 34.2% to 100.0%, p = 0.5)"
    shows(browser, "told", told)
    shows(browser, "a", "light")
    shows(browser, "b", "dark")
    interval, scale = (browser.find_element(By.ID, name).rect for name in ("interval", "scale"))
    assert interval["width"] / scale["width"] == pytest.approx(0.658, abs=0.01)
    assert [entry for entry in browser.get_log("browser") if entry["source"] == "javascript"] == []
    assert told in command.communicate(timeout=20)[0]
    assert command.returncode == 0
    with (tmp_path / "votes.csv").open(newline="") as file:
        assert [row["choice"] for row in csv.DictReader(file)] == ["a", "a", "same"]
