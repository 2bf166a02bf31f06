"""What benchmarks share: replies read, scores counted, judgements kept."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import Case, Scored

SOURCE = protocol.Source("Bench", "https://example.org", "  a list of things")


@pytest.mark.parametrize(
  ("text", "score"),
  [
    ('{"score": 4}', 4),
    ("{'score': 4.8}", 4.8),
    ("{'score': '3'}", 3),
    ("```json\n{'pred': 'yes', 'score': 0}\n```", 0),
    ("**Score:** 4/5.", 4),
    ("score = 5.", 5),
    ("4", 4),
  ],
)
def test_score_is_read_in_whatever_form(text, score):
  assert protocol.parse_score(text) == score


@pytest.mark.parametrize(
  "text",
  [
    *("", "Good.", '{"score": 6}', '{"score": -1}', '{"score": four}', "7"),
    *("{'score': 3} or rather {'score': 5}", "score: 4/10", "score: nan", "4 of 9"),
    "{'underscore': 4}",
  ],
)
def test_what_names_no_score_or_several_is_none(text):
  assert protocol.parse_score(text) is None


def test_yes_or_no_is_read_and_both_are_neither():
  assert protocol.parse_pred("{'pred': 'Yes', 'score': 4}") is True
  assert protocol.parse_pred('{"pred": "no"}') is False
  assert protocol.parse_pred("{'pred': 'yes'}, {'pred': 'no'}") is None
  assert protocol.parse_pred("yes") is None


def test_scores_are_means_and_what_has_none_is_counted_and_not_zero():
  rows = [
    Scored("a", "v1", {"m": 4.0}), Scored("b", "v1", {"m": 1.0}),
    Scored("c", "v2", {"n": 2.0}), Scored("d", "v2", {}, "unparsed"),
    Scored("e", "v3", {}, "unanswered"),
  ]  # fmt: skip
  found = protocol.scores_of(rows)
  assert {name: (x.mean, x.n) for name, x in found.values.items()} == {
    "m": (2.5, 2), "n": (2.0, 1)}  # fmt: skip
  assert found.counts == {"cases": 5, "unanswered": 1, "unjudged": 0, "unparsed": 1}


def test_questions_about_one_video_are_drawn_together():
  rows = [Scored(str(i), "one", {"m": float(i)}) for i in range(5)]
  interval = protocol.scores_of(rows).values["m"]
  assert interval.low == interval.high == interval.mean == 2


def cases(*names):
  return [Case(name, "v", f"Rate {name}.", "A", ("B",)) for name in names]


def test_what_was_judged_is_not_asked_again(tmp_path):
  asked, path = [], tmp_path / "judgements.jsonl"
  judge = files.judge(lambda case: f"score: {len(case.id)}", asked)
  first = protocol.kept(judge, path, batch=2).ask(cases("a", "bb", "ccc"))
  again = protocol.kept(judge, path, batch=2).ask(cases("ccc", "dddd", "a"))
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
    protocol.kept(files.judge(dies), path, batch=2).ask(cases("a", "b", "c"))
  judge = protocol.kept(files.judge(lambda case: "score: 1", asked), path, batch=2)
  assert judge.ask(cases("a", "b", "c")) == ["score: 1"] * 3
  assert [[c.id for c in part] for part in asked] == [["c"]]


def test_no_reply_is_asked_for_again(tmp_path):
  path = tmp_path / "judgements.jsonl"
  silent = protocol.kept(files.judge(lambda case: None), path, batch=4)
  assert silent.ask(cases("a")) == [None]
  speaks = protocol.kept(files.judge(lambda case: "score: 2"), path, batch=4)
  assert speaks.ask(cases("a")) == ["score: 2"]


@pytest.mark.parametrize(
  ("facts", "changed"),
  [({"version": "2"}, {}), ({}, {"prompt": "Rate."}), ({}, {"said": ("C",)})],
)
def test_another_judge_prompt_or_answer_is_judged_anew(tmp_path, facts, changed):
  path = tmp_path / "judgements.jsonl"
  judge = files.judge(lambda case: "score: 1")
  protocol.kept(judge, path, batch=4).ask(cases("a"))
  other = files.judge(lambda case: "score: 2")
  other = protocol.kept(other._replace(facts=judge.facts | facts), path, batch=4)
  assert other.ask([cases("a")[0]._replace(**changed)]) == ["score: 2"]


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    (None, "no file at"),
    ({"video_name": "v"}, "must hold a list"),
    ([], "must hold a list"),
    ([{"Q": 1}, {"A": 1}], r"record 2 has no \['Q'\]"),
  ],
)
def test_a_file_that_is_missing_or_unlike_says_where_it_comes_from(
  tmp_path, rows, said
):
  path = tmp_path / "x.json"
  if rows is not None:
    files.write(path, rows)
  with pytest.raises((FileNotFoundError, ValueError), match=said) as caught:
    protocol.read_list(path, ["Q"], SOURCE)
  assert "Bench comes from https://example.org" in str(caught.value)
  assert "a list of things" in str(caught.value)


@pytest.mark.parametrize(
  ("there", "name"),
  [("a.mp4", "a"), ("a.mp4", "a.mp4"), ("v_a.mkv", "a"), ("a/1.jpg", "a")],
)
def test_videos_are_found_by_name(tmp_path, there, name):
  (tmp_path / there).parent.mkdir(exist_ok=True)
  (tmp_path / there).touch()
  found = protocol.find_video(tmp_path, name)
  assert found == str(tmp_path / there.split("/")[0])


def test_a_video_that_is_not_there_is_named(tmp_path):
  assert protocol.find_video(tmp_path, "a") == str(tmp_path / "a")


def test_questions_of_a_folder_below_are_in_the_hash(tmp_path):
  (tmp_path / "query").mkdir()
  amber = protocol.all_benchmarks()["amber"]
  made = lambda text: (
    files.write(tmp_path / "query" / "query_all.json", [text]),
    protocol.content(amber, files.config(tmp_path)),
  )[1]
  assert made("a") == made("a") != made("b")
