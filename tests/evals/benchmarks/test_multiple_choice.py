"""Multiple choice: who says which letter, worked out by hand."""

import json

import numpy as np
import pytest

from tests.evals import files
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals.benchmarks import multiple_choice, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import BenchmarkModel
from vlmrlaif_jax.feedback.replies.options import parse_choice

NAMES = ("red", "dark red", "blue", "green")


def row(number, answer, duration="short", video=None, **more):
  listed = [f"{x}. {t}" for x, t in zip("ABCD", NAMES, strict=True)]
  return {"videoID": video or f"v{number}", "question_id": f"{number}",
          "duration": duration, "domain": "Life", "task_type": "Counting",
          "question": f"Q{number}?", "options": listed, "answer": answer,
          **more}  # fmt: skip


@pytest.fixture
def path(tmp_path):
  rows = [row(1, "A"), row(2, "B"), row(3, "C", "long"), row(4, "D", "long")]
  return files.write(tmp_path / "mme.json", rows)


def config(path, **settings):
  made = multiple_choice.BENCHMARKS[0].default_config()
  made.update(questions=str(path), videos="videos", **settings)
  return made


def run(model, *given, **settings):
  return files.run(
    multiple_choice, model, world_files.EXACT, config(*given, **settings)
  )


def means(found):
  return {name: stat.mean for name, stat in found.values.items()}


# By log-probability.


def chooses(logps, asked=None):
  """A model of these log-probabilities, by question."""

  def choose(name, questions):
    if asked is not None:
      asked[name] = questions
    return [logps.get(q.id) for q in questions]

  return BenchmarkModel(lambda questions: [], choose)


LOGPS = {
  "1": [-1.0, -2.0, -3.0, -4.0],  # Right.
  "2": [-1.0, -2.0, -3.0, -4.0],
  "3": [-5.0, -9.0, -0.5, -4.0],  # Right.
  "4": [-5.0, -9.0, -4.5, -4.0],  # Right.
}


def test_the_likeliest_option_is_chosen(path):
  found = run(chooses(LOGPS), path, by=("letter",))
  assert means(found) == {"letter_accuracy": 0.75, "letter_accuracy_short": 0.5,
                          "letter_accuracy_long": 1.0}  # fmt: skip


def test_a_question_without_a_choice_is_not_scored(path):
  found = run(chooses({"2": LOGPS["2"]}), path, by=("letter",))
  assert means(found)["letter_accuracy"] == 0 and found.counts["unanswered"] == 3


def test_letters_are_chosen_with_the_options_in_sight_and_texts_without(path):
  asked = {}
  run(chooses(LOGPS, asked), path, by=("letter", "text"))
  letter, text = asked["by_letter"][0], asked["by_text"][0]
  assert letter.options == ("A", "B", "C", "D") and text.options == NAMES
  assert letter.text.startswith("Q1?\nA. red\nB. dark red\nC. blue\nD. green\n")
  assert text.text == "Q1?"


def test_questions_about_a_video_are_drawn_together(tmp_path):
  same = files.write(tmp_path / "a.json", [row(n, "A", video="v") for n in (1, 2)])
  found = run(chooses({"1": [0, -1], "2": [-1, 0]}), same, by=("letter",))
  stat = found.values["letter_accuracy"]
  assert (stat.mean, stat.low, stat.high) == (0.5, 0.5, 0.5)


# By what is said.


def test_what_is_said_is_read_and_what_cannot_be_is_counted(path):
  said = {"1": "A", "2": "The answer is (C).", "3": "Blue!"}
  model = files.says(lambda questions: [said.get(q.id, "?") for q in questions])
  found = run(model, path, by=("generation",))
  assert means(found)["generation_accuracy"] == 2 / 3
  assert found.counts == {"cases": 4, "unanswered": 0, "unjudged": 0, "unparsed": 1}


def test_options_of_one_text_are_not_told_apart():
  assert parse_choice("red", ("red", "Red.")) is None


# Files.


def test_lines_are_read_as_a_list_is(path, tmp_path):
  lines = tmp_path / "mme.jsonl"
  rows = json.loads(path.read_text())
  lines.write_text("".join(json.dumps(each) + "\n" for each in rows))
  load = multiple_choice.load
  assert load(config(lines)) == load(config(path)) and len(load(config(path))) == 4


def test_subsets_are_of_durations_domains_and_tasks(tmp_path):
  rows = [row(1, "A"), row(2, "A", "long"), row(3, "A", domain="Sports"),
          row(4, "A", task_type="OCR")]  # fmt: skip
  made = files.write(tmp_path / "mme.json", rows)
  ids = lambda **settings: [
    i.id for i in multiple_choice.load(config(made, **settings))
  ]
  assert ids(durations=("long",)) == ["2"] and ids(domains=("Sports",)) == ["3"]
  assert ids(durations=("short",), tasks=("Counting",)) == ["1", "3"]
  with pytest.raises(ValueError, match="no question of .*medium.*'long', 'short'"):
    ids(durations=("medium",))


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ([row(1, "E")], "record 1: answer must be one of ABCD, .*, got 'E'"),
    ([row(1, "A", options=["A. red", "blue"])], 'options must be ."A. ..."'),
    ([row(1, "A", options=["A. red"])], "two or more"),
    ([row(1, "A", options=["A. red", "C. blue"])], "options must be"),
    ([row(1, "A", options=["A. red", None])], "two or more"),
    ([row(1, "A", options=[None, "A. red"])], "an option is empty"),
    ([row(1, None)], 'it has no "answer"'),
    ([row(1, "A", question=float("nan"))], 'it has no "question"'),
    ([{"question": "?"}], '(?s)it has no "videoID" or .*Video-MME comes from'),
  ],
)
def test_other_layouts_are_refused(tmp_path, rows, said):
  with pytest.raises(ValueError, match=said):
    multiple_choice.load(config(files.write(tmp_path / "mme.json", rows)))


def test_the_nested_file_of_the_official_script_is_read(tmp_path):
  nested = [
    {"video_id": "001", "videoID": "fFj", "duration": "short", "domain": "Life",
     "questions": [{"question_id": f"001-{i}", "task_type": "OCR", "question": "What?",
                    "options": [" A. red", "\uff08B\uff09 blue"], "answer": "B."}
                   for i in (1, 2)]}
  ]  # fmt: skip
  items = multiple_choice.load(config(files.write(tmp_path / "mme.json", nested)))
  assert [item.id for item in items] == ["001-1", "001-2"]
  want = ("videos/fFj", "short", "What?", ("red", "blue"), 1)
  assert items[0][1:] == want


def test_a_bad_row_costs_itself_alone(tmp_path):
  path = files.write(tmp_path / "mme.json", [row(1, "A"), row(2, "E"), row(3, "B")])
  items = multiple_choice.load(config(path), problems := [])
  assert [item.id for item in items] == ["1", "3"]
  [(place, reason, file)] = problems
  assert (place, file) == ("record 2", "mme.json") and "got 'E'" in reason


def test_a_folder_has_a_file_for_each_task(tmp_path):
  for task, end in (("action", 4.0), ("counting", None)):
    asked = {"video": "a.mp4", "question": task, "candidates": ["red", "blue"],
             "answer": "blue", "start": 1.5 if end else None, "end": end}  # fmt: skip
    files.write(tmp_path / f"{task}.json", [asked])
  items = multiple_choice.load(config(tmp_path))
  assert [(item.video, item.duration) for item in items] == [
    ("videos/a.mp4#t=1.5,4", ""),
    ("videos/a.mp4", ""),
  ]
  [item] = multiple_choice.load(config(tmp_path, tasks=("counting",)))
  assert item.question == "counting"


def test_numbers_of_questions_may_repeat_for_another_video(tmp_path):
  path = tmp_path / "val.csv"
  path.write_text(
    "video,frame_count,question,answer,qid,type,a0,a1\n"
    "42,900,why,1,0,CW,red,blue\n7,900,how,0,0,CH,red,blue\n7,900,how,0,0,CH,a,b\n"
  )
  items = multiple_choice.load(config(path), problems := [])
  assert [item.id for item in items] == ["0", "7:0"]
  assert problems == [("line 4", "question_id 7:0 is there twice", "val.csv")]


def test_a_duration_in_seconds_has_no_measure_of_its_own(tmp_path):
  asked = {"video": "a.mp4", "question": "Q?", "candidates": ["red", "blue"],
           "answer": "blue", "duration": 480.2}  # fmt: skip
  path = files.write(tmp_path / "mlvu.json", [asked])
  found = run(chooses({"1": [0.0, 1.0]}), path, by=("letter",))
  assert means(found) == {"letter_accuracy": 1.0}


def test_a_missing_file_says_where_to_get_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="MME-Benchmarks/Video-MME"):
    multiple_choice.load(config(tmp_path / "none.json"))


def test_a_way_that_there_is_not_is_refused(path):
  with pytest.raises(ValueError, match="by must be some of .*'letter'.*'number'"):
    multiple_choice.check(config(path, by=("number",)))


# The embedded world's.


@pytest.fixture
def examples(tmp_path):
  """All short questions about three videos."""
  rng, made = np.random.default_rng(0), []
  for i in range(3):
    seen = scene.sample_scene(rng)
    for kind, asked in language.make_questions(seen, rng).items():
      truth = {"scene": scene.scene_to_json(seen), "kind": kind, "answer": asked.answer}
      made.append({"id": f"{kind}-{i}", "video": str(tmp_path / f"{i}.mp4"),
                   "question": asked.question, "truth": truth})  # fmt: skip
  files.write_world(tmp_path, made)
  return made


def test_of_the_worlds_options_one_is_right(examples, tmp_path):
  items = multiple_choice.load(config(tmp_path / "multiple_choice.json"))
  assert len(items) == len(examples)
  for item, example in zip(items, examples, strict=True):
    right = [option == example["truth"]["answer"] for option in item.options]
    assert sum(right) == 1 and right[item.answer] and len(set(item.options)) > 1
  assert len({item.answer for item in items}) == 4


def test_who_knows_the_world_is_right_and_who_says_a_is_as_often_as_a_is(
  examples, tmp_path
):
  path = tmp_path / "multiple_choice.json"
  items = multiple_choice.load(config(path))
  truths = {example["id"]: example["truth"]["answer"] for example in examples}
  knows = files.says(lambda questions: [truths[q.id] for q in questions])
  says_a = chooses({i.id: [0, *[-1] * (len(i.options) - 1)] for i in items})
  assert means(run(knows, path, by=("generation",)))["generation_accuracy"] == 1
  share = sum(item.answer == 0 for item in items) / len(items)
  found = means(run(says_a, path, by=("letter",)))
  assert found["letter_accuracy"] == pytest.approx(share) and 0 < share < 1
