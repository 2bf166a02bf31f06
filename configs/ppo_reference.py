"""PPO with the habits of VLM-RLAIF's released code, for comparison with it.

Scores at the last position, losses and GAE over padding, KL clamped at 0, rewards times
10 with an absolute value clip, and the length and stop terms: see docs/design.md.

    python launch/run.py --config=configs/ppo_reference.py --workdir=runs/reference
"""

from ml_collections import ConfigDict

from configs import common
from configs.ppo import STAGES


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("ppo_reference", STAGES, preset)
  config.ppo.update(
    mask_padding=False,
    kl_estimator="k1_clamped",
    reward_scale=10.0,
    gamma=1.0,
    lam=1.0,
    value_clip_eps=0.2,
    stop_penalty=-8.0,
    length_coef=-10.0,
  )
  return config
