"""Verdicts of a judge beside those of truth."""

from vlmrlaif_jax.data.prompts import BETTER, BRIEF, EQUAL
from vlmrlaif_jax.evals import self_judge
from vlmrlaif_jax.feedback.pairwise_judge import Judgement, Outcome

SAID = (["a", "b", "c", "d"], ["a", "bb", "cc", "dd"])


def example(number, **truth):
  return {"id": f"q{number}", "video": f"v{number}.mp4", "question": "Which?",
          "answer": "", "source": "", "turns": [],
          **({"truth": truth} if truth else {})}  # fmt: skip


EXAMPLES = [example(i) for i in range(4)]


def test_only_unlike_answers_are_judged():
  assert self_judge.unlike(SAID, share=1.0, seed=0) == [1, 2, 3]


def test_share_takes_some_of_them_whatever_their_number():
  said = (["a"] * 100, [f"b{i}" for i in range(100)])
  rows = self_judge.unlike(said, share=0.3, seed=0)
  assert len(set(rows)) == 30 and max(rows) > 60
  assert rows == self_judge.unlike(said, share=0.3, seed=0)


def likes_long(asked):
  """A judge that finds the longer answer better; `asked` takes up what it is asked."""

  def ask(queries):
    asked.extend(queries)
    return [say(query.prompt) for query in queries]

  def say(prompt):
    a, b = prompt.split("Output A: ")[1].split(" Which")[0].split(" Output B: ")
    return EQUAL if len(a) == len(b) else BETTER.format("AB"[len(b) > len(a)], "good")

  return ask


def test_judge_sees_both_orders_and_its_narrative():
  asked = []
  found = self_judge.judge(
    [1, 3], EXAMPLES, SAID, ["Seen: b.", ""], likes_long(asked), BRIEF
  )
  assert {i: j.outcome for i, j in found.items()} == {1: ("kept", 2), 3: ("kept", 2)}
  assert [q.id for q in asked] == [
    "judge:AB:q1", "judge:AB:q3", "judge:BA:q1", "judge:BA:q3",
  ]  # fmt: skip
  assert ["Seen: b." in q.prompt for q in asked] == [True, False, True, False]


def test_truth_stands_beside_each_verdict():
  examples = [example(i, scene={}, kind="count", answer="bb") for i in range(4)]
  judgements = {i: Judgement(Outcome("kept", 1)) for i in (1, 2)}
  judgements[3] = Judgement(Outcome("unparsable"))
  wins, truths = self_judge.outcomes(judgements, examples, SAID)
  assert wins == {1: 0.0, 2: 0.0}
  assert truths == {1: 1.0, 2: 0.5}  # "bb" is right; neither "c" nor "cc" is.


def test_truth_of_a_users_example_is_not_known():
  judgements = {1: Judgement(Outcome("tie"))}
  assert self_judge.outcomes(judgements, EXAMPLES, SAID) == ({1: 0.5}, {})
