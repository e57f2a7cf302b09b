import logging
import signal

import pytest


class NoDeprecations(logging.Handler):
    """transformers logs some of its deprecations instead of warning."""

    def emit(self, record):
        assert "deprecated" not in record.getMessage(), record.getMessage()


logging.getLogger("transformers").addHandler(NoDeprecations())


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A background job ignores SIGINT, and a script whose `main` runs in a test notes it (common.Interrupt)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
