"""Pretraining of the base models that the package ships; see docs/design.md.

python launch/run.py --config=configs/pretrain.py --workdir=runs/pretrain
python launch/run.py --config=configs/pretrain.py:tiny_qwen3vl --workdir=runs/qwen3vl

configs/pretrain.py:tiny_qwen3vl trains a Qwen3-VL. configs/pretrain.py:small has a
language model with half the layers and half the weights per layer, for studies of model
size. It uses the shipped model's CLIP towers, so that each model can score the other's
responses.
"""

from ml_collections import ConfigDict

from vlmrlaif_jax.training import update

LLAMAS = {  # Shapes of the language model by preset.
  "tiny": dict(embed=128, mlp=352, layers=4, heads=4, kv_heads=4),
  "small": dict(embed=96, mlp=264, layers=2, heads=3, kv_heads=3),
}


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  if preset in LLAMAS:
    return make_llava(preset)
  if preset == "tiny_qwen3vl":
    return make_qwen3_vl()
  names = (*LLAMAS, "tiny_qwen3vl")
  raise ValueError(f"preset must be one of {names}, not {preset!r}")


def make_llava(preset: str) -> ConfigDict:
  """Returns the config of a model in LLaVA-1.5's layout."""
  config = make_recipe(
    # Single frames, whose patches the language model reads without pooling.
    make_phase(
      steps=500, batch_size=96, length=96, learning_rate=2e-3, schedule="constant"
    ),
    # Clips with captions, descriptions and answers.
    make_phase(
      steps=2000, batch_size=32, length=208, learning_rate=2e-3, schedule="constant"
    ),
    # Clips as before, and judgments of answers.
    make_phase(
      steps=1000, batch_size=24, length=400, learning_rate=1.5e-3, schedule="cosine"
    ),
  )
  config.frames = 12
  config.model = dict(
    family="llava",
    vocab=768,
    # LLaVA folder by this recipe, whose CLIP is frozen; "" trains a new CLIP.
    towers="builtin:tiny" if preset == "small" else "",
    features=96,  # Dimensions of the space that CLIP's towers share.
    vision=dict(image=32, patch=8, embed=96, mlp=384, layers=3, heads=4),
    text=dict(context=32, embed=96, mlp=384, layers=2, heads=4),
    llm=LLAMAS[preset],
  )
  return config


def make_qwen3_vl() -> ConfigDict:
  """Returns the config of a model in Qwen3-VL's layout; see make_llava."""
  config = make_recipe(
    make_phase(
      steps=200, batch_size=48, length=96, learning_rate=1e-3, schedule="constant"
    ),
    make_phase(
      steps=1000, batch_size=24, length=224, learning_rate=1e-3, schedule="constant"
    ),
    make_phase(
      steps=260, batch_size=16, length=400, learning_rate=1e-3, schedule="cosine"
    ),
  )
  config.model = dict(
    family="qwen3_vl",
    vocab=768,
    # Model of this recipe whose layers training starts from; "" starts at random.
    start="builtin:tiny",
    # Frames per second, their number, and the side of the squares they are resized to.
    video=dict(fps=4.0, min_frames=4, max_frames=12, side=32),
    vision=dict(
      embed=96, mlp=384, layers=3, heads=4, taps=(0, 1), patch=8, merge=2, positions=16
    ),
    llm=dict(
      embed=128,
      mlp=352,
      layers=4,
      heads=4,
      kv_heads=4,
      head_dim=32,
      rope_base=10_000.0,
      mrope=(6, 5, 5),  # Frequencies of time, height and width.
    ),
  )
  return config


def make_recipe(image: ConfigDict, see: ConfigDict, judge: ConfigDict) -> ConfigDict:
  """Returns a config of three phases, without its model."""
  return ConfigDict(
    dict(
      recipe="pretrain",
      seed=0,
      videos=12_000,
      save_every=100,
      log_every=10,
      pretrain_image=image,
      pretrain_see=see,
      pretrain_judge=judge,
    )
  )


def make_phase(*, steps, batch_size, length, learning_rate, schedule) -> ConfigDict:
  """Returns the section of a phase of pretraining.

  Args:
    steps: Updates.
    batch_size: Rows of a batch.
    length: Tokens of a row, into which several conversations are packed.
    learning_rate: Peak learning rate.
    schedule: Schedule of the learning rate.
  """
  optimizer = update.default_config()
  optimizer.update(
    learning_rate=learning_rate,
    schedule=schedule,
    warmup_steps=50,
    weight_decay=0.02,
    b2=0.98,
  )
  return ConfigDict(
    dict(steps=steps, batch_size=batch_size, length=length, optimizer=optimizer)
  )
