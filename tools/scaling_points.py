"""Lists the points of docs/scaling.md: 7B recipes on many slices."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.planner import topologies

Settings: TypeAlias = Mapping[str, object]  # Values by dotted names.

SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-64", "v6e-16", "v6e-256",
          "h200-8", "a100-8")  # fmt: skip
FIRST = ("v5e-64", "h200-8")  # Slices that are planned first, and those of the curves.
SMALL = "v5e-16"  # Slice that also gets smaller batches, because 256 rows may not fit.
FRAMES = (8, 16, 32, 64)
GROUPS = (2, 4, 8, 16)
_TEXT = 142  # Text tokens of a prompt. Its video has a token per frame and per patch.
_PATCHES = 576
_ATTENTION = {"tpu": "splash", "cuda": "cudnn"}
# Number of meshes that are compiled; the fastest is the result. Compilers for GPUs add
# collectives that estimates do not contain, and they compile fast.
TOP = {"tpu": 1, "cuda": 3}


class PlannedMethod(NamedTuple):
  """A stage of a recipe, and the size of its step."""

  config: str  # Name of the recipe.
  stage: str
  overrides: Settings
  small_overrides: Settings  # Overrides for the slice SMALL.
  title: str


METHODS = {  # By importance.
  "ppo": PlannedMethod(
    "ppo",
    "ppo",
    {"ppo.batch_size": 256},
    {"ppo.batch_size": 64},
    "PPO, 7B policy, 13B reward model and critic",
  ),
  # A cache for all 1,280 responses would take 1 TiB, so `slots` limits them.
  "grpo_rank": PlannedMethod(
    "grpo_rank",
    "grpo",
    {"grpo.batch_size": 256, "grpo.samples": 5, "grpo.slots": 320},
    {"grpo.batch_size": 64, "grpo.samples": 5, "grpo.slots": 160},
    "GRPO_rank, 7B policy, 13B reward model",
  ),
  "dpo": PlannedMethod(
    "dpo", "dpo", {"dpo.batch_size": 256}, {"dpo.batch_size": 64}, "DPO"
  ),
  "sft": PlannedMethod(
    "sft", "sft_short", {"sft.batch_size": 256}, {"sft.batch_size": 64}, "SFT"
  ),
}


class Point(NamedTuple):
  """A method on a slice."""

  name: str
  method: str  # A key of METHODS.
  topology: str  # Name of the slice.
  overrides: Settings
  preset: str = "7b"  # Preset of the recipe.

  @property
  def stage(self) -> str:
    """Name of the stage."""
    return METHODS[self.method].stage

  def make_settings(self) -> Settings:
    """Returns all settings that differ from the recipe's."""
    attention = _ATTENTION[topologies.parse_topology(self.topology).platform]
    return {"model.quant": "none", "model.attention": attention, **self.overrides}

  def make_command(self) -> list[str]:
    """Returns the arguments of launch/plan.py for this point."""
    platform = topologies.parse_topology(self.topology).platform
    return [
      f"--config=configs/{METHODS[self.method].config}.py:{self.preset}",
      f"--topology={self.topology}",
      f"--stage={self.stage}",
      "--sweep",
      f"--top={TOP[platform]}",
      *(f"--config.{key}={value}" for key, value in self.make_settings().items()),
    ]

  def make_config(self) -> ConfigDict:
    """Returns the recipe with the settings of this point."""
    recipe = importlib.import_module(f"configs.{METHODS[self.method].config}")
    config = recipe.get_config(self.preset)
    config.update_from_flattened_dict(self.make_settings())
    return config


def list_points() -> list[Point]:
  """Returns all points in order: first slices, other slices, curves."""
  others = [
    *_list_slice_points(name for name in SLICES if name not in FIRST),
    *(
      Point(f"{name}_{SMALL}_less", name, SMALL, method.small_overrides)
      for name, method in METHODS.items()
    ),
  ]
  # Compiling continuous batching takes as long as all other points together.
  others.sort(key=lambda point: "grpo.slots" in point.overrides)
  curves = [point for topology in FIRST for point in _list_curve_points(topology)]
  return [*_list_slice_points(FIRST), *others, *curves]


def _list_slice_points(names: Iterable[str]) -> list[Point]:
  return [
    Point(f"{name}_{topology}", name, topology, method.overrides)
    for topology in names
    for name, method in METHODS.items()
  ]


def _list_curve_points(topology: str) -> Iterator[Point]:
  for name in ("ppo", "grpo_rank"):
    for frames in FRAMES:
      overrides = {
        **METHODS[name].overrides,
        f"{METHODS[name].stage}.batch_size": 128,
        "model.frames": frames,
        "data.prompt_len": frames + _PATCHES + _TEXT,
      }
      yield Point(f"frames_{name}_{topology}_{frames}", name, topology, overrides)
  for group in GROUPS:
    overrides = {"grpo.batch_size": 64, "grpo.samples": group, "grpo.slots": 512}
    yield Point(f"group_{topology}_{group}", "grpo_rank", topology, overrides)
