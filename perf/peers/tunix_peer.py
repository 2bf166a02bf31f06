"""Tunix's GRPO learner and its sampler, as a peer of perf/main.py.

Runs in an environment that holds google-tunix, and is started by perf/bench.py.
The model is Tunix's Llama 3 of random weights, with Qwix's LoRA on the same matrices.
A step is all that GRPOLearner.train does between asking for one batch of prompts and
the next.
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

NEVER = 2**30  # No vocabulary holds it: every response is of full length.
MATRICES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
  line = protocol.begin()
  logging.disable(logging.WARNING)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  with jax.set_mesh(mesh):
    JOBS[line.job["what"]](line, mesh)


def software() -> str:
  from importlib.metadata import version

  return f"google-tunix {version('google-tunix')}, jax {jax.__version__}"


class Words:
  """A tokenizer: "7 12 9" is the ids 7, 12 and 9."""

  def encode(self, text: str, **_) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids, **_) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    return 1

  def eos_id(self) -> int:
    return NEVER

  def pad_id(self) -> int:
    return 0


def model_of(job: dict) -> llama3.Llama3:
  """Without LoRA; of random weights, for Tunix begins with some that are zero."""
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


def with_lora(job: dict, model: llama3.Llama3) -> llama3.Llama3:
  provider = qwix.LoraProvider(
    module_path=MATRICES, rank=job["rank"], alpha=2.0 * job["rank"]
  )
  return qwix.apply_lora_to_model(
    model, provider, **model.get_model_input(), rngs=nnx.Rngs(1)
  )


def prompts_of(job: dict, count: int) -> list[str]:
  """Neither padding nor bos is among the tokens; bos is put before them."""
  rng = np.random.default_rng(0)
  rows = rng.integers(2, job["vocab"], (count, job["prompt"] - 1))
  return [" ".join(map(str, row)) for row in rows]


def slots(job: dict) -> int:
  return job["prompt"] + job["new"]


def grpo(line: protocol.Line, mesh: jax.sharding.Mesh) -> None:
  job = line.job
  made = []  # Tokens of the last step's responses.

  def reward(prompts, completions, **_):
    tokens = [len(text.split()) for text in completions]
    made.append(sum(tokens))
    return [float(sum(map(int, text.split())) % 97) for text in completions]

  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=job["new"],
    max_prompt_length=job["prompt"],
    kv_cache_size=slots(job),
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
  base = model_of(job)
  roles = (
    rl_cluster.Role.ACTOR,
    rl_cluster.Role.REFERENCE,
    rl_cluster.Role.ROLLOUT,
  )
  cluster = rl_cluster.RLCluster(
    actor=with_lora(job, base),
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
  prompts = np.array(prompts_of(job, job["prompts"]))
  told = dict(software=software())

  def batches():
    start = protocol.wait()
    while True:
      yield {"prompts": prompts}
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      seconds = time.perf_counter() - start
      line.answer(seconds=seconds, tokens=made[-1], **told)
      start = protocol.wait()

  learner.train(batches())


def sample(line: protocol.Line, mesh: jax.sharding.Mesh) -> None:
  job = line.job
  cache = sampler.CacheConfig(
    cache_size=slots(job),
    num_layers=job["layers"],
    num_kv_heads=job["kv_heads"],
    head_dim=job["embed"] // job["heads"],
  )
  model = with_lora(job, model_of(job))
  words = tokenizer_adapter.TokenizerAdapter(Words())
  answer = sampler.Sampler(model, words, cache)
  prompts = prompts_of(job, job["rows"])

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

  protocol.serve(line, run, software=software())


JOBS = {"grpo": grpo, "sample": sample}

if __name__ == "__main__":
  main()
