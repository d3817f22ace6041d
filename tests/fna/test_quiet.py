"""Libraries' remarks are kept off the terminal for a while, and no longer."""

from __future__ import annotations

import logging

import pytest

from fna.quiet import quiet_loggers


def test_loggers_say_errors_alone_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    talkative = logging.getLogger("talkative")
    talkative.setLevel(logging.INFO)
    with pytest.raises(KeyError), quiet_loggers("talkative"):
        talkative.warning("a remark")
        talkative.error("a failure")
        raise KeyError
    talkative.info("again")
    assert [record.message for record in caplog.records] == ["a failure", "again"]
