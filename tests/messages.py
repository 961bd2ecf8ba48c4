"""Patterns for `pytest.raises(..., match=...)` that compare whole messages."""

import re


def exactly(message):
    """Return a pattern of the whole message."""
    return rf"\A{re.escape(message)}\Z"


def one_line(*, start="", part=""):
    """Return a pattern of a message of one line that starts with a text and holds another."""
    return rf"\A{re.escape(start)}.*{re.escape(part)}.*\Z"
