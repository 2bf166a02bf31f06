"""launch/chat.py: in the terminal, and its page in a browser."""

import pathlib
import subprocess
import sys

import pytest

from tests.helpers import chats, several
from tests.helpers.browser import browsing
from vlmrlaif_jax.serving import chat_page
from vlmrlaif_jax.serving.chat_clip import ClipLimits
from vlmrlaif_jax.serving.chat_stream import ChatQuestion

ROOT = pathlib.Path(__file__).parents[2]


# In the terminal.


def typed(*argv):
  return subprocess.run(
    [sys.executable, "launch/chat.py", *map(str, argv)],
    cwd=ROOT, env=several.environment(), capture_output=True, text=True,
  )  # fmt: skip


def test_the_terminal_prints_an_answer(tiny_checkpoint, tmp_path):
  clip = chats.write_clip(tmp_path / "clip.mp4")
  done = typed(
    f"--model={tiny_checkpoint}", f"--video={clip}", "--prompt=What happens?",
    "--frames=3", "--max_tokens=8",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  name, _, said = done.stdout.partition(": ")
  assert name == tiny_checkpoint.name and said.strip()


@pytest.mark.parametrize(
  "argv, told",
  [
    (["--model=x", "--workdir=y"], "give --workdir of a run, or --model of"),
    (
      ["--workdir=y", "--fps=1", "--frames=3"],
      "--frames, --fps can only be given with",
    ),
    (["--model=x", "--prompt=Why?"], "--video and --prompt require each other"),
  ],
)
def test_flags_that_do_not_go_together_are_refused(argv, told):
  done = typed(*argv)
  assert done.returncode == 2 and f"error: {told}" in done.stderr


def test_help_tells_of_the_flags():
  assert {"--workdir", "--best_of", "--max_mb"} <= {
    word.rstrip(":") for word in typed("--help").stdout.split()
  }


# In the browser.

# Keeps what the windows have shown, however quickly it changes.
RECORD = """
window.shown = [];
new MutationObserver(() => {
  const texts = [...document.querySelectorAll(".bot.message")].map(e => e.innerText);
  window.shown.push(texts);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


@pytest.fixture(scope="module")
def browser():
  with browsing() as made:
    yield made


@pytest.fixture(scope="module")
def address(one, tmp_path_factory, browser):  # The browser's loop begins first.
  talk = chats.opened(one, tmp_path_factory.mktemp("page"))
  asked = ChatQuestion("", max_tokens=40)
  page = chat_page.make_chat_page(
    talk, ClipLimits(max_seconds=5.0), title="runs/tiny", defaults=asked
  )
  chat_page.launch_page(page, host="127.0.0.1", port=0, max_mb=1.0, wait=False)
  yield page.local_url
  page.close()


class Visit:
  """A page in the browser, and what it did behind the reader's back."""

  def __init__(self, browser, address, width=1280, height=900):
    self.page = browser.new_page(viewport={"width": width, "height": height})
    self.errors, self.hosts = [], set()
    is_error = lambda told: told.type == "error" and self.errors.append(told.text)
    self.page.on("console", is_error)
    self.page.on("pageerror", lambda error: self.errors.append(str(error)))
    self.page.on("request", lambda asked: self.hosts.add(asked.url.split("/")[2]))
    self.page.goto(address)
    self.page.wait_for_selector("#question textarea")

  def state(self, text):
    """Waits until the page says this."""
    says = "text => document.querySelector('#state').innerText.includes(text)"
    self.page.wait_for_function(says, arg=text, timeout=60_000)

  def clear(self):
    # An event, not a click: a message that fades may still cover the button.
    self.page.dispatch_event("#clip button[aria-label=Clear]", "click")

  def upload(self, path):
    self.page.set_input_files("#clip input[type=file]", str(path))

  def ask(self, question):
    self.page.fill("#question textarea", question)
    self.page.click("#question button")

  def answers(self):
    return [each.inner_text() for each in self.page.query_selector_all(".bot.message")]


@pytest.fixture
def clip(tmp_path):
  return chats.write_clip(tmp_path / "clip.mp4")


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_both_policies_stream_their_answers(browser, address, clip, width, height):
  visit = Visit(browser, address, width, height)
  visit.upload(clip)
  visit.state("3 frames of the clip are loaded")
  visit.page.evaluate(RECORD)
  visit.ask("What happens?")
  visit.state("Truncated at 40 tokens: sft, grpo")
  first = visit.answers()
  assert len(first) == 2 and all(first)
  shown = visit.page.evaluate("window.shown")
  for side in (0, 1):
    lengths = {len(texts[side]) for texts in shown if len(texts) == 2}
    assert len(lengths) > 3
  assert "Scored by the reward model" in visit.page.inner_text("#scores")
  visit.ask("And then?")
  visit.page.wait_for_function(
    "document.querySelectorAll('.bot.message').length == 4", timeout=60_000
  )
  visit.state("Truncated at 40 tokens")
  assert visit.answers()[0] == first[0]  # Of the turn before.
  assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
  assert visit.errors == []
  assert visit.hosts == {address.split("/")[2]}


def test_a_broken_clip_is_told_of_and_the_page_goes_on(browser, address, clip):
  visit = Visit(browser, address)
  broken = clip.with_name("broken.mp4")
  broken.write_bytes(b"not a video")
  visit.ask("What happens?")
  visit.state("Upload a clip first.")
  visit.upload(broken)
  visit.state("broken.mp4 cannot be read as a video")
  visit.clear()
  visit.state(chat_page.WELCOME)
  visit.upload(chats.write_clip(clip.with_name("long.mp4"), seconds=6))
  visit.state("more than --max_seconds=5")
  visit.clear()
  visit.state(chat_page.WELCOME)
  visit.upload(clip)
  visit.state("3 frames of the clip are loaded")
