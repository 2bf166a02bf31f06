"""The recipe of the base model that the package ships; see docs/design.md.

python launch/run.py --config=configs/pretrain.py --workdir=runs/pretrain

configs/pretrain.py:small has a language model of half as many weights a layer and half
the layers, for studies of size. It sees by the towers of the base that is shipped, so
that each can score what the other has said.
"""

from ml_collections import ConfigDict

from vlmrlaif_jax.training import update

SIZES = {  # Of the language model.
  "tiny": dict(embed=128, mlp=352, layers=4, heads=4, kv_heads=4),
  "small": dict(embed=96, mlp=264, layers=2, heads=3, kv_heads=3),
}


def get_config(preset: str = "tiny") -> ConfigDict:
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
      # First single frames, whose patches the language model sees one by one.
      pretrain_image=phase(
        steps=500, batch_size=96, length=96, learning_rate=2e-3, schedule="constant"
      ),
      # Then clips: captions, descriptions, answers.
      pretrain_see=phase(
        steps=2000, batch_size=32, length=208, learning_rate=2e-3, schedule="constant"
      ),
      # Then to judge answers as well.
      pretrain_judge=phase(
        steps=1000, batch_size=24, length=400, learning_rate=1.5e-3, schedule="cosine"
      ),
      model=dict(
        vocab=768,
        # A LLaVA folder as this recipe writes it, whose CLIP is taken, and stays, as
        # it is; "": CLIP is trained as well.
        towers="builtin:tiny" if preset == "small" else "",
        features=96,  # Of the space that CLIP's towers share.
        vision=dict(image=32, patch=8, embed=96, mlp=384, layers=3, heads=4),
        text=dict(context=32, embed=96, mlp=384, layers=2, heads=4),
        llm=SIZES[preset],
      ),
    )
  )


def phase(*, steps, batch_size, length, learning_rate, schedule) -> ConfigDict:
  """Args: length: tokens of a row, which as many conversations as fit are packed in."""
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
