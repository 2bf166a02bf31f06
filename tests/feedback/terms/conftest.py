"""A chat server of this machine for the terms of judges."""

import pytest

from tests.feedback.chat_server import Chat


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def chat(httpserver):
  return Chat(httpserver)
