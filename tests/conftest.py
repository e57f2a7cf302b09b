import signal

import pytest


@pytest.fixture(autouse=True)
def signal_handlers_come_back():
    """A script whose `main` runs in a test installs its own for SIGINT and SIGTERM (common.Interrupt)."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
