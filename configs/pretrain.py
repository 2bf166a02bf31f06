"""Pretraining of the base model that the package ships; see docs/design.md.

python launch/run.py --config=configs/pretrain.py --workdir=runs/pretrain

configs/pretrain.py:small has a language model with half the layers and half the weights
per layer, for studies of model size. It uses the shipped model's CLIP towers, so that
each model can score the other's responses.
"""

from ml_collections import ConfigDict

from vlmrlaif_jax.training import update

SIZES = {  # Shapes of the language model by preset.
  "tiny": dict(embed=128, mlp=352, layers=4, heads=4, kv_heads=4),
  "small": dict(embed=96, mlp=264, layers=2, heads=3, kv_heads=3),
}


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  if preset not in SIZES:
    raise ValueError(f"preset must be one of {tuple(SIZES)}, not {preset!r}")
  return ConfigDict(
    dict(
      recipe="pretrain",
      seed=0,
      videos=12_000,
      frames=12,
      save_every=100,
      log_every=10,
      # Single frames, whose patches the language model reads without pooling.
      pretrain_image=make_phase(
        steps=500, batch_size=96, length=96, learning_rate=2e-3, schedule="constant"
      ),
      # Clips with captions, descriptions and answers.
      pretrain_see=make_phase(
        steps=2000, batch_size=32, length=208, learning_rate=2e-3, schedule="constant"
      ),
      # Clips as before, and judgments of answers.
      pretrain_judge=make_phase(
        steps=1000, batch_size=24, length=400, learning_rate=1.5e-3, schedule="cosine"
      ),
      model=dict(
        vocab=768,
        # LLaVA folder by this recipe, whose CLIP is frozen; "" trains a new CLIP.
        towers="builtin:tiny" if preset == "small" else "",
        features=96,  # Dimensions of the space that CLIP's towers share.
        vision=dict(image=32, patch=8, embed=96, mlp=384, layers=3, heads=4),
        text=dict(context=32, embed=96, mlp=384, layers=2, heads=4),
        llm=SIZES[preset],
      ),
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
