"""Writes a conversation template in Jinja, for transformers and serving engines.

`write_chat_template` is the main function. It checks that a tokenizer with the Jinja
template returns the token ids of `tokenization.encode_conversation`.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates, tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.data.templates import Turns

IMAGE_MARK = "<image>"  # Token that marks an image in transformers.
# Messages with content as a string: an image precedes the text of its message.
_MESSAGES = """\
{%- set ns = namespace(messages=[], text='') -%}
{%- for m in messages -%}
  {%- if m['content'] is string -%}
    {%- set ns.text = m['content'] | trim -%}
  {%- else -%}
    {%- set ns.text = '' -%}
    {%- for c in m['content'] -%}
      {%- if c['type'] == 'text' -%}{%- set ns.text = ns.text + c['text'] -%}
      {%- elif c['type'] not in ['image', 'image_url'] -%}
        {{- raise_exception('content must have the type text or image, not '
          + c['type'] + '. Give the frames of a video as images') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set ns.text = ns.text | trim -%}
    {%- for c in m['content'] -%}
      {%- if c['type'] in ['image', 'image_url'] -%}
        {%- set ns.text = <IMAGE> + ns.text -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set ns.messages = ns.messages + [{'role': m['role'], 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
{{- <BOS> -}}
"""
_TURNS = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {{- (<SYSTEM_START> + messages[0]['content'] + <SYSTEM_END>).lstrip() -}}
  {%- set messages = messages[1:] -%}
{%- else -%}
  {{- <SYSTEM> -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('roles must alternate: user, assistant, user, ...') -}}
  {%- endif -%}
  {%- if m['role'] == 'user' -%}
    {{- (<BETWEEN> if not loop.first else '') + <USER> + m['content'] -}}
    {%- if not loop.last or add_generation_prompt -%}{{- <ASSISTANT> -}}{%- endif -%}
  {%- else -%}
    {{- (<LEAD> + m['content'] if m['content'] else '') + <END> -}}
  {%- endif -%}
{%- endfor -%}
"""
# Conversations whose ids are compared: texts that begin with a letter, a digit, white
# space or a line break after the image, in one turn and in several.
_PROBES: tuple[Turns, ...] = (
  [("What is it?", None)],
  [(" 2 dogs,\n\nor 3? ", None)],
  [("What is it?", "A dog."), ("Why?", " It barks. "), ("Sure?", None)],
)
Messages: TypeAlias = list[dict[str, Any]]


def write_chat_template(
  exported: PreTrainedTokenizerBase,
  tokenizer: PreTrainedTokenizerBase,
  template: templates.Template,
) -> str:
  """Returns a Jinja template with the token ids of the policy's own prompts.

  A policy's prompt consists of BOS and two texts, before and after the video, and some
  tokenizers put a space before each text. In Jinja it is one text, whose only pieces
  are those between special tokens. So the spaces depend on the tokenizer, and the
  function selects the first variant whose ids are the same.

  Args:
    exported: Tokenizer of the exported folder, with IMAGE_MARK.
    tokenizer: Tokenizer of the run.
    template: Conversation template of the run.

  Raises:
    UserError: No variant has the same ids.
  """
  for text in _list_variants(tokenizer, template):
    if all(
      _encode_messages(exported, text, turns, has_video)
      == encode_with_image(exported, tokenizer, template, turns, has_video)
      for turns, has_video in itertools.product(_PROBES, (False, True))
    ):
      return text
  raise UserError(
    "no chat template of the export has the token ids of the policy's prompts with the "
    f"{type(tokenizer).__name__} of {tokenizer.name_or_path}. Serve the policy with "
    "launch/chat.py --workdir."
  )


def encode_with_image(
  exported: PreTrainedTokenizerBase,
  tokenizer: PreTrainedTokenizerBase,
  template: templates.Template,
  turns: Turns,
  has_video: bool,
) -> list[int]:
  """Returns the ids of the policy's prompt, with IMAGE_MARK as the video's only id."""
  image = exported.get_vocab()[IMAGE_MARK]
  ids = tokenization.encode_conversation(
    tokenizer, template, turns, video=lay_out_features(int(has_video))
  ).ids
  return [image if i == VIDEO_TOKEN else i for i in ids]


def _encode_messages(
  exported: PreTrainedTokenizerBase, text: str, turns: Turns, has_video: bool
) -> list[int] | None:
  """Returns the ids of transformers; None if its processor has others.

  A tokenizer never adds special tokens to a rendered text. A processor lets the
  tokenizer add them unless the text begins with BOS.
  """
  messages = make_messages(turns, has_video)
  rendered = str(
    exported.apply_chat_template(
      messages, chat_template=text, tokenize=False, add_generation_prompt=True
    )
  )
  ids = exported(rendered, add_special_tokens=False).input_ids
  bos = exported.bos_token
  if bos is None or not rendered.startswith(bos):
    return ids if exported(rendered).input_ids == ids else None
  return ids


def make_messages(turns: Turns, has_video: bool) -> Messages:
  """Returns turns as messages; an image in the first one stands for the video."""
  messages: Messages = []
  for question, answer in turns:
    parts = [{"type": "text", "text": question}]
    if has_video and not messages:
      parts.insert(0, {"type": "image"})
    messages.append({"role": "user", "content": parts})
    if answer is not None:
      messages.append({"role": "assistant", "content": answer})
  return messages


def _list_variants(
  tokenizer: PreTrainedTokenizerBase, template: templates.Template
) -> Iterator[str]:
  """Yields the template without BOS and with it, with the possible spaces."""
  bos = tokenizer.bos_token
  starts: Sequence[str] = ("",) if bos is None else ("", bos, f"{bos} ")
  if isinstance(template, templates.TemplatePieces):
    turns = _fill(_TURNS, **_name_pieces(template))
  else:
    turns = tokenizer.get_chat_template()
  for start, space in itertools.product(starts, ("", " ")):
    image = f"{IMAGE_MARK}{space}\n"
    yield _fill(_MESSAGES, image=image, bos=start) + turns


def _name_pieces(pieces: templates.TemplatePieces) -> dict[str, str]:
  start, end = templates.split_system(pieces)
  return {**pieces._asdict(), "system_start": start, "system_end": end}


def _fill(text: str, **values: str) -> str:
  """Replaces each <NAME> by a value, as a string of Jinja."""
  for name, value in values.items():
    text = text.replace(f"<{name.upper()}>", json.dumps(value, ensure_ascii=False))
  return text
