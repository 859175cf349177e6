"""The table of settings in docs/."""

from tests.server.settings_table import DOCUMENT, document


def test_the_table_of_settings_is_current() -> None:
    assert DOCUMENT.read_text() == document(), "write it again: python -m tests.server.settings_table"
