"""What no compiler knows: what a chip costs an hour, and how much of it programs use.

python launch/plan.py ... --prices.chip_hour.h200=3.5 --prices.reached.compute=0.5

List prices on demand in the United States, of Google Cloud and rounded; they change,
and few pay them. The shares are assumed: those of well-tuned programs of this kind.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  # Imports nothing of ours: it is read before the environment of jax is set.
  return ConfigDict(
    dict(
      date="2025-11",  # Of the prices.
      currency="USD",
      chip_hour=dict(  # 0: not known.
        v4=3.22,
        v5e=1.20,
        v5p=4.20,
        v6e=2.70,
        tpu7x=0.0,
        a100=5.07,
        h100=11.06,
        h200=10.60,
      ),
      # The share of each of a chip's limits that programs reach.
      reached=dict(compute=0.6, memory=0.8, links=0.7),
    )
  )
