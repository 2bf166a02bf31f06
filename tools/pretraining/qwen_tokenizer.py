"""The tokenizer of the base model in Qwen3-VL's layout."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmrlaif_jax.data.templates import TemplatePieces

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO]

# Qwen3-VL's turns. It has no system text of its own.
TEMPLATE = TemplatePieces(
  "",
  f"{START}user\n",
  f"{END}\n{START}assistant\n",
  "",
  END,
  "\n",
)
CHAT_TEMPLATE = """\
{%- macro write(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {{- write(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# The seconds and the tenths of a time such as "<1.5 seconds>" are a token each.
WORDS = r"<\d|\.\d| ?\p{L}+>?|\s|."


def train(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
  """Trains a tokenizer with at most `vocab` ids: 256 bytes, words, and Qwen's tokens.

  Args:
    texts: Texts with the words of the model's tasks.
    vocab: Largest number of ids.
  """
  model = tokenizers.Tokenizer(models.BPE())
  bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"), bytes_only]
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab - len(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([*texts, *_make_frequent_texts()], trainer)
  model.add_special_tokens(SPECIAL)
  return PreTrainedTokenizerFast(
    tokenizer_object=model,
    eos_token=END,
    pad_token=PAD,
    additional_special_tokens=SPECIAL,
    padding_side="left",
    clean_up_tokenization_spaces=False,
    chat_template=CHAT_TEMPLATE,
  )


def _make_frequent_texts() -> list[str]:
  """Returns the texts of turns and of times, so often that they become tokens."""
  times = [f"<{tenths / 10:.1f} seconds>" for tenths in range(100)]
  return (times + ["user\nassistant\n"] * 10) * 30
