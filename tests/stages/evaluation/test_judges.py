"""Judges held against truth and labels, and what is kept of that."""

import io
import json

import pytest

from configs import grm
from tests.helpers.stage_runs import StageLog, save, untrained_lora
from tests.stages.training.test_generative_rm import in_folder
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.stages.evaluation import judges


@pytest.fixture
def run(one, tmp_path):
  made = in_folder(one, tmp_path)
  save(made, "grm", {"policy": untrained_lora(made)})
  return made


def measured(run):
  with StageLog(run.workdir / "judges", "judges", 1) as log:
    return judges.run_judges(run, "judges", run.workdir / "judges", log)


def test_every_judge_that_there_is_is_measured(run):
  summary = measured(run)
  folder = run.workdir / "judges"
  labels = json.loads((folder / "results.json").read_text())["labels"]
  assert list(labels["judges"]) == ["untrained", "reward_model", "grm"]
  assert labels["judges"]["grm"]["unread"]["mean"] == 1
  assert labels["judges"]["reward_model"]["unread"]["mean"] == 0
  assert set(labels["difference"]) == {"untrained", "reward_model"}
  assert summary["labels_grm"] == labels["judges"]["grm"]["accuracy"]["mean"] == 0
  rows = jsonl.read_jsonl(folder / "pairs.jsonl")
  assert len([row for row in rows if row["set"] == "labels"]) == labels["pairs"]
  assert set(rows[0]["judges"]) == set(labels["judges"])


def test_what_was_asked_before_is_not_asked_again(run, monkeypatch):
  summary = measured(run)
  asked = lambda *given, **settings: pytest.fail("asked again")
  monkeypatch.setattr(judges.answering, "answer_requests", asked)
  monkeypatch.setattr(judges.scoring, "score_texts", asked)
  assert measured(run) == summary


def test_a_server_judges_pairs_too(run, monkeypatch):
  class Server:
    def __init__(self, config, cache):
      assert config.model == "m-1" and cache.parent == run.workdir / "judges"

    def ask(self, queries):
      return ["\\boxed{8, 4}"] * len(queries)

  monkeypatch.setattr(judges.endpoint, "Endpoint", Server)
  run.config.judges.server = True
  run.config.judges.endpoint.update(url="http://localhost", model="m-1")
  measured(run)
  found = json.loads((run.workdir / "judges" / "results.json").read_text())["labels"]
  assert found["judges"]["endpoint"]["unread"]["mean"] == 0
  rows = jsonl.read_jsonl(run.workdir / "judges" / "said_endpoint.jsonl")[1:]
  assert {row["choice"] for row in rows} == {1}


def test_pairs_of_a_file_are_preferences_or_pair_tasks(run, tmp_path):
  log = StageLog(tmp_path / "log", "judges", 1, stream=io.StringIO())
  assert judges.load_judge_pairs(run, log) == (run, [])
  run.config.judges.pairs = run.config.rm.preferences
  run.config.judges.videos = run.config.data.videos
  _, pairs = judges.load_judge_pairs(run, log)
  assert {pair["output_1"] for pair in pairs} & {"Blue rain."}
  video = run.splits.benchmark[0]["video"]
  row = {"image_path": video, "instruction": "?", "human_answer": "B",
         "answer1": {"answer": "x"}, "answer2": {"answer": "y"}}  # fmt: skip
  path = tmp_path / "pair.jsonl"
  path.write_text(json.dumps(row))
  run.config.judges.update(pairs=str(path), videos="/")
  _, [pair] = judges.load_judge_pairs(run, log)
  assert (pair["output_2"], pair["preference"]) == ("y", 2)


def test_a_server_is_a_judge_only_if_it_is_selected():
  config = grm.get_config()
  config.judge.update(url="http://a/v1", key_env="")
  judges.check(config)  # The server of other stages.
  config.judges.endpoint.url = "http://b/v1"
  with pytest.raises(UserError, match="judges.endpoint.url=.*judges.server=True"):
    judges.check(config)
  config.judges.server = True
  with pytest.raises(UserError, match="judges.endpoint.model must be"):
    judges.check(config)
  config.judge.model = "m"
  judges.check(config)
