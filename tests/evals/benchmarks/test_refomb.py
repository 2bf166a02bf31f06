"""RefoMB: wins, ties and losses against the reference, worked out by hand."""

import json

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import refomb


def row(kind, question, answer="ref"):
  return {"image_url": "https://a.org/b/c.jpg", "question": question, "type": kind,
          "description": f"What there is: {question}", "answer": answer}  # fmt: skip


@pytest.fixture
def path(tmp_path):
  rows = [row("OCR", "1?"), row("OCR", "2?"), row("Coarse", "3?"), row("Coarse", "4?")]
  path = tmp_path / "gpt4v_RefoMB_dev_0521.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def reply(fewer, better):
  return f"Both...\nFewer hallucinations: [[{fewer}]]\n**Better overall**: [[{better}]]"


REPLIES = {"1": reply("A", "A"), "2": reply("C", "B"), "3": reply("B", "B"),
           "4": reply("C", "C")}  # fmt: skip
SAID = {f"{i}?": "x" for i in range(1, 5)}


def run(path, replies=REPLIES, said=SAID, asked=None):
  judge = files.judge(lambda case: replies[case.id], asked)
  return files.run(refomb, files.model(said), judge, files.config(path))


def test_a_tie_is_half_a_win(path):
  means = {name: value.mean for name, value in run(path).values.items()}
  assert means == {
    "win_rate": 2.5 / 4, "trustworthiness": 2 / 4,
    "OCR.win_rate": 1 / 2, "OCR.trustworthiness": 0.5 / 2,
    "Coarse.win_rate": 1.5 / 2, "Coarse.trustworthiness": 1.5 / 2,
  }  # fmt: skip


def test_judge_reads_the_description_and_the_reference_first(path):
  asked = []
  run(path, asked=asked)
  case = asked[0][0]
  assert (
    "nothing out:\nWhat there is: 1?\nQuestion: 1?\nAnswer A: ref\nAnswer B: x"
    in (case.prompt)
  )
  assert (case.video, case.rival) == ("videos/c.jpg", "ref")


def test_what_cannot_be_read_is_counted_and_not_scored(path):
  replies = REPLIES | {"1": "A is better.", "2": None}
  found = run(path, replies, SAID | {"4?": None})
  assert found.counts == {"cases": 4, "unanswered": 1, "unjudged": 1, "unparsed": 1}
  assert (found.values["win_rate"].mean, found.values["win_rate"].n) == (1, 1)


@pytest.mark.parametrize(
  "text",
  ["", "Better overall: [[B]]", reply("D", "A"),
   f"{reply('A', 'B')}\nBetter overall: [[A]]"],
)  # fmt: skip
def test_a_verdict_that_is_missing_or_double_is_none(text):
  assert refomb.parse_two_verdicts(text) is None


@pytest.mark.parametrize(
  "text",
  ["Fewer hallucinations: [[A]]\nBetter overall: [[B]]",
   "**Fewer hallucinations:** A\n**Better overall:** B",
   "<think>Better overall: [[A]]</think>Fewer hallucinations: A\nBetter overall: B",
   '{"fewer_hallucinations": "A", "better_overall": "B"}',
   "Fewer hallucinations: answer A\nBetter overall: answer B"],
)  # fmt: skip
def test_verdicts_are_read_in_other_forms(text):
  found = refomb.parse_two_verdicts(text)
  assert found == {"trustworthiness": 0, "win_rate": 1}


def test_an_echo_of_the_prompt_is_no_verdict():
  assert (
    refomb.parse_two_verdicts(refomb.PROMPTS["compare"].split("neither:")[1]) is None
  )


def test_other_files_are_refused(path):
  path.write_text(json.dumps(row("OCR", "?", answer="")))
  with pytest.raises(
    ValueError, match=r"(?s)line 1: it has no \['answer'\].*RefoMB comes from"
  ):
    refomb.load(files.config(path))
