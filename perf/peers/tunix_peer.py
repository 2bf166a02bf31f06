"""Runs Tunix's GRPO learner and its sampler as a peer of perf/main.py.

perf/bench.py starts this script in an environment with google-tunix. The model is
Tunix's Llama 3 of random weights, with Qwix's LoRA on the same matrices as ours. A step
is what GRPOLearner.train does between reading one batch of prompts and the next.
"""

import logging
import time

import jax
import numpy as np
import optax
import protocol
import qwix
from flax import nnx
from tunix.generate import sampler, tokenizer_adapter
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

NEVER = 2**30  # An EOS id outside the vocabulary, so that responses have full length.
MATRICES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
  """Runs the requested job."""
  connection = protocol.connect()
  logging.disable(logging.WARNING)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  with jax.set_mesh(mesh):
    JOBS[connection.job["what"]](connection, mesh)


def get_software() -> str:
  """Returns the versions of Tunix and JAX."""
  from importlib.metadata import version

  return f"google-tunix {version('google-tunix')}, jax {jax.__version__}"


class Words:
  """A tokenizer of one token per word: "7 12 9" is the ids 7, 12 and 9."""

  def encode(self, text: str, **_) -> list[int]:
    """Returns the numbers in a text as token ids."""
    return [int(word) for word in text.split()]

  def decode(self, ids, **_) -> str:
    """Returns token ids as a text of numbers."""
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    """Returns the id that starts a text."""
    return 1

  def eos_id(self) -> int:
    """Returns an id that no response contains."""
    return NEVER

  def pad_id(self) -> int:
    """Returns the id of padding."""
    return 0


def make_model(job: dict) -> llama3.Llama3:
  """Creates a random model without LoRA; Tunix would leave some weights zero."""
  config = llama3.ModelConfig(
    num_layers=job["layers"],
    vocab_size=job["vocab"],
    embed_dim=job["embed"],
    hidden_dim=job["mlp"],
    num_heads=job["heads"],
    head_dim=job["embed"] // job["heads"],
    num_kv_heads=job["kv_heads"],
    rope_theta=10_000,
    norm_eps=1e-5,
    remat_config=llama3.RematConfig["NONE" if job["remat"] == "none" else "DECODER"],
  )
  model = llama3.Llama3(config, rngs=nnx.Rngs(0))
  key = jax.random.key(0)
  fill = lambda x: (
    x if x.ndim == 1 else 0.02 * jax.random.normal(key, x.shape, job["dtype"])
  )
  nnx.update(model, jax.tree.map(fill, nnx.state(model)))
  return model


def add_lora(job: dict, model: llama3.Llama3) -> llama3.Llama3:
  """Returns the model with LoRA."""
  provider = qwix.LoraProvider(
    module_path=MATRICES, rank=job["rank"], alpha=2.0 * job["rank"]
  )
  return qwix.apply_lora_to_model(
    model, provider, **model.get_model_input(), rngs=nnx.Rngs(1)
  )


def make_prompts(job: dict, count: int) -> list[str]:
  """Creates prompts of random words; the sampler adds BOS in front."""
  rng = np.random.default_rng(0)
  rows = rng.integers(2, job["vocab"], (count, job["prompt"] - 1))
  return [" ".join(map(str, row)) for row in rows]


def count_slots(job: dict) -> int:
  """Returns the cache slots of a row."""
  return job["prompt"] + job["new"]


def run_grpo(connection: protocol.Connection, mesh: jax.sharding.Mesh) -> None:
  """Runs steps of GRPOLearner."""
  job = connection.job
  token_counts = []  # Tokens of each step's responses.

  def reward(prompts, completions, **_):
    tokens = [len(text.split()) for text in completions]
    token_counts.append(sum(tokens))
    return [float(sum(map(int, text.split())) % 97) for text in completions]

  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=job["new"],
    max_prompt_length=job["prompt"],
    kv_cache_size=count_slots(job),
    temperature=1.0,
    top_p=1.0,
    eos_tokens=[NEVER],
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-5))
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optimizer,
    eval_every_n_steps=10**9,
    max_steps=10**9,
  )
  base = make_model(job)
  roles = (
    rl_cluster.Role.ACTOR,
    rl_cluster.Role.REFERENCE,
    rl_cluster.Role.ROLLOUT,
  )
  cluster = rl_cluster.RLCluster(
    actor=add_lora(job, base),
    reference=base,
    tokenizer=Words(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(roles, mesh),
      rollout_engine="vanilla",
      training_config=training,
      rollout_config=rollout,
    ),
  )
  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    reward_fns=reward,
    algo_config=grpo_learner.GRPOConfig(num_generations=job["group"], beta=0.04),
  )
  prompts = np.array(make_prompts(job, job["prompts"]))
  versions = get_software()

  def batches():
    start = protocol.wait()
    while True:
      yield {"prompts": prompts}
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      seconds = time.perf_counter() - start
      connection.reply(seconds=seconds, tokens=token_counts[-1], software=versions)
      start = protocol.wait()

  learner.train(batches())


def run_sampling(connection: protocol.Connection, mesh: jax.sharding.Mesh) -> None:
  """Runs the sampler."""
  job = connection.job
  cache = sampler.CacheConfig(
    cache_size=count_slots(job),
    num_layers=job["layers"],
    num_kv_heads=job["kv_heads"],
    head_dim=job["embed"] // job["heads"],
  )
  model = add_lora(job, make_model(job))
  words = tokenizer_adapter.TokenizerAdapter(Words())
  answer = sampler.Sampler(model, words, cache)
  prompts = make_prompts(job, job["rows"])

  def run() -> int:
    out = answer(
      prompts,
      max_generation_steps=job["new"],
      max_prompt_length=job["prompt"],
      temperature=1.0,
      top_p=1.0,
      eos_tokens=[NEVER],
      seed=jax.random.key(0),
    )
    return sum(map(len, out.tokens))

  protocol.serve(connection, run, software=get_software())


JOBS = {"grpo": run_grpo, "sample": run_sampling}

if __name__ == "__main__":
  main()
