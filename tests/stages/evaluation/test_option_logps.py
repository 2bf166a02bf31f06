"""Log-probabilities of options: of each alone, kept on disk, and none where cut."""

import jax
import numpy as np
import pytest

from tests.helpers.stage_runs import untrained_policy
from tests.methods.roles import noisy
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkQuestion
from vlmrlaif_jax.runtime import scoring
from vlmrlaif_jax.stages.evaluation import option_logps

OPTIONS = ("A", "B", "The red object is large.")


@pytest.fixture(scope="module")
def policy(one):
  return merge_params(one.base, noisy(untrained_policy(one), 4, 0.2))


@pytest.fixture
def ask(one, policy, tmp_path):
  """The choices of questions, kept in a file."""

  def asking(questions, batch=2):
    path, tell = tmp_path / "by_letter.jsonl", lambda done: None
    return option_logps.load_or_compute_option_logps(
      one, policy, questions, path, batch=batch, on_done=tell
    )

  return asking


def questions(one, text="How many objects move?"):
  videos = [example["video"] for example in one.splits.benchmark[:3]]
  return [
    BenchmarkQuestion(f"q{i}", video, text, OPTIONS) for i, video in enumerate(videos)
  ]


def test_logps_are_sums_over_an_options_tokens_without_its_end(one, policy, ask):
  asked = questions(one)
  last, apply = asked[-1], jax.jit(one.policy.apply)
  for option, value in zip(OPTIONS, ask(asked)[-1], strict=True):
    example = {"video": last.video, "question": last.text}
    batch = scoring.make_scored_batch(one, [example], [option])
    learned = np.flatnonzero(batch.loss_mask[0])
    assert batch.tokens[0, learned[-1]] == one.stops[0]
    logits = apply(policy, sharding.shard_batch(batch, one.mesh))
    each = np.asarray(jax.nn.log_softmax(logits[0].astype(np.float32)))
    right = sum(each[t - 1, batch.tokens[0, t]] for t in learned[:-1])
    np.testing.assert_allclose(value, right, rtol=2e-3, atol=2e-3)


def test_choices_are_kept_and_not_made_again(one, ask, monkeypatch):
  first = ask(questions(one))
  monkeypatch.setattr(
    option_logps, "compute_option_logps", lambda *_, **__: pytest.fail("made again")
  )
  assert ask(questions(one)) == first


def test_a_question_that_does_not_fit_has_no_choice(one, ask):
  short, *_ = questions(one)
  long = questions(one, "word " * one.config.data.prompt_len)[1]
  cut = short._replace(id="cut", options=("A", "red " * one.config.data.response_len))
  fitting, *others = ask([short, long, cut])
  assert len(fitting) == 3 and others == [None, None]
