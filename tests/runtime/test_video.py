"""Videos' features: what names them, and how several processes make them together."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from tests.helpers import several
from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor, Stopped
from vlmrlaif_jax.data import features, pipeline
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.models import clip, siglip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.runtime import video
from vlmrlaif_jax.runtime.run import Run

BATCH, VIDEOS = 2, 14
TOWER = clip.VisionTower(**clip.VARIANTS["tiny"])


def weights():
  """Random ones of the tower; its own init would take long to compile."""
  shapes = jax.eval_shape(TOWER.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rng = np.random.default_rng(0)
  make = lambda x: rng.normal(size=x.shape, scale=0.1).astype(np.float32)
  return jax.tree.map(make, shapes["params"])


def make(folder, mesh, *, watch=NO_MONITOR):
  """The features of the pictures of a folder, encoded two at once."""
  llm = llama.Model(**{**llama.VARIANTS["tiny"], "vocab": 8})
  policy = vlm.VLM(TOWER, Projector(llm.embed), llm)
  base = {"params": {"vision": weights()}}
  where = sharding.shard_by_rules(base, vlm.SHARDING, mesh)
  base = jax.tree.map(sharding.place_array, base, where)
  config = ConfigDict({"data": pipeline.default_config(), "model": {"frames": 1}})
  config.data.workers = 0
  videos = sorted(str(path) for path in folder.glob("*.png"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(video, "VIDEOS_PER_DEVICE", BATCH)
    run = Run(
      config=config, workdir=folder, mesh=mesh, policy=policy, reward_model=policy,
      base=base, reward_model_base=base, tokenizer=None, template=None, stops=(0,),
      splits=pipeline.Splits(),
      features=features.FeatureStore({}, {}, {}, {}), watch=watch,
      processor=LlavaProcessor(1, TOWER.image, TOWER.patch),
    )  # fmt: skip
    return video.encode_videos(run, videos, note=lambda line: None).features


def draw(folder, numbers, seed):
  rng = np.random.default_rng(seed)
  for number in numbers:
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:02}.png")


# What names them.


@pytest.mark.parametrize(
  "other",
  [
    TOWER.clone(select_layer=-1),
    TOWER.clone(image=20),
    TOWER.clone(patch=8),
    TOWER.clone(heads=2),
    TOWER.clone(activation="gelu"),
    TOWER.clone(eps=1e-6),
    TOWER.clone(dtype="bfloat16"),
    siglip.Model(**clip.VARIANTS["tiny"], activation="quick_gelu", eps=1e-5),
  ],
)
def test_another_setting_of_a_tower_is_another_name(other):
  weights = {"kernel": np.ones(2)}
  name = lambda tower: video._compute_digest(weights, tower.settings())
  assert name(other) != name(TOWER)


def test_what_changes_no_feature_changes_no_name():
  same = TOWER.clone(select_layer=2)  # Of four states the last but one.
  assert same.settings() == TOWER.settings()


def test_pixels_in_another_range_are_another_name():
  other = TOWER.clone(mean=(0.5, 0.5, 0.5))
  assert other.settings() != TOWER.settings()


# Several processes.

PROGRAM = """
import json, pathlib, sys
import jax
import numpy as np
from tests.runtime import test_video
from vlmrlaif_jax.core import distributed, sharding

coordinator, number, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
distributed.connect_processes(coordinator, 2, number, heartbeat_s=60, start_s=120)
order = np.array(jax.devices()).reshape(2, -1).T.ravel()  # No host's are together.
mesh = sharding.make_mesh(devices=order)
with jax.set_mesh(mesh):
  told = test_video.story(folder, mesh)
print(json.dumps(told), flush=True)
"""


def story(folder, mesh):
  """What one of two processes sees."""
  there = lambda: len(list(folder.glob("features/*.npy")))
  told, asked, rounds = {}, [], []

  def stop():  # One of them is asked to end, in its second round.
    asked.append(distributed.process_index() == 1 and len(asked) == 1)
    return distributed.any_process(asked[-1])

  try:
    make(folder, mesh, watch=StageMonitor(stop))
  except Stopped as error:
    multihost_utils.sync_global_devices("all have ended")
    told["stopped"] = str(error), len(asked), there()
  multihost_utils.sync_global_devices("all have counted")
  if (
    distributed.is_process_zero()
  ):  # Some of its own, which gives it more to do than the other.
    draw(folder, (0, 2, 4), seed=1)
  multihost_utils.sync_global_devices("some are others")
  store = make(folder, mesh, watch=StageMonitor(lambda: bool(rounds.append(1))))
  made = {pathlib.Path(video).name: store.get(video) for video in store.files}
  told["made"] = len(rounds), {name: x.tolist() for name, x in made.items()}
  return told


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("encoding")
  draw(folder, range(VIDEOS), seed=0)
  return folder


@pytest.fixture(scope="module")
def told(pictures):
  (pictures / "program.py").write_text(PROGRAM)
  command = lambda at, i: [str(pictures / "program.py"), at, str(i), str(pictures)]
  logs = pictures / "said"
  started = several.start(command, 2, logs, devices=2)
  several.finish(started, logs, limit_s=240)
  lines = [several.said(logs, i).splitlines() for i in range(2)]
  return [json.loads(next(x for x in said if x.startswith("{"))) for said in lines]


def test_all_end_when_one_is_asked_to_and_keep_what_is_encoded(told, pictures):
  for each in told:
    said, rounds, kept = each["stopped"]
    assert str(pictures / "features") in said
    assert (rounds, kept) == (2, 2 * 2 * BATCH)
  assert told[0]["stopped"] == told[1]["stopped"]


def test_all_ask_as_often_as_the_one_that_has_most_to_encode(told):
  # Of its seven the first has made four, of which three are others by now.
  assert [each["made"][0] for each in told] == [6 // BATCH] * 2


def test_all_have_the_features_that_one_process_makes(pictures, told, tmp_path):
  for picture in pictures.glob("*.png"):
    shutil.copy(picture, tmp_path)
  alone = make(tmp_path, sharding.make_mesh(fsdp=2, devices=jax.devices()[:2]))
  want = {pathlib.Path(video).name: alone.get(video) for video in alone.files}
  for each in told:
    got = each["made"][1]
    assert got.keys() == want.keys() and len(want) == VIDEOS
    for name, feature in want.items():
      np.testing.assert_allclose(got[name], feature, atol=2e-3, err_msg=name)
