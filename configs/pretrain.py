"""The recipe of the base model that the package ships; see docs/design.md.

    python launch/run.py --config=configs/pretrain.py --workdir=runs/pretrain
"""

from ml_collections import ConfigDict

from vlmrlaif_jax import update


def get_config(preset: str = "tiny") -> ConfigDict:
  if preset != "tiny":
    raise ValueError(f'configs/pretrain.py has one preset, "tiny", not {preset!r}')
  optimizer = update.default_config()
  optimizer.update(dict(
    learning_rate=1.5e-3, schedule="cosine", warmup_steps=100, steps=1700,
    weight_decay=0.02, clip_norm=1.0))
  return ConfigDict(dict(
    recipe="pretrain",
    seed=0,
    videos=14_000,
    frames=12,
    batch_size=24,
    length=400,  # Tokens a row; as many conversations as fit.
    optimizer=optimizer,
    save_every=100,
    log_every=10,
    model=dict(
      vocab=768,
      features=96,  # Of the space that CLIP's towers share.
      vision=dict(image=32, patch=8, embed=96, mlp=384, layers=3, heads=4),
      text=dict(context=32, embed=96, mlp=384, layers=2, heads=4),
      llm=dict(embed=128, mlp=352, layers=4, heads=4, kv_heads=4),
    ),
  ))
