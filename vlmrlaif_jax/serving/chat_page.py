"""Builds the page of launch/chat.py: a clip, settings, and one chat per policy.

`make_chat_page` and `launch_page` are the main functions.
"""

import atexit
import functools
import html
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, no_type_check

# Gradio reads these when it is imported: no telemetry and no downloads.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from vlmrlaif_jax.core import distributed  # noqa: E402
from vlmrlaif_jax.core.errors import UserError  # noqa: E402
from vlmrlaif_jax.serving.chat_clip import ClipLimits, read_clips  # noqa: E402
from vlmrlaif_jax.serving.chat_guard import ChatGuard  # noqa: E402
from vlmrlaif_jax.serving.chat_session import ChatClip, ChatSession  # noqa: E402
from vlmrlaif_jax.serving.chat_stream import (  # noqa: E402
  MAX_CHAT_TOKENS,
  ChatAnswers,
  ChatQuestion,
  stream_side_by_side,
)

SAMPLE_COUNTS = (1, 2, 4, 8, 16)  # Choices of the number of samples.
HOUR_S = 3600  # Seconds. Uploads older than a day are removed every hour.
MAX_QUESTION = 20_000  # Characters.
MAX_WAITING = 32  # Questions that wait for the device.
MAX_UPLOADS = 20  # Clips of the largest size that are stored together.
WELCOME = "Upload a clip to begin."
CSS = pathlib.Path(__file__).parents[1] / "assets" / "chat.css"
# System fonts need no download.
THEME = gr.themes.Default(
  font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)

ChatHistories = dict[str, list[tuple[str, str]]]  # Policy -> (question, answer) turns.


class ChatEvents:
  """The event handlers of the page; each returns or yields values of components."""

  def __init__(self, chat: ChatSession, limits: ClipLimits):
    self.chat, self.limits = chat, limits

  def clear(self) -> list[Any]:
    """Returns empty histories, windows and scores."""
    histories: ChatHistories = {name: [] for name in self.chat.policies}
    return [histories, *make_windows(histories), ""]

  def on_clip(self, path: str | None) -> list[Any]:
    """Returns the features of a new clip, its status, and an empty conversation."""
    if path is None:
      return [None, WELCOME, *self.clear()]
    try:
      clip = read_clips(self.chat, [path], self.limits)
    except UserError as error:
      return [None, format_problem(error), *self.clear()]
    (layout,) = clip.layouts
    status = f"{layout.grid.time} frames of the clip are loaded. Ask a question."
    return [clip, status, *self.clear()]

  @no_type_check  # Gradio does not detect a type-checked generator function.
  def on_ask(
    self,
    question: str,
    clip: ChatClip | None,
    histories: ChatHistories,
    temperature: float,
    max_tokens: int,
    samples: int,
  ) -> Iterator[list[Any]]:
    """Yields the question box, the status, and the growing conversation."""
    unchanged = [histories, *make_windows(histories), ""]
    reason = ""
    if clip is None:
      reason = "Upload a clip first."
    elif not question.strip():
      reason = "Type a question."
    elif len(question) > MAX_QUESTION:
      reason = f"A question has at most {MAX_QUESTION} characters. Shorten it."
    if clip is None or reason:
      yield [question[:MAX_QUESTION], format_problem(reason), *unchanged]
      return
    # A question in the same turn has the same seed, and so the same answer.
    seed = len(next(iter(histories.values())))
    request = ChatQuestion(
      question.strip(), temperature, int(max_tokens), samples, seed
    )
    answers: dict[str, ChatAnswers] = {}
    try:
      for answers in stream_side_by_side(self.chat, clip, histories, request):
        windows = make_windows(extend_histories(histories, request, answers))
        yield ["", format_progress(request, answers), histories, *windows, ""]
    except UserError as error:
      yield [question, format_problem(error), *unchanged]
      return
    extended = extend_histories(histories, request, answers)
    yield [
      "",
      format_progress(request, answers),
      extended,
      *make_windows(extended),
      format_scores(self.chat, answers),
    ]


def format_problem(reason: object) -> str:
  """Formats an error for the status, which is HTML."""
  return f"⚠️ {html.escape(str(reason), quote=False)}"


def extend_histories(
  histories: ChatHistories, request: ChatQuestion, answers: dict[str, ChatAnswers]
) -> ChatHistories:
  """Returns the histories extended by a question and each policy's best answer."""
  turn = lambda part: (request.question, part.texts[part.best])
  return {name: [*histories[name], turn(part)] for name, part in answers.items()}


def format_progress(request: ChatQuestion, answers: dict[str, ChatAnswers]) -> str:
  """Formats the number of complete answers, or which answers are truncated."""
  if not all(part.done for part in answers.values()):
    count = min(sum(part.stopped) for part in answers.values())
    if request.samples == 1:
      return "Answering …"
    return f"{count} of {request.samples} answers"
  truncated = [name for name, part in answers.items() if not part.stopped[part.best]]
  if truncated:
    return f"Truncated at {request.max_tokens} tokens: {', '.join(truncated)}."
  return "Done."


def make_windows(histories: ChatHistories) -> list[list[dict[str, str]]]:
  """Converts each conversation to the messages of gr.Chatbot, which are HTML."""
  return [
    [
      {"role": role, "content": html.escape(text, quote=False)}
      for turn in turns
      for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    for turns in histories.values()
  ]


def format_scores(chat: ChatSession, answers: dict[str, ChatAnswers]) -> str:
  """Formats the scored answers as an HTML table; "" without a judge."""
  if chat.judge is None:
    return ""
  rows = [
    f'<tr class="{"best" if best and len(part.texts) > 1 else "other"}">'
    f"<td>{html.escape(name)}</td><td>{score:.3f}</td><td>{html.escape(text)}</td></tr>"
    for name, part in answers.items()
    for best, score, text in part.rank()
  ]
  head = "<tr><th>Policy</th><th>Score</th><th>Answer</th></tr>"
  caption = f"<p>Scored by {html.escape(chat.judge.name)}</p>"
  return f"{caption}<table>{head}{''.join(rows)}</table>"


def make_chat_page(
  chat: ChatSession, limits: ClipLimits, *, title: str, defaults: ChatQuestion
) -> gr.Blocks:
  """Builds the page.

  Args:
    chat: Policies and judge.
    limits: Limits of an uploaded clip.
    title: Name of the run or checkpoint.
    defaults: Initial values of the sampling settings.
  """
  events = ChatEvents(chat, limits)
  os.environ["GRADIO_TEMP_DIR"] = make_upload_folder()  # Read for each component.
  with gr.Blocks(
    title="vlmrlaif_jax", analytics_enabled=False, delete_cache=(HOUR_S, 24 * HOUR_S)
  ) as page:
    clip, histories = gr.State(), gr.State(events.clear()[0])
    gr.HTML(f"<h2>Chat about a clip</h2><p>{html.escape(title)}</p>")
    with gr.Row():
      with gr.Column(scale=1, min_width=280):
        video = gr.Video(
          label="Clip", sources=["upload"], height=260, buttons=[], elem_id="clip"
        )
        status = gr.HTML(WELCOME, elem_id="state")
        question = gr.Textbox(
          label="Question",
          placeholder="What happens in the clip?",
          submit_btn="Ask",
          max_length=MAX_QUESTION,
          elem_id="question",
        )
        settings = make_settings(chat, defaults)
        clear = gr.Button("Clear the conversation", size="sm", elem_id="clear")
      with gr.Column(scale=3, min_width=300):
        with gr.Row():
          windows = [make_window(name) for name in chat.policies]
        scores = gr.HTML(elem_id="scores")
    conversation = [histories, *windows, scores]
    video.change(events.on_clip, video, [clip, status, *conversation])
    inputs = [question, clip, histories, *settings]
    outputs = [question, status, *conversation]
    question.submit(events.on_ask, inputs, outputs, show_progress="hidden")
    for event in (clear.click, *(window.clear for window in windows)):
      event(events.clear, None, conversation)
  return page


def launch_page(
  page: gr.Blocks, *, host: str, port: int, max_mb: float, wait: bool = True
) -> None:
  """Serves the page.

  Args:
    page: Page from make_chat_page.
    host: Address to listen on.
    port: Port to listen on; 0 selects a free one.
    max_mb: Largest size of an upload.
    wait: Whether to block until the server stops.
  """
  if not distributed.is_loopback(host):
    print(
      f"--host={host}: everyone who reaches this address can use the model and upload "
      "clips, because the page has no accounts",
      file=sys.stderr,
    )
  # One request uses the device at a time.
  page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
  folder, max_bytes = make_upload_folder(), MAX_UPLOADS * max_mb * 1e6
  guard = Middleware(ChatGuard, host=host, folder=folder, max_bytes=max_bytes)
  page.launch(
    server_name=host,
    server_port=port or None,
    share=False,
    max_file_size=int(max_mb * 1e6),
    footer_links=[],
    theme=THEME,
    css_paths=CSS,
    prevent_thread_lock=not wait,
    app_kwargs={"middleware": [guard], "openapi_url": None},
  )


@functools.cache
def make_upload_folder() -> str:
  """Creates the folder of this process's uploads, which is removed at its end.

  Gradio's own folder is shared by all users of a machine.
  """
  folder = tempfile.mkdtemp(prefix="vlmrlaif_chat_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def make_settings(
  chat: ChatSession, defaults: ChatQuestion
) -> list[gr.components.Component]:
  """Creates the controls of temperature, answer length and number of samples."""
  info = f"by {chat.judge.name}" if chat.judge else "requires a reward model"
  with gr.Accordion("Sampling", open=False):
    return [
      gr.Slider(
        0, 1.5, defaults.temperature, step=0.1, label="Temperature (0: greedy)"
      ),
      gr.Slider(
        1, MAX_CHAT_TOKENS, defaults.max_tokens, step=1, label="Maximum tokens"
      ),
      gr.Radio(
        SAMPLE_COUNTS,
        value=defaults.samples if defaults.samples in SAMPLE_COUNTS else 1,
        label="Best of",
        info=info,
        interactive=chat.judge is not None,
      ),
    ]


def make_window(name: str) -> gr.Chatbot:
  """Creates the window of a conversation with a policy; messages are plain text."""
  return gr.Chatbot(
    label=name,
    height=380,
    min_width=260,
    render_markdown=False,
    feedback_options=None,
    buttons=[],
  )
