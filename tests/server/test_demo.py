"""The demo's contact sheet and its table."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from cinecat.server import demo

INPUTS = dict.fromkeys(("plain", "noir"), np.full((32, 48, 3), 10, np.uint8))
# Each frame is as bright as its index.
FRAMES = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None] * 10 + 40, (17, 32, 48, 3))


def test_the_contact_sheet_has_the_input_and_evenly_spaced_frames_in_each_row() -> None:
    sheet = np.asarray(demo.contact_sheet(INPUTS, {"plain": FRAMES, "noir": FRAMES[::-1]}, columns=5))
    middles = sheet[[4 + 16 + 16, 4 + 16 + 16 + 52]][:, [4 + 24 + 52 * column for column in range(6)], 0]
    assert middles.tolist() == [[10, 40, 80, 120, 160, 200], [10, 200, 160, 120, 80, 40]]


def test_the_contact_sheet_is_labelled() -> None:
    sheet = np.asarray(demo.contact_sheet(INPUTS, {"plain": FRAMES}, columns=5))
    labels = sheet[4:20].min(axis=(0, 2))
    assert [labels[4 + 52 * column : 4 + 52 * column + 48].min() < 100 for column in range(6)] == [True] * 6


def test_the_table_shows_seconds_per_stage_and_clip() -> None:
    console = Console(width=80, record=True)
    console.print(demo.timings_table({"plain": {"denoise": 1.5, "mux": 0.25}, "noir": {"denoise": 2.0}}))
    rows = [line.strip("│ ").split() for line in console.export_text().splitlines()]
    assert ["denoise", "│", "1.500", "s", "│", "2.000", "s"] in rows
    assert ["total", "│", "1.750", "s", "│", "2.000", "s"] in rows
