"""Judges of benchmarks: judgements kept."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals import judging
from vlmrlaif_jax.evals.benchmarks.protocol import JudgeCase


def cases(*names):
  return [JudgeCase(name, "v", f"Rate {name}.", "A", ("B",)) for name in names]


def test_what_was_judged_is_not_asked_again(tmp_path):
  asked, path = [], tmp_path / "judgements.jsonl"
  judge = files.judge(lambda case: f"score: {len(case.id)}", asked)
  first = judging.cache_judge(judge, path, batch=2).ask(cases("a", "bb", "ccc"))
  again = judging.cache_judge(judge, path, batch=2).ask(cases("ccc", "dddd", "a"))
  assert (first, again) == (["score: 1", "score: 2", "score: 3"],
                            ["score: 3", "score: 4", "score: 1"])  # fmt: skip
  assert [[c.id for c in part] for part in asked] == [["a", "bb"], ["ccc"], ["dddd"]]


def test_a_killed_judge_goes_on_where_it_was(tmp_path):
  asked, path = [], tmp_path / "judgements.jsonl"

  def dies(case):
    if case.id == "c":
      raise KeyboardInterrupt
    return "score: 1"

  with pytest.raises(KeyboardInterrupt):
    judging.cache_judge(files.judge(dies), path, batch=2).ask(cases("a", "b", "c"))
  judge = judging.cache_judge(
    files.judge(lambda case: "score: 1", asked), path, batch=2
  )
  assert judge.ask(cases("a", "b", "c")) == ["score: 1"] * 3
  assert [[c.id for c in part] for part in asked] == [["c"]]


def test_no_reply_is_asked_for_again(tmp_path):
  path = tmp_path / "judgements.jsonl"
  silent = judging.cache_judge(files.judge(lambda case: None), path, batch=4)
  assert silent.ask(cases("a")) == [None]
  speaks = judging.cache_judge(files.judge(lambda case: "score: 2"), path, batch=4)
  assert speaks.ask(cases("a")) == ["score: 2"]


@pytest.mark.parametrize(
  ("facts", "changed"),
  [({"version": "2"}, {}), ({}, {"prompt": "Rate."}), ({}, {"responses": ("C",)})],
)
def test_another_judge_prompt_or_answer_is_judged_anew(tmp_path, facts, changed):
  path = tmp_path / "judgements.jsonl"
  judge = files.judge(lambda case: "score: 1")
  judging.cache_judge(judge, path, batch=4).ask(cases("a"))
  other = files.judge(lambda case: "score: 2")
  other = judging.cache_judge(other._replace(facts=judge.facts | facts), path, batch=4)
  assert other.ask([cases("a")[0]._replace(**changed)]) == ["score: 2"]
