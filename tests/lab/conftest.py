from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.lab.report.browser import chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Provide one Chromium for all tests of a process, because Playwright allows only one."""
    with chromium() as running:
        yield running
