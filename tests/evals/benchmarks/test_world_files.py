"""The embedded world in the layouts of the papers: every right value is known."""

import json

import numpy as np
import pytest

from tests.evals import files
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals import text_similarity
from vlmrlaif_jax.evals.benchmarks import (
  action,
  amber,
  chair,
  mmhal,
  refomb,
  retrieval,
  videochatgpt,
  world_files,
  zero_shot_qa,
)

TOLD = "The small red ring moves left. The large blue cross stays still."
KINDS = ("attribute", "motion", "description")


@pytest.fixture
def examples(tmp_path):
  """A question of each of KINDS about each of two videos."""
  rng, made = np.random.default_rng(0), []
  for i in range(2):
    seen = scene.sample_scene(rng)
    asked = language.make_questions(seen, rng)
    for kind in KINDS:
      question, answer = language.DESCRIBE_EVENTS, language.describe_scene(seen)
      if kind in asked:
        question, answer = asked[kind].question, asked[kind].answer
      truth = {"scene": scene.scene_to_json(seen), "kind": kind, "answer": answer}
      made.append({"id": f"{kind}-{i}", "video": str(tmp_path / f"benchmark/{i}.mp4"),
                   "question": question, "truth": truth})  # fmt: skip
  files.write_world(tmp_path, made)
  return made


def test_each_kind_stands_in_its_file(examples, tmp_path):
  read = lambda name: json.loads((tmp_path / f"{name}.json").read_text())
  chatgpt = lambda name: read(f"videochatgpt/{name}")
  motions = [e["question"] for e in examples if e["truth"]["kind"] == "motion"]
  assert [row["Q"] for row in chatgpt("temporal_qa")] == motions
  assert len(chatgpt("generic_qa")) == 4 and len(chatgpt("consistency_qa")) == 2
  assert [row["question_id"] for row in read("zero_shot_qa")] == [
    "attribute-0", "motion-0", "attribute-1", "motion-1"]  # fmt: skip
  assert chatgpt("generic_qa")[0]["video_name"] == "benchmark/0"


def policy(truths, wrong=()):
  """Says what is right of each video, but to questions of the videos in `wrong`."""

  def answer(questions):
    return [
      "Blue rain." if q.video[-1] in wrong else truths[q.video[-1], q.text]
      for q in questions
    ]

  return answer


@pytest.fixture
def truths(examples):
  of = {}
  for e in examples:
    video = e["video"].removesuffix(".mp4")[-1]
    of[video, e["question"]] = e["truth"]["answer"]
    if e["truth"]["kind"] == "description":
      of |= {(video, asked): e["truth"]["answer"] for asked in world_files.TWICE}
  return of


@pytest.mark.parametrize(("wrong", "score"), [("", 5.0), ("1", 2.5), ("01", 0.0)])
def test_every_quality_has_the_value_that_is_known(truths, tmp_path, wrong, score):
  asked = files.config(tmp_path / "videochatgpt", tmp_path)
  model = files.says(policy(truths, wrong))
  found = files.run(videochatgpt, model, world_files.EXACT, asked)
  assert {n: x.mean for n, x in found.values.items()} == dict.fromkeys(
    videochatgpt.PROMPTS, score
  )


def test_accuracy_has_the_value_that_is_known(truths, tmp_path):
  asked = files.config(tmp_path / "zero_shot_qa.json", tmp_path)
  model = files.says(policy(truths, "0"))
  found = files.run(zero_shot_qa, model, world_files.EXACT, asked)
  assert {n: x.mean for n, x in found.values.items()} == {"accuracy": 0.5, "score": 2.5}


def test_one_right_answer_of_two_is_not_consistent(truths, tmp_path):
  told = policy(truths)

  def forgets(questions):
    texts = told(questions)
    return ["Blue rain." if q.text == world_files.TWICE[1] else text
            for q, text in zip(questions, texts, strict=True)]  # fmt: skip

  asked = files.config(tmp_path / "videochatgpt", tmp_path)
  found = files.run(videochatgpt, files.says(forgets), world_files.EXACT, asked)
  assert found.values["consistency"].mean == 0
  assert found.values["correctness"].mean == 5


def test_sentences_may_stand_in_any_order():
  seen = scene.sample_scene(np.random.default_rng(0))
  told = language.describe_scene(seen)
  parts = [part.strip() for part in told.split(".") if part.strip()]
  turned = ". ".join(parts[::-1]) + "."
  assert len(parts) > 1 and turned != told
  assert world_files.is_same_answer(turned, told)
  assert not world_files.is_same_answer(parts[0] + ".", told)


def test_other_data_are_refused():
  with pytest.raises(UserError, match="evaluate.NAME.questions"):
    world_files.check_world_examples([{"id": "a", "video": "a.mp4"}])


def test_hallucinated_shapes_have_the_value_that_is_known(examples, truths, tmp_path):
  given = chair.BENCHMARKS[0].default_config()
  given.update(questions=str(tmp_path / "chair.json"), videos=str(tmp_path))
  found = files.run(chair, files.says(policy(truths)), world_files.EXACT, given)
  means = {name: value.mean for name, value in found.values.items()}
  assert (means["chair_s"], means["chair_i"], means["recall"]) == (0, 0, 1)
  # Of both videos, each is told all shapes there are.
  every = lambda questions: ["A disc, rings, a box, a plus, triangles."] * 2
  found = files.run(chair, files.says(every), world_files.EXACT, given)
  scenes = [e["truth"]["scene"] for e in examples if e["truth"]["kind"] == KINDS[-1]]
  there = [len({o.shape for o in scene.scene_from_json(s).objects}) for s in scenes]
  assert found.values["chair_i"].mean == (10 - sum(there)) / 10
  assert found.values["chair_s"].mean == 1 and found.values["recall"].mean == 1


@pytest.mark.parametrize("turned", [False, True])
def test_yes_and_no_have_the_value_that_is_known(examples, tmp_path, turned):
  asked = files.config(tmp_path / "amber", tmp_path)
  items = amber.load(asked)
  told = [
    " ".join(item.hallu if turned else item.truth)
    if item.kind == amber.GENERATIVE
    else ("No.", "Yes.")[item.truth != turned]
    for item in items
  ]
  found = files.run(amber, files.says(lambda *_: told), world_files.EXACT, asked).values
  assert {item.kind for item in items} >= {amber.GENERATIVE, "existence", "attribute"}
  for name in ("accuracy", "f1", "existence.f1", "attribute.recall", "cover"):
    assert found[name].mean == (not turned)
  for name in ("chair", "hal", "cog"):
    assert found[name].mean == turned


def test_hallucinations_that_are_judged_have_the_value_that_is_known(truths, tmp_path):
  asked = files.config(tmp_path / "mmhal.json", tmp_path)
  found = files.run(
    mmhal, files.says(policy(truths, "0")), world_files.EXACT, asked
  ).values
  assert (found["rating"].mean, found["hallucination"].mean) == (3, 0.5)
  assert found["motion.rating"].mean == 3


def compared(module, place, folder, said):
  """The scores where `said` says something of each video, by its name."""
  given = module.BENCHMARKS[0].default_config()
  given.update(questions=str(folder / place), videos=str(folder))
  answer = lambda questions: [said[q.video[-1]] for q in questions]
  model = files.says(answer, similarity=text_similarity.STATEMENTS)
  found = files.run(module, model, world_files.EXACT, given).values
  return {name: value.mean for name, value in found.items()}


@pytest.fixture
def described(examples):
  """What is true of each video, by its name."""
  return {e["video"].removesuffix(".mp4")[-1]: e["truth"]["answer"]
          for e in examples if e["truth"]["kind"] == "description"}  # fmt: skip


def test_true_descriptions_are_found_and_swapped_ones_are_not(described, tmp_path):
  swapped = {"0": described["1"], "1": described["0"]}
  for said, found in ((described, 1), (swapped, 0), ({"0": "x", "1": "x"}, 0.5)):
    assert compared(retrieval, "retrieval.json", tmp_path, said)["r1"] == found


def test_true_descriptions_name_the_action(described, tmp_path):
  swapped = {"0": described["1"], "1": described["0"]}
  for said, found in ((described, 1), (swapped, 0)):
    assert compared(action, "action", tmp_path, said)["top1"] == found


def test_answers_are_compared_with_careless_ones_by_truth(described, tmp_path):
  rows = json.loads((tmp_path / "refomb.json").read_text())
  careless = {row["image_url"][-1]: row["answer"] for row in rows}
  empty = dict.fromkeys("01", "Blue rain.")
  true = compared(refomb, "refomb.json", tmp_path, described)
  # A careless description that leaves nothing out and adds nothing ties with truth.
  wins = [0.5 + 0.5 * (careless[name] != described[name]) for name in careless]
  assert true["win_rate"] == np.mean(wins) > 0.5
  tie = compared(refomb, "refomb.json", tmp_path, careless)
  assert (tie["win_rate"], tie["trustworthiness"]) == (0.5, 0.5)
  assert compared(refomb, "refomb.json", tmp_path, empty)["win_rate"] == 0


def test_what_leaves_out_much_may_be_trusted_and_not_be_better():
  judge = lambda said, rival: world_files.EXACT.ask(
    [world_files.JudgeCase("", "", "", TOLD, (said,), rival)]
  )[0]
  first, second = (f"{part}." for part in TOLD.split(".")[:2])
  worse = first.replace("small", "large")
  assert refomb.parse_two_verdicts(judge(first, f"{worse}{second}")) == {
    "trustworthiness": 1, "win_rate": 0}  # fmt: skip
  assert refomb.parse_two_verdicts(judge(TOLD, first)) == {
    "trustworthiness": 0.5,
    "win_rate": 1,
  }
