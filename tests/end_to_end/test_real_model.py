"""A published language model reads and writes as in transformers.

The weights are SmolLM2-135M-Instruct's, 30 layers. The tower is the shipped CLIP, which
text alone does not use.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import real_model
from vlmrlaif_jax import data
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.runtime import loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.sampling import generate as sampling

pytestmark = pytest.mark.real_model

TOWER = pathlib.Path(data.__file__).parents[1] / "assets" / "tiny" / "clip"
TEMPLATE = tokenization.get_template("chat_template")
NEW = 64
ATOL = 5e-4
QUESTIONS = (
  "What is the capital of France?",
  "Name three colors of the rainbow.",
  "Why is the sky blue?",
  "Write a haiku about the sea.",
  "How many days are in a week?",
  "Translate 'good morning' to Spanish.",
  "What is 12 times 7?",
  "Explain photosynthesis to a child.",
  "List the planets of the solar system.",
  "Who wrote Romeo and Juliet?",
  "Give me a recipe for pancakes.",
  "What does a veterinarian do?",
  "Write a Python function that adds two numbers.",
  "Summarize: The cat sat on the mat. It was warm. It fell asleep.",
  "Is a tomato a fruit or a vegetable?",
  "Tell me a short story about a dragon.",
  "What is the opposite of 'ancient'?",
  "猫は何匹いますか。",
  "Fix the grammar: she go to school yesterday",
  "What happens when water is heated to 100 degrees Celsius?",
)


class Both(NamedTuple):
  """The model here and in transformers, with prompts on the left of `NEW` columns."""

  model: object
  variables: dict
  tokenizer: object
  hf: object
  prompts: Batch


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # Two would wait for each other on a busy machine.
  folder = real_model.write_smollm2(tmp_path_factory.mktemp("real") / "smollm2")
  settings = run_lib.default_config()
  settings.update(path=str(folder), tower=str(TOWER), dtype="float32")
  settings.update(lora_rank=0, lora_alpha=1.0)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model, variables, _ = loading.load_model(settings, folder, mesh, note=print)
  tokenizer = tokenization.load_tokenizer(folder)
  hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  rows = [
    tokenization.encode_conversation(tokenizer, TEMPLATE, [(question, None)])
    for question in QUESTIONS
  ]
  length = max(len(row.ids) for row in rows)
  padded = tokenization.pad_rows(
    rows, prompt_len=length, response_len=0, pad=tokenizer.pad_token_id
  )
  no_video = np.zeros((len(rows), 1, 1, model.vision.channels), np.float16)
  yield Both(model, variables, tokenizer, hf, Batch(no_video, *padded))
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def greedy(both):
  """Greedy answers, with the log-probabilities of the sampler."""
  generate = functools.partial(
    sampling.generate,
    both.model,
    max_new=NEW,
    temperature=0.0,
    stops=(tokenization.find_eos_id(both.tokenizer, TEMPLATE),),
    pad=both.tokenizer.pad_token_id,
  )
  return jax.jit(generate)(both.variables, both.prompts, jax.random.key(0))


@pytest.fixture(scope="module")
def want(both, greedy):
  """Logits of transformers for prompts and greedy answers, without a cache."""
  mask = torch.tensor(np.asarray(greedy.batch.mask), dtype=torch.long)
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  tokens = torch.tensor(np.asarray(greedy.batch.tokens))
  with torch.no_grad():
    out = both.hf(tokens, attention_mask=mask, position_ids=positions)
  return out.logits.numpy()


def test_prompts_have_the_ids_of_transformers(both):
  for question, row, mask in zip(
    QUESTIONS, both.prompts.tokens, both.prompts.mask, strict=True
  ):
    want = both.tokenizer.apply_chat_template(
      [{"role": "user", "content": question}],
      add_generation_prompt=True,
      return_dict=False,
    )
    assert row[mask].tolist() == want


def test_logits_equal_transformers(both, greedy, want):
  """Both round in float32; the largest logit is near 38."""
  hidden = both.model.apply(both.variables, greedy.batch, method="hidden")
  logits = both.model.apply(both.variables, hidden, method="compute_logits")
  mask = np.asarray(greedy.batch.mask)
  print("largest", np.abs(want[mask]).max())
  print("difference", np.abs(np.asarray(logits)[mask] - want[mask]).max())
  np.testing.assert_allclose(np.asarray(logits)[mask], want[mask], atol=ATOL, rtol=0)


def test_each_greedy_token_is_the_likeliest_of_transformers(greedy, want):
  tokens, mask = (np.asarray(x) for x in (greedy.batch.tokens, greedy.batch.loss_mask))
  assert mask.sum() > 500
  top = np.sort(want[:, :-1][mask[:, 1:]], axis=1)[:, -2:]
  print("least margin", np.diff(top).min(), "tokens", mask.sum())
  np.testing.assert_array_equal(want[:, :-1].argmax(-1)[mask[:, 1:]], tokens[mask])


def test_logps_of_sampling_equal_those_of_training_and_of_transformers(
  both, greedy, want
):
  batch, start = greedy.batch, both.prompts.tokens.shape[1]
  mask = np.asarray(batch.loss_mask)
  trained, _ = sampling.compute_response_logps(
    both.model, both.variables, batch, start=start, chunk=32, temperature=1.0
  )
  rows = torch.tensor(want[:, :-1][mask[:, 1:]])
  tokens = torch.tensor(np.asarray(batch.tokens)[mask])[:, None]
  logps = torch.log_softmax(rows, -1).gather(1, tokens)[:, 0]
  for found in (greedy.logps, trained):
    print("logps", np.abs(np.asarray(found)[mask] - logps.numpy()).max())
    np.testing.assert_allclose(np.asarray(found)[mask], logps, atol=ATOL, rtol=0)


def test_greedy_texts_equal_transformers(both, greedy):
  start = both.prompts.tokens.shape[1]
  out = both.hf.generate(
    torch.tensor(both.prompts.tokens),
    attention_mask=torch.tensor(both.prompts.mask, dtype=torch.long),
    max_new_tokens=NEW,
    do_sample=False,
    pad_token_id=both.tokenizer.pad_token_id,
  )
  said = both.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
  ours = tokenization.decode_responses(
    both.tokenizer, np.asarray(greedy.batch.tokens), np.asarray(greedy.batch.loss_mask)
  )
  assert ours == [text.strip() for text in said]
  assert "Paris" in ours[0]
