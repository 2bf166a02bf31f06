"""A browser for the tests of pages."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

INSTALLED = ("chromium", "chromium-browser", "google-chrome")


def launched(playwright: Playwright) -> Browser:
  """Playwright's own Chromium, or else the one that is installed."""
  try:
    return playwright.chromium.launch()
  except Error:
    path = next(filter(None, map(shutil.which, INSTALLED)), None)
    if path is None:
      pytest.fail(
        "pages are tested in a browser, and there is none: run `playwright install "
        "--with-deps chromium`, or install one, as by `apt-get install chromium`"
      )
    return playwright.chromium.launch(executable_path=path)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
  """A browser, until it is left."""
  with sync_playwright() as playwright:
    browser = launched(playwright)
    yield browser
    browser.close()
