"""The status page as a person meets it, in Chromium: by keyboard, on a desktop and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from cinecat import Client
from cinecat.server.local_server import LocalServer, running_server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Debian's packages chromium and chromium-driver"
)

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900", "--lang=en")
KEY = "0123456789abcdef"
PROMPT = 'a cat <img src="x" onerror="document.title=1">'
SCREENSHOTS = os.environ.get("PAGE_SCREENSHOTS", "")
"""A folder for pictures of the page, for the documentation."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    keys = f"{KEY}=,acme-{KEY}=acme"
    with running_server(tmp_path_factory.mktemp("page"), "--threads", "1", "--page-keys", keys) as started:
        yield started


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def errors(browser: webdriver.Chrome) -> list[str]:
    """Whatever the console says that is no mere note."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def picture(browser: webdriver.Chrome, name: str) -> None:
    if SCREENSHOTS:
        browser.save_screenshot(str(Path(SCREENSHOTS) / name))


def test_a_clip_is_made_by_keyboard_and_no_other_tenants_is_shown(
    browser: webdriver.Chrome, server: LocalServer, photograph: Path
) -> None:
    with Client(server.address, tenant="acme") as client:
        client.generate(image=photograph, prompt="a secret of acme", size="64x64", frames=5, steps=2).result()

    def until(found: Callable[[], object], seconds: float = 30.0) -> None:
        WebDriverWait(browser, seconds, 0.05).until(lambda _: found())

    def element(name: str) -> WebElement:
        return browser.find_element(By.ID, name)

    browser.get(f"http://127.0.0.1:{server.metrics_port}/")
    until(lambda: element("ready").text == "ready")
    assert element("read-only").is_displayed()
    assert not element("clip").is_displayed()
    element("key").send_keys(KEY, Keys.ENTER)
    until(lambda: element("clip").is_displayed())

    element("image").send_keys(str(photograph))
    element("prompt").send_keys(PROMPT)
    focused = browser.switch_to.active_element
    assert focused == element("prompt")
    focused.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys("amber")
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element == element("strength")
    browser.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)
    browser.execute_script("document.getElementById('steps').value = 25")
    assert browser.switch_to.active_element == element("make")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    until(lambda: element("making").is_displayed() and "step" in element("making-state").text)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#making-picture img"))
    until(lambda: PROMPT in element("jobs").text)
    picture(browser, "page.png")
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#making-picture video"), 60)
    assert element("making-state").text == "done"
    until(lambda: browser.execute_script("return document.querySelector('#making-picture video').readyState >= 2"))

    until(lambda: PROMPT in element("recent").text)
    poster = browser.find_element(By.CSS_SELECTOR, "#recent img")
    browser.execute_script("arguments[0].scrollIntoView()", poster)
    until(lambda: browser.execute_script("return arguments[0].naturalWidth", poster) == 128)
    browser.find_element(By.CSS_SELECTOR, "#recent button").send_keys(Keys.ENTER)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#recent video"))
    assert browser.title == "Cinecat"
    assert "a secret of acme" not in browser.page_source

    browser.execute_script("scrollTo(0, 0)")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    )
    until(lambda: browser.execute_script("return innerWidth") == 375)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    picture(browser, "page-phone.png")

    element("sign-out").send_keys(Keys.ENTER)
    until(lambda: element("read-only").is_displayed())
    assert errors(browser) == []
