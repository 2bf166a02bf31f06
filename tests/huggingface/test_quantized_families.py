"""Quantized bases of each family: they load, have small errors, and train LoRA."""

import jax
import pytest

from perf import quant_error
from vlmrlaif_jax.core.types import MethodModels
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.methods import sft
from vlmrlaif_jax.training import update

# Heads of 128 numbers, because published frequencies of position axes are for them.
SHAPE = dict(vocab=64, embed=256, mlp=256, layers=4, heads=2, kv_heads=1, head_dim=128)
# Each kernel has the error of Gaussian weights (models/ops/test_quantization.py). The
# errors of all seven kernels of all layers add up like independent ones.
KERNELS = 7 * SHAPE["layers"]
BOUNDS = {"nf4": 0.096 * KERNELS**0.5, "int8": 0.0085 * KERNELS**0.5}


@pytest.fixture(scope="module", params=quant_error.SIZES)
def folder(request, tmp_path_factory):
  config = quant_error.make_config(request.param, **SHAPE)
  params = quant_error.make_random_params(convert.make_model(config, "float32"))
  folder = tmp_path_factory.mktemp(request.param)
  convert.save_checkpoint(folder, params, config, "float32")
  return folder


def train(folder, quant):
  """Returns logits, and the losses before and after an update of LoRA."""
  model, base, _ = convert.load_checkpoint(folder, dtype="float32", quant=quant)
  assert ("quant" in base) == (quant != "none")
  model = model.clone(llm=model.llm.clone(rank=4, alpha=8.0))
  method = sft.make(sft.default_config(), MethodModels(policy=model))
  settings = update.default_config()
  settings.learning_rate = 0.01
  tx = update.make_optimizer(settings, 1)

  @jax.jit
  def run(base, rows):
    lora = {"lora": model.init(jax.random.key(0), rows)["lora"]}
    frozen, state = {"policy": base}, update.init_state({"policy": lora}, tx)
    state, metrics = update.make_update(method.loss, tx)(state, frozen, rows)
    after = method.loss(state.params, frozen, rows).mean
    return model.apply({**base, **lora}, rows), metrics["loss"], after

  return run(base, quant_error.make_rows(model))


@pytest.fixture(scope="module")
def plain(folder):
  return train(folder, "none")


@pytest.mark.parametrize("quant", BOUNDS)
def test_logits_are_within_the_bound_and_an_update_lowers_the_loss(
  folder, plain, quant
):
  logits, before, after = train(folder, quant)
  bound = BOUNDS[quant]
  assert 0.1 * bound < quant_error.compute_error(logits, plain[0]) < bound
  assert abs(before - plain[1]) < bound * plain[1]
  assert after < before - 0.1
