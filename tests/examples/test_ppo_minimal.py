"""The example of PPO on the public API."""

import numpy as np
import pytest

from examples import ppo_minimal
from vlmrlaif_jax.data.world import language, scene


def test_the_score_is_the_share_of_true_statements():
  truth = scene.sample_scene(np.random.default_rng(0))
  right = language.describe_scene(truth)
  texts = [right, "The sky is blue.", f"{right} The sky is blue.", ""]
  scores = ppo_minimal.make_truth_score([truth])(texts)
  count = len(language.split_claims(right))
  np.testing.assert_allclose(scores, [1, 0, count / (count + 1), 0], rtol=1e-6)


@pytest.mark.slow
def test_the_reward_rises():
  models = ppo_minimal.load_models()
  prompts, scenes = ppo_minimal.make_prompts(models, seed=0)
  score = ppo_minimal.make_truth_score(scenes)
  made = [m["reward"] for m in ppo_minimal.train(models, prompts, score, steps=5)]
  assert made[-1] > made[0] + 0.05
