"""The page of launch/chat.py: a clip and settings, a conversation with each policy."""

import html
import os
import pathlib
from collections.abc import Iterator
from typing import Any, no_type_check

# Nothing is fetched, and nothing told; to be said before gradio is imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")

import gradio as gr  # noqa: E402

from vlmrlaif_jax.core.errors import UserError  # noqa: E402
from vlmrlaif_jax.serving.chat_clip import ClipLimits, read_clip  # noqa: E402
from vlmrlaif_jax.serving.chat_session import ChatSession  # noqa: E402
from vlmrlaif_jax.serving.chat_stream import (  # noqa: E402
  MAX_CHAT_TOKENS,
  ChatAnswers,
  ChatQuestion,
  Features,
  stream_side_by_side,
)

SAMPLE_COUNTS = (1, 2, 4, 8, 16)  # Of answers whose best is taken.
HOUR_S = 3600  # Every hour the uploads of the day before are removed.
WELCOME = "Upload a clip to begin."
CSS = pathlib.Path(__file__).parents[1] / "assets" / "chat.css"
# The reader's own: nothing is fetched.
THEME = gr.themes.Default(
  font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)

ChatHistories = dict[str, list[tuple[str, str]]]  # The conversation with each policy.


class ChatEvents:
  """What happens on the page; each method returns or yields what is shown after it."""

  def __init__(self, chat: ChatSession, limits: ClipLimits):
    self.chat, self.limits = chat, limits

  def cleared(self) -> list[Any]:
    """No conversation: the histories, their windows, and the scores."""
    histories: ChatHistories = {name: [] for name in self.chat.policies}
    return [histories, *make_windows(histories), ""]

  def on_clip(self, path: str | None) -> list[Any]:
    """The clip's features, what is said of it, and no conversation."""
    if path is None:
      return [None, WELCOME, *self.cleared()]
    try:
      clip = read_clip(self.chat, path, self.limits)
    except UserError as error:
      return [None, f"⚠️ {error}", *self.cleared()]
    told = f"The models see {len(clip)} frames of the clip. Ask."
    return [clip, told, *self.cleared()]

  @no_type_check  # A checked function is no generator function to Gradio.
  def on_ask(
    self,
    question: str,
    clip: Features | None,
    histories: ChatHistories,
    temperature: float,
    max_tokens: int,
    samples: int,
  ) -> Iterator[list[Any]]:
    """The question's box, what is said of it, and the conversation as it grows."""
    same = [histories, *make_windows(histories), ""]
    if clip is None or not question.strip():
      why = "Upload a clip first." if clip is None else "Type a question."
      yield [question, f"⚠️ {why}", *same]
      return
    # The same question at the same place has the same answer.
    seed = len(next(iter(histories.values())))
    asked = ChatQuestion(question.strip(), temperature, int(max_tokens), samples, seed)
    now: dict[str, ChatAnswers] = {}
    try:
      for now in stream_side_by_side(self.chat, clip, histories, asked):
        grown = extend_histories(histories, asked, now)
        yield ["", format_progress(asked, now), histories, *make_windows(grown), ""]
    except UserError as error:
      yield [question, f"⚠️ {error}", *same]
      return
    grown = extend_histories(histories, asked, now)
    yield [
      "",
      format_progress(asked, now),
      grown,
      *make_windows(grown),
      format_scores(self.chat, now),
    ]


def extend_histories(
  histories: ChatHistories, asked: ChatQuestion, now: dict[str, ChatAnswers]
) -> ChatHistories:
  """The histories with a question and what has been said of it."""
  turn = lambda said: (asked.question, said.texts[said.best])
  return {name: [*histories[name], turn(said)] for name, said in now.items()}


def format_progress(asked: ChatQuestion, now: dict[str, ChatAnswers]) -> str:
  """How far the answers are."""
  if not all(said.done for said in now.values()):
    made = min(sum(said.stopped) for said in now.values())
    return "Answering …" if asked.samples == 1 else f"{made} of {asked.samples} answers"
  cut = [name for name, said in now.items() if not said.stopped[said.best]]
  return f"Cut at {asked.max_tokens} tokens: {', '.join(cut)}." if cut else "Done."


def make_windows(histories: ChatHistories) -> list[list[dict[str, str]]]:
  """Each conversation as its window takes it."""
  return [
    [
      {"role": role, "content": text}
      for turn in turns
      for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    for turns in histories.values()
  ]


def format_scores(chat: ChatSession, now: dict[str, ChatAnswers]) -> str:
  """The answers of each policy with their scores, as HTML."""
  if chat.judge is None:
    return ""
  rows = [
    f'<tr class="{"best" if best and len(said.texts) > 1 else "other"}">'
    f"<td>{html.escape(name)}</td><td>{score:.3f}</td><td>{html.escape(text)}</td></tr>"
    for name, said in now.items()
    for best, score, text in said.ranked()
  ]
  head = "<tr><th>Policy</th><th>Score</th><th>Answer</th></tr>"
  caption = f"<p>Scored by {html.escape(chat.judge.name)}</p>"
  return f"{caption}<table>{head}{''.join(rows)}</table>"


def make_chat_page(
  chat: ChatSession, limits: ClipLimits, *, title: str, asked: ChatQuestion
) -> gr.Blocks:
  """The page.

  Args:
    title: what there is to talk to.
    asked: whose settings it begins with.
  """
  talk = ChatEvents(chat, limits)
  with gr.Blocks(
    title="vlmrlaif_jax", analytics_enabled=False, delete_cache=(HOUR_S, 24 * HOUR_S)
  ) as page:
    clip, histories = gr.State(), gr.State(talk.cleared()[0])
    gr.Markdown(f"## Talk about a clip\n{html.escape(title)}")
    with gr.Row():
      with gr.Column(scale=1, min_width=280):
        video = gr.Video(
          label="Clip", sources=["upload"], height=260, buttons=[], elem_id="clip"
        )
        state = gr.Markdown(WELCOME, elem_id="state")
        question = gr.Textbox(
          label="Question",
          placeholder="What happens in the clip?",
          submit_btn="Ask",
          elem_id="question",
        )
        how = make_settings(chat, asked)
        again = gr.Button("Clear the conversation", size="sm", elem_id="clear")
      with gr.Column(scale=3, min_width=300):
        with gr.Row():
          shown = [make_window(name) for name in chat.policies]
        scores = gr.HTML(elem_id="scores")
    conversation = [histories, *shown, scores]
    video.change(talk.on_clip, video, [clip, state, *conversation])
    given, shows = [question, clip, histories, *how], [question, state, *conversation]
    question.submit(talk.on_ask, given, shows, show_progress="hidden")
    for clears in (again.click, *(each.clear for each in shown)):
      clears(talk.cleared, None, conversation)
  return page


def launch_page(
  page: gr.Blocks, *, host: str, port: int, max_mb: float, wait: bool = True
) -> None:
  """Shows the page.

  Args:
    port: 0 for any that is free.
    max_mb: of an upload.
    wait: until it is stopped.
  """
  page.queue(default_concurrency_limit=1)  # One answer at a time has the device.
  page.launch(
    server_name=host,
    server_port=port or None,
    share=False,
    max_file_size=int(max_mb * 1e6),
    footer_links=[],
    theme=THEME,
    css_paths=CSS,
    prevent_thread_lock=not wait,
  )


def make_settings(
  chat: ChatSession, asked: ChatQuestion
) -> list[gr.components.Component]:
  """Temperature, tokens at most, best of how many."""
  by = f"by {chat.judge.name}" if chat.judge else "needs a reward model"
  with gr.Accordion("How to answer", open=False):
    return [
      gr.Slider(
        0, 1.5, asked.temperature, step=0.1, label="Temperature (0: the likeliest)"
      ),
      gr.Slider(1, MAX_CHAT_TOKENS, asked.max_tokens, step=1, label="Tokens at most"),
      gr.Radio(
        SAMPLE_COUNTS,
        value=asked.samples if asked.samples in SAMPLE_COUNTS else 1,
        label="Best of",
        info=by,
        interactive=chat.judge is not None,
      ),
    ]


def make_window(name: str) -> gr.Chatbot:
  """Of the conversation with a policy; what is said is plain text."""
  return gr.Chatbot(
    label=name,
    height=380,
    min_width=260,
    render_markdown=False,
    feedback_options=None,
    buttons=[],
  )
