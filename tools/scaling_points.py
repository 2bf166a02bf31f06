"""What docs/scaling.md is of: recipes at 7B, on many slices."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.planner import topologies

Settings = Mapping[str, object]  # Of a recipe, by dotted names.

SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-64", "v6e-16", "v6e-256",
          "h200-8", "a100-8")  # fmt: skip
FIRST = ("v5e-64", "h200-8")  # Of the slices; curves are drawn on them.
SMALL = "v5e-16"  # What 256 rows at once may be too many for.
FRAMES = (8, 16, 32, 64)
GROUPS = (2, 4, 8, 16)
_TEXT = 142  # Tokens of a prompt, beside those of its video: one a frame, one a place.
_PLACES = 576
_ATTENTION = {"tpu": "splash", "cuda": "cudnn"}
# Ways that are compiled, of which the fastest counts. Compilers for GPUs put in more
# collectives than estimates know of, and are quick.
TOP = {"tpu": 1, "cuda": 3}


class Method(NamedTuple):
  """A stage of a recipe, and the size of its step."""

  config: str
  stage: str
  given: Settings
  less: Settings  # For SMALL.
  title: str


METHODS = {  # Those that matter most first.
  "ppo": Method(
    "ppo",
    "ppo",
    {"ppo.batch_size": 256},
    {"ppo.batch_size": 64},
    "PPO, 7B policy, 13B reward model and critic",
  ),
  # All 1,280 responses at once would need a cache of 1 TiB.
  "grpo_rank": Method(
    "grpo_rank",
    "grpo",
    {"grpo.batch_size": 256, "grpo.samples": 5, "grpo.slots": 320},
    {"grpo.batch_size": 64, "grpo.samples": 5, "grpo.slots": 160},
    "GRPO_rank, 7B policy, 13B reward model",
  ),
  "dpo": Method("dpo", "dpo", {"dpo.batch_size": 256}, {"dpo.batch_size": 64}, "DPO"),
  "sft": Method(
    "sft", "sft_short", {"sft.batch_size": 256}, {"sft.batch_size": 64}, "SFT"
  ),
}


class Point(NamedTuple):
  """One plan."""

  name: str
  method: str
  topology: str
  given: Settings

  @property
  def stage(self) -> str:
    return METHODS[self.method].stage

  def settings(self) -> Settings:
    """All that is not the recipe's own."""
    attention = _ATTENTION[topologies.parse_topology(self.topology).platform]
    return {"model.quant": "none", "model.attention": attention, **self.given}

  def command(self) -> list[str]:
    """The arguments of launch/plan.py that say what is planned."""
    platform = topologies.parse_topology(self.topology).platform
    return [
      f"--config=configs/{METHODS[self.method].config}.py:7b",
      f"--topology={self.topology}",
      f"--stage={self.stage}",
      "--sweep",
      f"--top={TOP[platform]}",
      *(f"--config.{key}={value}" for key, value in self.settings().items()),
    ]

  def config(self) -> ConfigDict:
    """The recipe."""
    recipe = importlib.import_module(f"configs.{METHODS[self.method].config}")
    made = recipe.get_config("7b")
    made.update_from_flattened_dict(self.settings())
    return made


def points() -> list[Point]:
  """Each method on the first slices; all others; what frames and groups cost."""
  others = [
    *_on_slices(name for name in SLICES if name not in FIRST),
    *(
      Point(f"{name}_{SMALL}_less", name, SMALL, method.less)
      for name, method in METHODS.items()
    ),
  ]
  # To compile how slots are filled takes as long as all else.
  others.sort(key=lambda point: "grpo.slots" in point.given)
  curves = [point for topology in FIRST for point in _curves(topology)]
  return [*_on_slices(FIRST), *others, *curves]


def _on_slices(names: Iterable[str]) -> list[Point]:
  return [
    Point(f"{name}_{topology}", name, topology, method.given)
    for topology in names
    for name, method in METHODS.items()
  ]


def _curves(topology: str) -> Iterator[Point]:
  for name in ("ppo", "grpo_rank"):
    for frames in FRAMES:
      given = {
        **METHODS[name].given,
        f"{METHODS[name].stage}.batch_size": 128,
        "model.frames": frames,
        "data.prompt_len": frames + _PLACES + _TEXT,
      }
      yield Point(f"frames_{name}_{topology}_{frames}", name, topology, given)
  for group in GROUPS:
    given = {"grpo.batch_size": 64, "grpo.samples": group, "grpo.slots": 512}
    yield Point(f"group_{topology}_{group}", "grpo_rank", topology, given)
