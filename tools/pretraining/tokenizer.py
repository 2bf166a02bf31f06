"""The tokenizer of the base model: the world's words, and bytes for other text."""

from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.pretraining import mix, scene_texts
from vlmrlaif_jax.data import prompts, templates, tokenization
from vlmrlaif_jax.data.world import scene

# As in LLaMA, "<unk>" is also the padding. transformers replaces IMAGE by video
# features; this project replaces types.VIDEO_TOKEN. The end of a caption has the
# highest id, because CLIP's text tower takes its features at that id's position.
UNK, BOS, EOS, IMAGE, END_OF_CAPTION = (
  "<unk>",
  "<s>",
  "</s>",
  "<image>",
  "<|endoftext|>",
)
CHAT_TEMPLATE = (
  "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
  "{% for part in content %}"
  "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}"
  "{% endfor %}{% endif %}{% endmacro %}"
  "{% for m in messages %}{% if m['role'] == 'user' %}"
  "{{ 'USER: ' + said(m['content']) }}{% else %}"
  "{{ ' ASSISTANT: ' + said(m['content']) + '</s>' }}"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def generate_texts(seed: int, *, scenes: int) -> Iterator[str]:
  """Yields texts with the words of the world's tasks and of both prompt styles.

  Args:
    seed: Seed of the scenes.
    scenes: Number of scenes.
  """
  rng = np.random.default_rng(seed)
  for _ in range(scenes):
    clip = scene.sample_scene(rng)
    tasks = mix.make_tasks(clip, rng, judging=True) + mix.make_image_tasks(clip, 0, rng)
    for task in tasks:
      yield " ".join(part for turn in task.turns for part in turn)
  for style in prompts.PROMPT_STYLES.values():
    yield from [*style] * 30
  for name in ("vicuna_v1", "brief"):
    pieces = tokenization.CONVERSATION_TEMPLATES[name]
    assert isinstance(pieces, templates.TemplatePieces)
    yield from [pieces.system, pieces.user, pieces.assistant, pieces.end] * 30
  yield scene_texts.make_caption(scene.sample_scene(rng), 0)


def train(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
  """Trains a tokenizer with at most `vocab` ids: 3 special, 256 bytes, then words."""
  special = [UNK, BOS, EOS]
  model = tokenizers.Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
  model.normalizer = normalizers.NFC()
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Metaspace(prepend_scheme="never"),
      pre_tokenizers.Split(tokenizers.Regex(r"[.,:?\n]"), "isolated"),
    ]
  )
  model.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab - 2,
    special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  fast = PreTrainedTokenizerFast(
    tokenizer_object=model,
    unk_token=UNK,
    bos_token=BOS,
    add_bos_token=True,
    eos_token=EOS,
    pad_token=UNK,
    padding_side="left",
    clean_up_tokenization_spaces=False,
  )
  fast.add_special_tokens({"additional_special_tokens": [IMAGE, END_OF_CAPTION]})
  fast.chat_template = CHAT_TEMPLATE
  return fast
