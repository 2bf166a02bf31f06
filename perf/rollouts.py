"""Measures tokens per second of our sampler and of a vLLM server, by turns.

  python perf/rollouts.py DIR URL

DIR is a folder that tests/helpers/real_model.py writes: SmolLM2-135M in float32. It is
written if it does not exist. URL is that of a server of DIR, which is a text model
already; docs/benchmarks.md has the command. Both sample 8 prompts x 5 responses x 64
tokens without an end token, by a policy with LoRA. The seconds of a rollout include the
transfer of weights and embeddings to the server.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import app, flags

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch, Params, merge_params
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import arrays, loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.stages.training import rollout_settings, server_sampler

RUNS = flags.DEFINE_integer("runs", 5, "Rollouts of each; the median is reported.")
PROMPTS, SAMPLES, PROMPT, NEW, RANK = 8, 5, 64, 64, 16
_NEVER = -1  # An id that is never sampled.


def load(folder: pathlib.Path) -> tuple[vlm.VLM, Params, Params]:
  """Returns the model with LoRA, and its trained and frozen parameters."""
  settings = run_lib.default_config()
  tower = str(run_lib.resolve_checkpoint("builtin:tiny") / "clip")
  settings.update(path=str(folder), tower=tower, lora_rank=RANK, lora_alpha=32.0)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model, base, _ = loading.load_model(settings, folder, mesh, note=print)
  shapes = arrays.get_trainable_shapes(model, mesh)
  lora = {"lora": arrays.initialize_params(shapes, jax.random.key(0))["lora"]}
  return model, {"policy": lora}, {"policy": base}


def make_prompts(model: vlm.VLM) -> Batch:
  """Returns prompts of text alone, all of one length."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 10_000, (PROMPTS, PROMPT)).astype(np.int32)
  mask = np.ones_like(tokens, bool)
  positions = np.tile(np.arange(PROMPT, dtype=np.int32)[:, None], (PROMPTS, 1, 1))
  video = np.zeros((PROMPTS, 1, 1, model.vision.channels), np.float32)
  return jax.device_put(Batch(video, tokens, mask, ~mask, positions))


def main(argv: list[str]) -> None:
  """Measures both samplers and prints a table."""
  if len(argv) != 3:
    raise app.UsageError(f"give a folder and a URL, got {argv[1:]}")
  folder = pathlib.Path(argv[1])
  if not folder.exists():
    from tests.helpers import real_model

    real_model.write_smollm2(folder)
  model, params, frozen = load(folder)
  prompts, variables = (
    make_prompts(model),
    merge_params(frozen["policy"], params["policy"]),
  )
  sampling = dict(max_new=NEW, temperature=1.0, samples=SAMPLES, stops=(_NEVER,), pad=0)
  ours = jax.jit(lambda v, p, key: generate(model, v, p, key, **sampling))
  config = rollout_settings.default_config()
  config.update(engine="vllm", urls=(argv[2],))
  settings = server_sampler.ServerSettings(
    **{**sampling, "stops": ()}, top_p=1.0, top_k=0, vocab=model.llm.vocab
  )
  with tempfile.TemporaryDirectory() as adapters:
    server = server_sampler.ServerSampler(
      config, model, settings, pathlib.Path(adapters)
    )
    calls: dict[str, Any] = {
      "ours": lambda key: ours(variables, prompts, key),
      "vLLM": lambda key: server.finish(server.begin(key, params, frozen, prompts)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(RUNS.value + 1):
      for name, call in calls.items():
        start = time.perf_counter()
        sampled = jax.block_until_ready(call(jax.random.key(run)))
        seconds[name].append(time.perf_counter() - start)
        assert int(sampled.batch.loss_mask.sum()) == PROMPTS * SAMPLES * NEW
  print("| sampler | tokens/s | from | to |\n|---|---|---|---|")
  for name, each in seconds.items():
    rates = [PROMPTS * SAMPLES * NEW / x for x in each[1:]]  # The first compiles.
    middle = statistics.median(rates)
    print(f"| {name} | {middle:.0f} | {min(rates):.0f} | {max(rates):.0f} |")


if __name__ == "__main__":
  app.run(main)
