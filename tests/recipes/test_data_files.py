"""Data that changed under a run is refused; data that moved is not."""

import json

import pytest

from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data.features import FeatureStore
from vlmrlaif_jax.data.pipeline import Splits
from vlmrlaif_jax.recipes import data_files, runner
from vlmrlaif_jax.runtime.run import Run

STAGES = ("sft_short", "rm", "grm_sft", "eval")


@pytest.fixture
def files(tmp_path):
  """A file of each setting, with another content each."""
  paths = {}
  for name in ("records", "prompts", "benchmark", "preferences", "questions"):
    paths[name] = tmp_path / f"{name}.json"
    paths[name].write_text(json.dumps([{"id": name}]))
  return paths


def config(files, **more):
  settings = {f"data.{name}": str(files[name]) for name in ("records", "prompts")}
  settings |= {"data.benchmark": str(files["benchmark"]), "data.prompt_len": 64}
  settings |= {"rm.preferences": str(files["preferences"])}
  settings |= {"evaluate.msvd_qa.questions": str(files["questions"])}
  return small.config(settings, STAGES, evaluate__names=("msvd_qa",), **more)


def begin(root, files, *stages):
  runner.check_workdir(config(files), root)
  for stage in stages:
    (root / stage).mkdir()


@pytest.mark.parametrize(
  ("begun", "name", "setting"),
  [
    ("sft_short", "records", "data.records"),
    ("sft_short", "prompts", "data.prompts"),
    ("eval", "benchmark", "data.benchmark"),
    ("rm", "preferences", "rm.preferences"),
    ("grm_sft", "preferences", "rm.preferences"),  # It reads the section of rm.
    ("eval", "questions", "evaluate.msvd_qa.questions"),
  ],
)
def test_a_file_that_changed_under_a_stage_is_named(
  tmp_path, files, begun, name, setting
):
  begin(tmp_path / "run", files, begun)
  with files[name].open("a") as file:
    file.write("\n")
  with pytest.raises(UserError) as error:
    runner.check_workdir(config(files), tmp_path / "run")
  said = str(error.value)
  assert f"--config.{setting}={files[name]}: sha256 " in said
  assert "Use another --workdir" in said and said.count("--config.") == 1


def test_a_refused_file_stays_refused(tmp_path, files):
  begin(tmp_path / "run", files, "sft_short")
  files["records"].write_text("[]")
  for _ in range(2):
    with pytest.raises(UserError, match="data.records"):
      runner.check_workdir(config(files), tmp_path / "run")


def test_a_file_whose_content_is_restored_is_taken(tmp_path, files):
  begin(tmp_path / "run", files, "sft_short")
  content = files["records"].read_bytes()
  files["records"].write_text("[]")
  files["records"].write_bytes(content)
  runner.check_workdir(config(files), tmp_path / "run")


def test_files_of_stages_that_have_not_begun_may_change(tmp_path, files):
  begin(tmp_path / "run", files, "sft_short")
  for name in ("preferences", "questions"):
    files[name].write_text("[]")
  runner.check_workdir(config(files), tmp_path / "run")
  (tmp_path / "run" / "rm").mkdir()
  runner.check_workdir(config(files), tmp_path / "run")  # The new content is known.


def test_before_anything_has_begun_every_file_may_change(tmp_path, files):
  begin(tmp_path / "run", files)
  files["records"].write_text("[]")
  runner.check_workdir(config(files), tmp_path / "run")


@pytest.mark.parametrize("name", ["records", "preferences", "questions"])
def test_a_file_may_be_moved(tmp_path, files, name):
  begin(tmp_path / "run", files, *STAGES)
  moved = files[name].rename(tmp_path / "moved.json")
  made = config(files | {name: moved}, data__videos="other")
  runner.check_workdir(made, tmp_path / "run")
  kept = json.loads((tmp_path / "run" / "data.json").read_text())
  assert str(moved) in [entry["path"] for entry in kept.values()]


def test_a_file_that_is_moved_and_changed_is_refused(tmp_path, files):
  begin(tmp_path / "run", files, "sft_short")
  other = tmp_path / "other.json"
  other.write_text("[]")
  with pytest.raises(UserError, match=r"data.records=.*other.json: sha256"):
    runner.check_workdir(config(files | {"records": other}), tmp_path / "run")


def test_a_folder_is_hashed_with_all_of_its_files(tmp_path, files):
  folder = tmp_path / "folder"
  (folder / "below").mkdir(parents=True)
  (folder / "below" / "a.parquet").write_text("a")
  hashed = lambda: data_files.hash_data_files(config(files | {"records": folder}))[
    "data.records"
  ]["sha256"]
  first = hashed()
  (folder / "below" / "a.parquet").rename(folder / "below" / "b.parquet")
  renamed = hashed()
  (folder / "below" / "b.parquet").write_text("b")
  assert len({first, renamed, hashed()}) == 3


def test_a_workdir_without_hashes_is_taken(tmp_path, files):
  begin(tmp_path / "run", files, "sft_short")
  (tmp_path / "run" / "data.json").unlink()  # As an earlier version left it.
  runner.check_workdir(config(files), tmp_path / "run")


def test_content_is_checked_before_every_stage(tmp_path, files, monkeypatch):
  made, seen = config(files), []
  run = Run(made, tmp_path / "run", *[None] * (len(Run._fields) - 2))
  run = run._replace(splits=Splits())
  monkeypatch.setattr(runner.validation, "check_recipe", lambda config: None)
  monkeypatch.setattr(runner.memory, "check_memory", lambda config, todo: None)
  monkeypatch.setattr(runner.loading, "create_run", lambda *_, **__: run)

  def change(run, stage, *_):
    seen.append(stage)
    files["preferences"].write_text("[]")

  monkeypatch.setattr(runner, "_run_stage", change)
  monkeypatch.setattr(runner.jax, "set_mesh", lambda mesh: open(files["records"]))
  with pytest.raises(UserError, match="rm.preferences"):
    runner.run_recipe(made, str(tmp_path / "run"))
  assert seen == ["sft_short"]


# Files of reward functions.

REWARD = "def score(samples):\n  return [1.0 for _ in samples]\n"
STAGES_WITH_REWARD = ("sft_short", "rm", "ppo")


def rewarded(path, *, function="score", **term):
  settings = {"reward.terms.mine": {"fn": f"{path}:{function}", **term}}
  return small.config(settings, STAGES_WITH_REWARD)


@pytest.fixture
def reward(tmp_path):
  path = tmp_path / "my_rewards.py"
  path.write_text(REWARD)
  return path


def begin_rewarded(root, reward, *stages):
  runner.check_workdir(rewarded(reward), root)
  for stage in stages:
    (root / stage).mkdir()


def test_a_reward_function_that_changed_under_a_stage_is_named(tmp_path, reward):
  begin_rewarded(tmp_path / "run", reward, "ppo")
  runner.check_workdir(rewarded(reward), tmp_path / "run")
  reward.write_text(REWARD.replace("1.0", "0.5"))
  with pytest.raises(UserError) as error:
    runner.check_workdir(rewarded(reward), tmp_path / "run")
  said = str(error.value)
  assert f"--config.reward.terms.mine.fn={reward}:score: sha256 " in said
  assert "Use another --workdir" in said and said.count("--config.") == 1
  reward.write_text(REWARD)
  runner.check_workdir(rewarded(reward), tmp_path / "run")


def test_a_reward_function_may_change_before_a_stage_has_read_it(tmp_path, reward):
  begin_rewarded(tmp_path / "run", reward, "sft_short")
  reward.write_text(REWARD.replace("1.0", "0.5"))
  runner.check_workdir(rewarded(reward), tmp_path / "run")


def test_the_file_of_a_reward_function_may_be_moved(tmp_path, reward):
  begin_rewarded(tmp_path / "run", reward, "ppo")
  moved = reward.rename(tmp_path / "moved.py")
  runner.check_workdir(rewarded(moved), tmp_path / "run")


def test_another_reward_function_of_the_same_file_is_refused(tmp_path, reward):
  begin_rewarded(tmp_path / "run", reward, "ppo")
  with pytest.raises(UserError, match=r"reward.terms.mine.fn=.*:other: sha256"):
    runner.check_workdir(rewarded(reward, function="other"), tmp_path / "run")


def test_reward_functions_without_weight_or_file_have_no_hash(reward):
  hashed = data_files.hash_data_files
  assert list(hashed(rewarded(reward))) == ["reward.terms.mine.fn"]
  assert not hashed(rewarded(reward, weight=0.0))
  assert not hashed(rewarded("json"))


# Videos.


def loaded(workdir, digests):
  """A run of records whose videos have these digests, with an unused id for None."""
  named = {name: workdir / f"{digest}.npy" for name, digest in digests.items()}
  examples = [{"id": f"of {name}", "video": name} for name in digests]
  run = Run(small.config({}), workdir, *[None] * (len(Run._fields) - 2))
  store = FeatureStore(named, {}, {}, {})
  return run._replace(splits=Splits(sft=examples), features=store)


def test_a_video_that_changed_is_refused_and_one_that_moved_is_not(tmp_path):
  data_files.check_videos(loaded(tmp_path, {"a": "1", "b": "2"}), is_begun=False)
  data_files.check_videos(loaded(tmp_path, {"b": "2", "a": "1"}), is_begun=True)
  changed = loaded(tmp_path, {"a": "1", "b": "3"})
  with pytest.raises(UserError, match="data.videos"):
    data_files.check_videos(changed, is_begun=True)
  data_files.check_videos(changed, is_begun=False)
  data_files.check_videos(changed, is_begun=True)
