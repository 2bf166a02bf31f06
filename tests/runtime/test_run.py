"""What a run starts from: checkpoints, features, what is left out, trained parts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import front
from tests.helpers import small
from tests.helpers.rows import text_batch
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.data import features, pipeline
from vlmrlaif_jax.models import projector
from vlmrlaif_jax.runtime import arrays, loading
from vlmrlaif_jax.runtime import run as run_lib


def quiet(text):
  pass


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("build")
  return loading.create_run(small.config(tiny_settings), workdir, note=quiet)


@pytest.mark.parametrize("section", ["rm", "dpo"])
def test_videos_of_given_preferences_are_encoded_though_no_record_has_them(
  tiny_settings, tiny_world, tmp_path, section
):
  first = jsonl.read_jsonl(tiny_world / "preferences.jsonl")[0]
  others = [shutil.copy(first["video"], tmp_path / f"{i}.mp4") for i in range(2)]
  path = tmp_path / "preferences.jsonl"
  rows = [{**first, "id": str(i), "video": str(others[i % 2])} for i in range(20)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = {f"{section}.preferences": str(path), "data.allow_outside": True}
  made = small.config({**tiny_settings, **given}, ("sft_short", section))
  store = loading.create_run(made, tmp_path, note=quiet).features
  assert all(store.has(str(other)) for other in others)


# Checkpoints.


def test_shipped_checkpoint_is_found():
  assert (run_lib.resolve_checkpoint("builtin:tiny") / "tokenizer.json").exists()


@pytest.mark.parametrize("path", ["builtin:huge", "no/such/folder"])
def test_missing_checkpoint_is_refused_with_what_to_put_there(path):
  with pytest.raises(UserError, match="put a LLaVA checkpoint"):
    run_lib.resolve_checkpoint(path)


def test_scorer_shares_the_arrays_of_the_same_checkpoint(run):
  assert run.reward_model_base is run.base
  assert run.reward_model.scalar_head and not run.policy.scalar_head


def test_another_scorer_with_the_same_tower_is_taken(
  tiny_checkpoint, tiny_settings, tmp_path
):
  other = tmp_path / "other"
  other.symlink_to(tiny_checkpoint)
  settings = {**tiny_settings, "model.reward_model_path": str(other)}
  made = loading.create_run(small.config(settings), tmp_path, note=quiet)
  assert made.reward_model_base is not made.base


@pytest.mark.parametrize("there", [False, True])
def test_scorer_is_read_only_where_there_is_a_reward_model(
  tiny_checkpoint, tiny_settings, tmp_path, there
):
  other = tmp_path / "other"
  other.symlink_to(tiny_checkpoint)
  settings = {**tiny_settings, "model.reward_model_path": str(other)}
  if there:  # Of another recipe, in the same workdir.
    (tmp_path / "rm").mkdir()
  config = small.config(settings, ("sft_short", "sft_long", "eval"))
  made = loading.create_run(config, tmp_path, note=quiet)
  assert (made.reward_model_base is not made.base) == there


def test_scorer_of_another_tower_is_refused(tiny_settings, tmp_path):
  small.write_checkpoint(tmp_path / "other", seed=1)
  settings = {**tiny_settings, "model.reward_model_path": str(tmp_path / "other")}
  with pytest.raises(ValueError, match="different weights"):
    loading.create_run(small.config(settings), tmp_path, note=quiet)


def test_scorer_that_reads_the_same_tower_at_another_layer_is_refused(
  tiny_checkpoint, tiny_settings, tmp_path
):
  other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))
  settings = {**tiny_settings, "model.reward_model_path": str(other)}
  with pytest.raises(ValueError, match="different settings: layer is 2 and 3"):
    loading.create_run(small.config(settings), tmp_path, note=quiet)


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double"])
def test_models_are_loaded_in_the_form_of_the_config(run, monkeypatch, scheme):
  model = front.model_tiny()
  model.update(quant=scheme)
  load = lambda path, **given: (run.policy, run.base, given)
  monkeypatch.setattr(loading.convert, "load_checkpoint", load)
  *_, given = loading.load_model(model, run.workdir, run.mesh, quiet)
  assert given["quant"] == scheme


# Videos.


def test_features_are_those_of_the_tower(run, tiny_world):
  from vlmrlaif_jax.data import video

  example = run.splits.benchmark[0]
  pixels = video.load_frames(example["video"], count=3, size=run.policy.vision.image)
  want = run.policy.apply(run.base, jnp.asarray(pixels)[None], method="encode")[0]
  got = run.features.get(example["video"])
  np.testing.assert_allclose(got.astype(np.float32), want, atol=2e-3)  # float16.


@pytest.mark.parametrize("shared", [False, True])
def test_videos_are_encoded_once(run, tmp_path, monkeypatch, shared):
  decode = lambda videos, *_, **__: iter(videos and pytest.fail("it decoded again"))
  monkeypatch.setattr(features.video, "read_videos", decode)
  config = run.config.copy_and_resolve_references()
  if shared:
    config.data.features = str(run.workdir / "features")
  workdir = tmp_path if shared else run.workdir
  again = loading.create_run(config, workdir, note=quiet)
  assert again.features.files == run.features.files


def test_records_whose_video_fails_are_told_of_once(run, tmp_path):
  good, bad = str(tmp_path / "good.mp4"), str(tmp_path / "bad.mp4")
  store = features.FeatureStore(
    {good: tmp_path / "x.npy"}, {}, {bad: "it is broken"}, {}
  )
  sft = [{"id": "a", "video": good}, {"id": "b", "video": bad}]
  # The prompts are those of SFT, as they are unless a file of their own is given.
  given = pipeline.Splits(sft, sft, [{"id": "d", "video": bad}])
  splits, problems = loading._drop_failures(run._replace(features=store), given)
  assert [e["id"] for e in splits.sft] == [e["id"] for e in splits.prompts] == ["a"]
  assert splits.benchmark == []
  assert [problem.id for problem in problems] == ["b", "d"]
  assert problems[0].reason == "it is broken"


def test_video_tokens_are_as_many_as_the_model_makes(run):
  video = run.splits.sft[0]["video"]
  frames = jnp.zeros((1, 3, run.policy.vision.image, run.policy.vision.image, 3))
  features = run.policy.apply(run.base, frames, method="encode")
  pooled = run.policy.apply(
    run.base, features, method=lambda m, x: projector.pool_video(m.projector(x))
  )
  assert run.lay_out_video(video).texts == [[pooled.shape[1], "\n"]]


# What is trained.


def test_fresh_lora_changes_nothing(run):
  fresh = arrays.initialize_params(
    arrays.get_trainable_shapes(run.policy, run.mesh), jax.random.key(0)
  )
  side = run.policy.vision.image
  tokens = jnp.arange(3, 11)[None]
  batch = text_batch(
    jnp.zeros((1, 1, side, side, 3), jnp.uint8), tokens, tokens > 0, tokens > 0
  )
  plain = run.policy.apply(run.base, batch)
  changed = run.policy.apply(merge_params(run.base, fresh), batch)
  np.testing.assert_allclose(changed, plain, atol=1e-5)
  assert max(np.abs(x).max() for x in jax.tree.leaves(fresh)) > 0.01


def test_fresh_parts_have_the_shapes_and_places_they_train_in(run):
  shapes = arrays.get_trainable_shapes(run.reward_model, run.mesh)
  fresh = arrays.initialize_params(shapes, jax.random.key(0))
  assert set(fresh) == {"lora", "params"} and set(fresh["params"]) == {"head"}
  for want, got in zip(jax.tree.leaves(shapes), jax.tree.leaves(fresh), strict=True):
    assert (want.shape, want.dtype, want.sharding) == (
      got.shape,
      got.dtype,
      got.sharding,
    )
