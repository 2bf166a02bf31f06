"""Packed conversations: to the model each looks like a row of its own."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tools.pretraining import mix, scene_texts
from tools.pretraining.method import make_attention_mask
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import prompts, tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.data.world import language, scene

VIDEO, CLIP, LENGTH = 5, 3, 900  # Tokens.
TEMPLATE = tokenization.CONVERSATION_TEMPLATES["brief"]
SCENES = [scene.sample_scene(np.random.default_rng(i)) for i in range(3)]
TASKS = [
  mix.make_tasks(each, np.random.default_rng(9), judging=True) for each in SCENES
]
CLIPS = [mix.make_clip_task(each, third) for third, each in enumerate(SCENES)]


def ids_of(tok, task, video_tokens=VIDEO):
  """A conversation, encoded alone."""
  return tokenization.encode_conversation(
    tok, TEMPLATE, task.turns, video=lay_out_features(video_tokens)
  ).ids


def pack(tok, *, length=LENGTH, clips=CLIPS):
  return mix.pack(
    tok, TEMPLATE, TASKS, length=length, videos=[lay_out_features(VIDEO)] * len(TASKS),
    clips=clips, clip_videos=[lay_out_features(CLIP)] * len(clips),
  )  # fmt: skip


def own_row(packed, row, segment):
  """(ids, positions, weights) that a conversation sees: the video's and its own."""
  seen = packed.segments[row] == segment
  if segment != mix.CLIP_SEGMENT:
    seen |= packed.segments[row] == 0
  return tuple(x[row][seen] for x in (packed.tokens, packed.positions, packed.weights))


@pytest.mark.parametrize("clips", [CLIPS, ()])
def test_packed_conversations_equal_those_encoded_alone(tok, clips):
  packed = pack(tok, clips=clips)
  for row, tasks in enumerate(TASKS):
    assert packed.segments[row].max() == len(tasks) + 1
    for segment, task in enumerate(tasks, start=2):
      ids, positions, _ = own_row(packed, row, segment)
      assert ids.tolist() == ids_of(tok, task)
      assert positions[:, 0].tolist() == list(range(len(ids)))


def test_conversation_about_a_part_stands_by_itself(tok):
  packed = pack(tok)
  for row, task in enumerate(CLIPS):
    ids, positions, _ = own_row(packed, row, mix.CLIP_SEGMENT)
    assert ids.tolist() == ids_of(tok, task, CLIP)
    assert positions[:, 0].tolist() == list(range(len(ids)))


def test_part_is_described_as_it_looks_there():
  (((_, said),),) = [task.turns for task in CLIPS[1:2]]
  assert said == language.describe_scene(SCENES[1], *mix.THIRDS[1])


def test_only_last_answers_are_learned(tok):
  packed = pack(tok)
  for row, tasks in enumerate(TASKS):
    for segment, task in enumerate([CLIPS[row], *tasks], start=1):
      ids, _, weights = own_row(packed, row, segment)
      learned = tok.decode(ids[weights > 0])
      assert learned.strip() == f"{task.turns[-1][1]}</s>"


def test_conversations_weight_grows_with_the_root_of_its_answers_length(tok):
  packed = pack(tok)
  for segment, task in enumerate(TASKS[0], start=2):
    weights = own_row(packed, 0, segment)[2]
    expected = mix.WEIGHTS[task.name] * np.sqrt((weights > 0).sum())
    assert weights.sum() == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_left_out_whole(tok):
  packed = pack(tok, length=260)
  for row, tasks in enumerate(TASKS):
    kept = set(packed.segments[row].tolist()) - {-1, 0, mix.CLIP_SEGMENT}
    assert 0 < len(kept) < len(tasks)
    for segment in kept:
      ids, _, _ = own_row(packed, row, segment)
      assert ids.tolist() == ids_of(tok, tasks[segment - 2])


def test_video_stands_once_in_a_row_and_its_part_once(tok):
  packed = pack(tok)
  assert ((packed.tokens == VIDEO_TOKEN).sum(1) == VIDEO + CLIP).all()


def test_attention_is_to_the_video_and_oneself(tok):
  segments = jnp.asarray(pack(tok, length=200).segments[:1])
  allowed = np.asarray(make_attention_mask(segments, mix.CLIP_SEGMENT))
  for row, seg in enumerate(segments.tolist()):
    for query, mine in enumerate(seg):
      for key, other in enumerate(seg):
        visible = other == mine or (other == 0 and mine not in (-1, mix.CLIP_SEGMENT))
        assert allowed[row, query, key] == (visible and other != -1 and key <= query)


def test_attention_of_a_row_made_by_hand():
  segments = jnp.array([[0, 0, 1, 2, 3, 2, -1]])
  allowed = np.asarray(make_attention_mask(segments, 1))[0]
  seen = [np.flatnonzero(row).tolist() for row in allowed]
  assert seen == [[0], [0, 1], [2], [0, 1, 3], [0, 1, 4], [0, 1, 3, 5], []]


class Unlucky(np.random.Generator):
  """Draws that leave out all that may be left out."""

  def random(self):
    return 0.99


def test_there_is_always_something_to_learn():
  (task,) = mix.make_tasks(SCENES[0], Unlucky(np.random.PCG64(0)), judging=False)
  assert task.turns == ((scene_texts.DESCRIBE, language.describe_scene(SCENES[0])),)


def test_tasks_about_a_frame_are_true_of_it():
  rng = np.random.default_rng(7)
  for each in SCENES:
    told, *asked = mix.make_image_tasks(each, 20, rng)
    assert told.turns == ((scene_texts.IMAGE, scene_texts.describe_image(each, 20)),)
    assert {task.name for task in asked} == {"answer"} and len(asked) == 4


@pytest.mark.parametrize("judging, names", [
  (True, {"describe", "happens", "answer", "check", "judge"}),
  (False, {"describe", "happens", "answer"}),
])  # fmt: skip
def test_judging_comes_only_where_it_is_asked_for(judging, names):
  rng = np.random.default_rng(6)
  made = [mix.make_tasks(each, rng, judging=judging) for each in SCENES * 20]
  assert {task.name for tasks in made for task in tasks} == names


@functools.cache
def judged(prefix):
  """(scene, question put to the judge, what it says), with or without context."""
  rng = np.random.default_rng(3)
  found = []
  for _ in range(60):
    each = scene.sample_scene(rng)
    for task in mix.make_tasks(each, rng, judging=True):
      if task.name == "judge" and (" Context: " in task.turns[0][0]) == prefix:
        found.append((each, *task.turns[0]))
  return found


def wrong_statements(seen, question, said):
  """How wrong an answer is, None where the question is a rare one."""
  if question in (language.DESCRIBE_EVENTS, scene_texts.DESCRIBE):
    return language.count_mistakes(said, seen)
  rng = np.random.default_rng(0)
  made = [q for _ in range(12) for q in language.make_questions(seen, rng).values()]
  right = {q.question: q.answer for q in made}
  return int(said != right[question]) if question in right else None


@pytest.mark.parametrize("told", [True, False])
def test_judge_is_right_by_truth(told):
  checked = []
  for seen, ask, verdict in judged(told):
    question, outputs = ask.split(" Question: ")[1].split(" Output A: ")
    a, b = outputs.removesuffix(" Which is better?").split(" Output B: ")
    wrong = [wrong_statements(seen, question, said) for said in (a, b)]
    if None not in wrong:
      better = int(np.sign(wrong[1] - wrong[0]))
      checked.append(verdict[:8])
      assert verdict.startswith({1: "Output A", -1: "Output B", 0: "Both out"}[better])
  assert len(checked) > 25 and {"Output A", "Output B"} <= set(checked)


def test_judge_prefers_both_sides_alike():
  said = [verdict[:8] for told in (True, False) for _, _, verdict in judged(told)]
  share = said.count("Output A") / (said.count("Output A") + said.count("Output B"))
  assert 0.35 < share < 0.65


def test_checks_are_answered_both_ways():
  rng, ask = np.random.default_rng(4), functools.partial(mix.make_tasks, judging=True)
  tasks = [t for each in SCENES for _ in range(10) for t in ask(each, rng)]
  said = [t.turns[1] for t in tasks if t.name == "check"]
  assert {ask for ask, _ in said} == {prompts.BRIEF_PROMPTS.check}
  share = np.mean([answer == "Yes." for _, answer in said])
  assert 0.25 < share < 0.75


def test_narrative_speaks_of_each_third():
  rng = np.random.default_rng(5)
  right = " ".join(language.describe_scene(SCENES[0], *third) for third in mix.THIRDS)
  told = [mix.make_narrative(SCENES[0], rng) for _ in range(40)]
  assert right in told and len(set(told)) > 5
