"""What a chip costs an hour, and what share of its limits a program reaches.

python launch/plan.py ... --prices.chip_hour.h200=3.5 --prices.reached.compute=0.5

List prices on demand in the United States, rounded, of Google Cloud; they change, and
few pay them. The shares are assumptions: those of well-tuned programs of this kind.
"""

from ml_collections import ConfigDict

from vlmrlaif_jax import plan


def get_config() -> ConfigDict:
  config = plan.default_config()
  config.date = "2025-11"
  config.chip_hour = ConfigDict(
    dict(v4=3.22, v5e=1.20, v5p=4.20, v6e=2.70, tpu7x=0.0, a100=5.07, h100=11.06,
         h200=10.60)
  )  # fmt: skip
  return config
