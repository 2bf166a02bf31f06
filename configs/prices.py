"""Prices of chips per hour, and assumed utilization, for launch/plan.py.

python launch/plan.py ... --prices.chip_hour.h200=3.5 --prices.reached.compute=0.5

The prices are rounded on-demand list prices of Google Cloud in the United States. They
change, and discounts are common. The utilization is that of well-tuned programs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the prices and the utilization."""
  # This file must not import the package: it is read before JAX's environment is set.
  return ConfigDict(
    dict(
      date="2025-11",  # Month of the prices.
      currency="USD",
      chip_hour=dict(  # 0 is an unknown price.
        v4=3.22,
        v5e=1.20,
        v5p=4.20,
        v6e=2.70,
        tpu7x=0.0,
        a100=5.07,
        h100=11.06,
        h200=10.60,
      ),
      # Share of each limit of a chip that programs reach.
      reached=dict(compute=0.6, memory=0.8, links=0.7),
    )
  )
