"""PPO step by step, with the public API.

python examples/ppo_minimal.py

The policy is the small video-language model that the package ships. It describes clips
of the embedded world. The reward is the share of a description's claims that are true
of the clip. It rises within two minutes on a CPU.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from vlmrlaif_jax.core.types import Batch, Loss, Params, Rollout, merge_params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens, lay_out_features
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.losses import policy as policy_losses
from vlmrlaif_jax.losses.advantages import (
  compute_gae,
  compute_token_rewards,
  estimate_kl,
)
from vlmrlaif_jax.losses.masked import masked_mean, masked_whiten
from vlmrlaif_jax.methods.ppo import compute_state_values
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.sampling.generate import compute_response_logps, generate
from vlmrlaif_jax.training import update

CLIPS, SAMPLES, FRAMES = 8, 4, 12
PROMPT_LEN, RESPONSE_LEN = 56, 48  # Tokens; a prompt includes the video's.
TEMPERATURE, KL_COEF, CLIP_EPS, VALUE_COEF, EPOCHS = 1.0, 0.02, 0.2, 0.1, 2
OPTIMIZER = update.default_config()
OPTIMIZER.learning_rate = 1e-3

Score = Callable[[Sequence[str]], Float[np.ndarray, " batch"]]


class Models(NamedTuple):
  """A policy, a critic on the same frozen base, and a tokenizer."""

  policy: VLM
  critic: VLM
  base: Params
  tokenizer: tokenization.PreTrainedTokenizerBase


def load_models() -> Models:
  """Loads the checkpoint that the package ships."""
  folder = run.resolve_checkpoint("builtin:tiny")
  loaded, base, _ = convert.load_checkpoint(folder, dtype="float32")
  policy = loaded.clone(llm=loaded.llm.clone(rank=8))
  critic = policy.clone(scalar_head=True)
  return Models(policy, critic, base, tokenization.load_tokenizer(folder))


def init_params(models: Models, prompts: Batch) -> Params:
  """Initializes the trained parameters: the policy's LoRA and the critic's head."""
  keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
  variables = jax.jit(models.critic.init)(keys, prompts)
  head = jax.tree.map(jnp.zeros_like, variables["params"]["head"])
  return {"policy": {"lora": variables["lora"]}, "critic": {"params": {"head": head}}}


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
  """Resizes square frames to `size` by `size` pixels."""
  images = map(Image.fromarray, frames)
  return np.stack([np.asarray(image.resize((size, size))) for image in images])


def make_prompts(models: Models, seed: int) -> tuple[Batch, list[scene.Scene]]:
  """Renders clips and returns one prompt for each, with the scenes.

  Args:
    models: Models whose vision tower encodes the clips.
    seed: Seed of the scenes.
  """
  rng = np.random.default_rng(seed)
  scenes = [scene.sample_scene(rng) for _ in range(CLIPS)]
  size = models.policy.vision.image
  at = video.sample_frame_indices(scene.SCENE_FRAMES, FRAMES)
  clips = [resize_frames(scene.render_scene(each)[at], size) for each in scenes]
  clips = np.stack(clips)
  features = models.policy.apply(models.base, jnp.asarray(clips), method="encode")
  row = tokenization.encode_conversation(
    models.tokenizer,
    tokenization.CONVERSATION_TEMPLATES["brief"],
    [(language.DESCRIBE_EVENTS, None)],
    video=lay_out_features(count_pooled_tokens(FRAMES, features.shape[2])),
  )
  rows = tokenization.pad_rows(
    [row] * CLIPS,
    prompt_len=PROMPT_LEN,
    response_len=0,
    pad=models.tokenizer.pad_token_id,
  )
  return Batch(features, *map(jnp.asarray, rows)), scenes


def make_truth_score(scenes: Sequence[scene.Scene]) -> Score:
  """Returns a function that scores descriptions by their share of true claims.

  The function receives `SAMPLES` descriptions of each scene, in order of the scenes.
  """
  described = [language.describe_scene(each) for each in scenes for _ in range(SAMPLES)]
  truths = [set(language.split_claims(text)) for text in described]

  def score(texts):
    claims = [language.split_claims(text) for text in texts]
    shares = [
      np.mean([claim in true for claim in each]) if each else 0
      for each, true in zip(claims, truths, strict=True)
    ]
    return np.array(shares, np.float32)

  return score


def train(
  models: Models, prompts: Batch, score: Score, *, steps: int
) -> Iterator[dict[str, float]]:
  """Runs PPO with rewards from a function of text; yields the metrics of each step."""
  policy, critic, base, tokenizer = models
  end = tokenization.find_eos_id(
    tokenizer, tokenization.CONVERSATION_TEMPLATES["brief"]
  )
  logps_kwargs = dict(start=PROMPT_LEN, chunk=RESPONSE_LEN, temperature=TEMPERATURE)

  @jax.jit
  def sample(params: Params, base: Params, key: Array):
    kwargs = dict(max_new=RESPONSE_LEN, temperature=TEMPERATURE, samples=SAMPLES)
    ids = dict(stops=(end,), pad=tokenizer.pad_token_id, vocab=len(tokenizer))
    return generate(
      policy, merge_params(base, params["policy"]), prompts, key, **kwargs, **ids
    )

  @jax.jit
  def prepare_rollout(params: Params, base: Params, sampled, scores: Array):
    batch, old_logps = sampled
    # The reference policy is the base without LoRA.
    ref_logps, _ = compute_response_logps(policy, base, batch, **logps_kwargs)
    values = compute_state_values(critic, merge_params(base, params["critic"]), batch)
    kl = estimate_kl(old_logps, ref_logps, estimator="k1")
    rewards = compute_token_rewards(scores, kl, batch.loss_mask, kl_coef=KL_COEF)
    advantages, returns = compute_gae(
      rewards, values, batch.loss_mask, gamma=1.0, lam=0.95
    )
    advantages = masked_whiten(advantages, batch.loss_mask)
    weights = jnp.ones_like(advantages)  # The trained model itself samples.
    rollout = Rollout(batch, old_logps, ref_logps, values, advantages, returns, weights)
    return rollout, jnp.mean(jnp.sum(kl, axis=1, where=batch.loss_mask))

  def loss(params: Params, base: Params, rollout: Rollout) -> Loss:
    batch, mask = rollout.batch, rollout.batch.loss_mask
    logps, _ = compute_response_logps(
      policy, merge_params(base, params["policy"]), batch, **logps_kwargs
    )
    values = compute_state_values(critic, merge_params(base, params["critic"]), batch)
    policy_loss = policy_losses.clipped_policy_loss(
      logps, rollout.old_logps, rollout.advantages, clip_eps=CLIP_EPS
    )
    value_loss = policy_losses.clipped_value_loss(
      values, rollout.old_values, rollout.returns, clip_eps=CLIP_EPS
    )
    mean = masked_mean(policy_loss + VALUE_COEF * value_loss, mask)
    return Loss(mean, jnp.sum(mask).astype(jnp.float32), {})

  optimizer = update.make_optimizer(OPTIMIZER, steps=1000)
  state = update.init_state(init_params(models, prompts), optimizer)
  step_fn = jax.jit(update.make_update(loss, optimizer))
  for step in range(steps):
    sampled = sample(state.params, base, jax.random.fold_in(jax.random.key(2), step))
    tokens, mask = np.asarray(sampled.batch.tokens), np.asarray(sampled.batch.loss_mask)
    scores = score(tokenization.decode_responses(tokenizer, tokens, mask))
    rollout, kl = prepare_rollout(state.params, base, sampled, scores)
    for _ in range(EPOCHS):
      state, metrics = step_fn(state, base, rollout)
    yield {"reward": scores.mean(), "kl": kl, "loss": metrics["loss"]}


def main() -> None:
  """Trains the policy and prints the metrics of each step."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=15, help="Steps of PPO.")
  steps = parser.parse_args().steps
  models = load_models()
  prompts, scenes = make_prompts(models, seed=0)
  score = make_truth_score(scenes)
  for step, metrics in enumerate(train(models, prompts, score, steps=steps)):
    line = "  ".join(f"{name} {float(value):.3f}" for name, value in metrics.items())
    print(f"step {step:2d}  {line}", flush=True)


if __name__ == "__main__":
  main()
