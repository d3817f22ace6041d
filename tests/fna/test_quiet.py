"""Libraries' remarks are kept off the terminal for a while, and no longer."""

from __future__ import annotations

import logging

import pytest

from fna.quiet import quiet_loggers


def _fail(logger: logging.Logger) -> None:
    with quiet_loggers(logger.name):
        logger.warning("a remark")
        logger.error("a failure")
        raise KeyError


def test_loggers_say_errors_alone_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """And are as before after it, also where it raises."""
    talkative = logging.getLogger("talkative")
    talkative.setLevel(logging.INFO)
    with pytest.raises(KeyError):
        _fail(talkative)
    talkative.info("again")
    assert [record.message for record in caplog.records] == ["a failure", "again"]
