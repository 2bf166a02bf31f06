"""Texts that are hard to tokenize, and small tokenizers of each kind to read them.

LLaMA's kind is trained by sentencepiece, and puts a space before the first piece of a
text alone, or ("legacy") before every piece; Qwen's kind is of bytes.
"""

import io
import json
import random

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features

CORPUS = [
  "USER: What is the small red ring doing? ASSISTANT: It moves left.",
  "A chat between a curious human and an artificial intelligence assistant.",
  "naïve café 猫が二匹。 ###Human: hello ###Assistant: </s> <image> <|im_end|>",
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
] * 20
CHATML = (
  "{% for m in messages %}{% if loop.first %}<|im_start|>system\n"
  "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
  "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
  "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
  "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
  "{% endfor %}"
)
SPECIAL = ("</s>", "<s>", "<unk>", "<image>", "<|im_end|>", "<|im_start|>",
           "<|endoftext|>", "<0x41>")  # fmt: skip


def tricky_strings():
  """200 of them: ingredients by hand, and what a seed makes of two to four each."""
  ingredients = [
    "", "   ", "\n\t ", "a ring", " leading", "trailing  ", "\n\nlines\n",
    "tabs\tin it", "a  b   c", "line\r\nend", "naïve café", "\u0301mark",
    "cafe\u0301 e\u0301\u0323", "猫が二匹。", "한국어", "مرحبا بالعالم",
    "\u202eright to left\u202c", "🙂 \U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3",
    "zero\u200bwidth\u200d\ufeff", "nul\0in it", "USER:", "ASSISTANT: no", "###", "#",
    "### Human: hi", "[INST] x [/INST]", "{{ messages }}{% if %}", "\u00a0\u3000",
    "\\n 'quoted' \"so\"", "x" * 700, "word " * 150, "<", "s>", "1234567.89", *SPECIAL,
    "<<|im_end|>>", "</s></s>", "a</s>b", "<image>\nWhat?", "\ufffd\ue000",
  ]  # fmt: skip
  rng, found = random.Random(0), dict.fromkeys(ingredients)  # In order, each once.
  while len(found) < 200:
    some = rng.choices(ingredients, k=rng.randint(2, 4))
    found[rng.choice(["", " ", "\n"]).join(some)] = None
  return list(found)


def talks_of(strings):
  """Each string once as the first question, the first answer, the second of both."""
  at = range(len(strings))
  return [[(strings[i], strings[i - 1]), (strings[i - 2], strings[i - 3])] for i in at]


def stripped(talk):
  return [(question.strip(), answer.strip()) for question, answer in talk]


STRINGS = tricky_strings()
TALKS = talks_of(STRINGS)
SOME = TALKS[::4]  # Where the claim is the simpler, and holds for many pairs of things.
# Nothing in them is special to any tokenizer, so that one can read them as a whole.
ORDINARY = talks_of([said for said in STRINGS if not any(s in said for s in SPECIAL)])


def sentencepiece_model():
  """A sentencepiece model as LLaMA's: BPE, bytes for what is rare."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS), model_writer=out, model_type="bpe", vocab_size=450,
    byte_fallback=True, normalization_rule_name="identity", split_digits=True,
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    character_coverage=0.99, minloglevel=2,
  )  # fmt: skip
  return out.getvalue()


def llama(folder, spoken, *, legacy):
  config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
  folder.mkdir()
  (folder / "tokenizer.model").write_bytes(spoken)
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "chat_template.jinja").write_text(INSTRUCT)
  return tokenization.load_tokenizer(folder)


def with_rules_of_qwen(model):
  """A tokenizer of Qwen's rules that has no special token."""
  rules = Qwen2Tokenizer().backend_tokenizer
  model.normalizer, model.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
  return model


def bytes_model():
  """Qwen's rules with a small vocabulary."""
  model = with_rules_of_qwen(tokenizers.Tokenizer(models.BPE()))
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )  # fmt: skip
  model.train_from_iterator(CORPUS, trainer)
  return model


def qwen(folder, model):
  spec = json.loads(model.to_str())["model"]
  made = Qwen2Tokenizer(
    vocab=spec["vocab"], merges=[tuple(m) for m in spec["merges"]],
    eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>", "<image>"],
  )  # fmt: skip
  made.chat_template = CHATML
  made.save_pretrained(folder)
  return tokenization.load_tokenizer(folder)


# What tests compare.


def ours(tokenizer, name, talk, video_tokens=1):
  template = tokenization.get_template(name)
  return tokenization.encode_conversation(
    tokenizer, template, talk, video=lay_out_features(video_tokens)
  )


def answered(talks):
  """A turn of "" ends at once; a chat template may write a space before its end."""
  return [talk for talk in talks if all(answer for _, answer in stripped(talk))]


def messages(talk):
  roles = ("user", "assistant")
  return [
    {"role": role, "content": words}
    for turn in talk
    for role, words in zip(roles, turn, strict=True)
  ]


def ids_where_nothing_typed_is_special(parts, markers, read):
  """Ids of a prompt whose special tokens are those of the template alone.

  Args:
    markers: text of special token -> id.
    read: (text between two of them, whether it is the first of its string) -> ids.
  """
  # What was said is put in after the template's own text is cut at its markers.
  runs, ids = [""], []
  for words, typed in parts:
    while not typed and (at := first_marker(words, markers)):
      start, marker = at
      runs[-1] += words[:start]
      runs += [marker, ""]
      words = words[start + len(marker) :]
    runs[-1] += words
  first = True
  for i, run in enumerate(runs):
    if i % 2:
      ids.append(markers[run])
      first = run == "<image>"  # What is after the image is a string by itself.
    elif run:
      ids += read(run, first)
  return ids


def first_marker(words, markers):
  found = [(words.index(m), m) for m in markers if m in words]
  return min(found) if found else None
