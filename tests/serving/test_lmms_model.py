"""The model for lmms-eval, on its requests.

lmms-eval has some sixty dependencies, so that a stand-in takes the place of its base
class here. Instances are as those of lmms_eval.api.instance 0.7.3.
"""

import importlib
import math
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.helpers import chats
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.stages.evaluation import option_logps

QUESTION = "What happens in the video?"
TASK, SPLIT = "videos", "test"
SAMPLED = dict(do_sample=True, temperature=1.0, max_new_tokens=16)


class Instance(NamedTuple):
  """A request of lmms-eval, as far as models read it."""

  args: tuple


class Base:
  """What lmms_eval.api.model.lmms gives to its subclasses."""

  def __init__(self):
    self.task_dict = {}


def stand_in(**names):
  module = types.ModuleType("lmms_eval")
  vars(module).update(names)
  return module


@pytest.fixture(scope="module")
def lmms_model():
  with pytest.MonkeyPatch.context() as patch:
    modules = {
      "lmms_eval": stand_in(),
      "lmms_eval.api": stand_in(),
      "lmms_eval.api.instance": stand_in(Instance=Instance),
      "lmms_eval.api.model": stand_in(lmms=Base),
    }
    for name, module in modules.items():
      patch.setitem(sys.modules, name, module)
    yield importlib.import_module("vlmrlaif_jax.serving.lmms_model")
  del sys.modules["vlmrlaif_jax.serving.lmms_model"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  clip = str(chats.write_clip(folder / "clip.mp4"))
  red = Image.new("RGB", (40, 30), (200, 0, 0))
  return [[clip], [red], [red, red.rotate(90)], [str(folder / "missing.mp4")], []]


@pytest.fixture(scope="module")
def model(lmms_model, documents, one, tmp_path_factory):
  root = chats.workdir(one, tmp_path_factory.mktemp("lmms"))
  made = lmms_model.VlmRlaif(workdir=str(root), stage="grpo", batch_size=2)
  made.task_dict[TASK] = {SPLIT: documents}
  return made


def request(number, given, context=QUESTION):
  return Instance((context, given, lambda doc: doc, number, TASK, SPLIT))


def test_responses_are_in_the_order_of_the_requests(model):
  asked = [request(i, {"max_new_tokens": n}) for i, n in ((1, 8), (0, 4), (2, 8))]
  together = model.generate_until(asked)
  alone = [model.generate_until([each])[0] for each in asked]
  assert together == alone and all(together)


def test_placeholders_are_not_part_of_the_question(model):
  given = {"max_new_tokens": 8}
  marked = request(0, given, f"<image>\n{QUESTION}")
  assert model.generate_until([request(0, given)]) == model.generate_until([marked])


def test_a_repeated_request_is_sampled_again(model):
  said = model.generate_until([request(0, SAMPLED)] * 4)
  assert len(set(said)) > 1
  assert said == model.generate_until([request(0, SAMPLED)] * 4)


def test_a_response_ends_before_the_stop_string(model):
  (whole,) = model.generate_until([request(0, {"max_new_tokens": 8})])
  stop = whole[2:4]
  given = {"max_new_tokens": 8, "until": [stop]}
  assert model.generate_until([request(0, given)]) == [whole.split(stop)[0]]


def test_what_cannot_be_read_has_an_empty_response_and_infinite_loss(model):
  assert model.generate_until([request(3, {})]) == [""]
  assert model.loglikelihood([request(3, "A")]) == [(math.inf, False)]


def test_a_document_without_video_is_named(model):
  with pytest.raises(ValueError, match=f"{TASK} 4"):
    model.generate_until([request(4, {})])


def test_loss_is_the_mean_of_the_options_log_probabilities(model, documents):
  options = ["The red ring moves up.", "Nothing."]
  found = model.loglikelihood([request(0, f" {option}") for option in options])
  run, _ = model._read_requests([request(0, "").args])
  example = {"video": documents[0][0], "question": QUESTION}
  sums = option_logps.compute_option_logps(
    run, model.variables, [example] * 2, options, batch_size=2
  )
  encode = lambda option: tokenization.encode_conversation(
    run.tokenizer, run.template, [(QUESTION, option)], video=lay_out_features(1)
  )
  counts = [sum(encode(option).learn) - 1 for option in options]  # Without the end.
  want = -sums / counts
  np.testing.assert_allclose([loss for loss, _ in found], want, rtol=1e-4)


def test_the_greedy_response_is_found_greedy(model):
  (said,) = model.generate_until([request(0, {"max_new_tokens": 4})])
  target = lambda doc: said  # As a task of the type "loglikelihood" gives it.
  (first, second) = model.loglikelihood([request(0, target), request(0, "Nothing.")])
  assert first[1] and not second[1]


@pytest.mark.parametrize(
  ("given", "temperature", "max_new"),
  [
    ({}, 0.0, 1024),
    ({"temperature": 0, "max_new_tokens": 16}, 0.0, 16),
    ({"temperature": 0.7}, 0.7, 1024),
    ({"temperature": 0.7, "do_sample": False}, 0.0, 1024),
    ({"do_sample": True, "top_p": None}, 1.0, 1024),
  ],
)
def test_generation_settings_are_those_of_transformers(
  lmms_model, given, temperature, max_new
):
  found = lmms_model.read_decoding(given)
  assert (found.temperature, found.max_new, found.top_p) == (temperature, max_new, 1.0)


def test_beam_search_is_refused(lmms_model):
  with pytest.raises(ValueError, match="num_beams"):
    lmms_model.read_decoding({"num_beams": 4})


def test_a_stage_that_has_not_been_run_is_refused(lmms_model, model):
  with pytest.raises(UserError, match="run the stage ppo first"):
    lmms_model.VlmRlaif(workdir=str(model.run.workdir), stage="ppo")


def test_a_folder_without_a_run_is_refused(lmms_model, tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    lmms_model.VlmRlaif(workdir=str(tmp_path), stage="ppo")
