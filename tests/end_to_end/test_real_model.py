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
  return Both(model, variables, tokenizer, hf, Batch(no_video, *padded))


def sample(both, temperature):
  return jax.jit(
    functools.partial(
      sampling.generate, both.model, max_new=NEW, temperature=temperature,
      eos=tokenization.find_eos_id(both.tokenizer, TEMPLATE),
      pad=both.tokenizer.pad_token_id,
    )
  )(both.variables, both.prompts, jax.random.key(0))  # fmt: skip


@pytest.fixture(scope="module")
def greedy(both):
  return sample(both, 0.0).batch


def torch_logits(both, batch):
  """Logits of transformers, which counts positions from the mask."""
  mask = torch.tensor(np.asarray(batch.mask), dtype=torch.long)
  with torch.no_grad():
    return both.hf(
      torch.tensor(np.asarray(batch.tokens)),
      attention_mask=mask,
      position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits.numpy()


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


def test_greedy_answers_equal_transformers(both, greedy):
  start = both.prompts.tokens.shape[1]
  with torch.no_grad():
    out = both.hf.generate(
      torch.tensor(both.prompts.tokens),
      attention_mask=torch.tensor(both.prompts.mask, dtype=torch.long),
      max_new_tokens=NEW,
      do_sample=False,
      pad_token_id=both.tokenizer.pad_token_id,
    )
  said = both.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
  ours = tokenization.decode_responses(
    both.tokenizer, np.asarray(greedy.tokens), np.asarray(greedy.loss_mask)
  )
  assert ours == [text.strip() for text in said]
  assert "Paris" in ours[0]


def test_logits_equal_transformers(both, greedy):
  """Both round in float32; the largest logit is near 38."""
  hidden = both.model.apply(both.variables, greedy, method="hidden")
  logits = both.model.apply(both.variables, hidden, method="compute_logits")
  want = torch_logits(both, greedy)
  mask = np.asarray(greedy.mask)
  print(
    "largest",
    np.abs(want[mask]).max(),
    "difference",
    np.abs(np.asarray(logits)[mask] - want[mask]).max(),
  )
  top = np.sort(want[np.asarray(greedy.loss_mask)], axis=1)
  print("margin", (top[:, -1] - top[:, -2]).min())
  np.testing.assert_allclose(np.asarray(logits)[mask], want[mask], atol=5e-4, rtol=0)


def test_sampled_logps_equal_those_of_training_and_of_transformers(both):
  sampled = sample(both, 1.0)
  batch, start = sampled.batch, both.prompts.tokens.shape[1]
  mask = np.asarray(batch.loss_mask)
  trained, _ = sampling.compute_response_logps(
    both.model, both.variables, batch, start=start, chunk=32, temperature=1.0
  )
  logps = torch.log_softmax(torch.tensor(torch_logits(both, batch)), -1).numpy()
  want = np.take_along_axis(
    logps[:, :-1], np.asarray(batch.tokens)[:, 1:, None], axis=2
  )[..., 0]
  for found in (sampled.logps, trained):
    print("logps", np.abs(np.asarray(found)[mask] - want[mask[:, 1:]]).max())
    np.testing.assert_allclose(
      np.asarray(found)[mask], want[mask[:, 1:]], atol=5e-4, rtol=0
    )
