"""Creates pretraining data of the base model: packed tasks about one video.

A row contains one video and many conversations about it. Each conversation attends to
the video and to itself, and its positions continue from the video's. The model
therefore computes the same as for a separate row. One more conversation is about a
third of the clip and has its own video features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tools.pretraining import scene_texts
from vlmrlaif_jax.data import prompts, tokenization
from vlmrlaif_jax.data.processors.interface import VideoTokens
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.data.world.scene import CLIP_FRAMES, SCENE_FRAMES, Scene

THIRDS = tuple(
  (start, start + CLIP_FRAMES) for start in range(0, SCENE_FRAMES, CLIP_FRAMES)
)
WEIGHTS = {
  "image": 1.0,
  "caption": 2.0,  # A row has only one, and narratives consist of captions.
  "describe": 1.0,
  "happens": 0.7,
  "answer": 1.0,
  "check": 1.5,
  "judge": 2.5,
}
CLIP_SEGMENT = 1  # The conversation about a third of the clip, which attends to itself.


class Task(NamedTuple):
  """A conversation, whose last answer is the training target."""

  name: str  # A key of WEIGHTS.
  turns: tuple[tuple[str, str], ...]  # (question, answer) of each turn.


class PackedRows(NamedTuple):
  """Rows of packed conversations."""

  tokens: Int[np.ndarray, "batch time"]
  segments: Int[np.ndarray, "batch time"]  # 0: the video, -1: padding, else a task.
  positions: Int[np.ndarray, "batch time axes"]
  weights: Float[np.ndarray, "batch time"]  # Weight of each token's loss.


def make_tasks(scene: Scene, rng: np.random.Generator, *, judging: bool) -> list[Task]:
  """Returns conversations about a whole clip, in random order.

  Args:
    scene: Content of the clip.
    rng: Random generator.
    judging: Whether to add conversations that judge answers. They are learned only
      after the model describes clips well.
  """
  tasks = []
  if rng.random() < 0.6:
    tasks.append(
      Task("describe", ((scene_texts.DESCRIBE, language.describe_scene(scene)),))
    )
  if rng.random() < 0.6:
    text = language.make_careless_description(scene, rng, omission=0.0)
    tasks.append(Task("happens", ((language.DESCRIBE_EVENTS, text),)))
  for question in language.make_questions(scene, rng).values():
    if rng.random() < 0.75:
      text = language.make_careless_answer(question, rng, denial=0.0)
      tasks.append(Task("answer", ((question.question, text),)))
  if not tasks:  # About one scene in 25,000 has no task, but a row requires one.
    tasks.append(
      Task("describe", ((scene_texts.DESCRIBE, language.describe_scene(scene)),))
    )
  if judging:
    tasks += [_check(scene, rng) for _ in range(4)]
  order = rng.permutation(len(tasks))
  # The longest tasks come first, because tasks that do not fit in a row are dropped.
  judged = [_judge(scene, rng) for _ in range(2)] if judging else []
  return judged + [tasks[i] for i in order]


def make_image_tasks(scene: Scene, frame: int, rng: np.random.Generator) -> list[Task]:
  """Returns conversations about one frame."""
  description = scene_texts.describe_image(scene, frame)
  questions = scene_texts.make_image_questions(scene, frame, rng)
  return [
    Task("image", ((scene_texts.IMAGE, description),)),
    *(Task("answer", (questions[i],)) for i in rng.permutation(len(questions))),
  ]


def make_clip_task(scene: Scene, third: int) -> Task:
  """Returns the conversation with the caption of a third of the clip."""
  text = language.describe_scene(scene, *THIRDS[third])
  return Task("caption", ((prompts.BRIEF_PROMPTS.caption, text),))


def make_candidates(
  scene: Scene, rng: np.random.Generator
) -> tuple[str, str, int, str, int]:
  """Returns a question with two answers to compare.

  Returns:
    (question, first answer, its mistakes, second answer, its mistakes).
  """
  if rng.random() < 0.4:
    ask = language.DESCRIBE_EVENTS if rng.random() < 0.8 else scene_texts.DESCRIBE
    a, b = (
      language.describe_scene(scene)
      if n == 0
      else language.make_careless_description(scene, rng, rate=1.0, omission=0.0)
      if rng.random() < 0.4
      else scene_texts.corrupt(scene, rng, errors=int(n))
      for n in rng.permutation(
        [0, int(rng.integers(1, 3))] if rng.random() < 0.7 else rng.integers(0, 3, 2)
      )
    )
    return (
      ask,
      a,
      language.count_mistakes(a, scene),
      b,
      language.count_mistakes(b, scene),
    )
  questions = language.make_questions(scene, rng)
  kinds = [*questions, "false_premise"]  # This kind is drawn twice as often.
  question = questions[str(rng.choice(kinds))]
  wrongs = [str(w) for w in rng.permutation(question.wrong)]
  if question.kind in ("attribute", "motion") and rng.random() < 0.4:
    # Otherwise most denials would be right, and the judge would prefer every denial.
    wrongs.sort(key=lambda answer: answer != question.wrong[-1])
  answers = [question.answer, *wrongs]
  right_and_wrong = rng.random() < 0.9 or len(answers) < 3
  a, b = rng.permutation(answers[:2] if right_and_wrong else answers[1:3])
  wrong = lambda answer: int(answer != question.answer)
  return question.question, str(a), wrong(a), str(b), wrong(b)


def make_narrative(
  scene: Scene,
  rng: np.random.Generator,
  *,
  thirds: Sequence[tuple[int, int]] = THIRDS,
) -> str:
  """Returns captions of parts of the clip, with mistakes like those of a model.

  Args:
    scene: Content of the clip.
    rng: Random generator.
    thirds: (first frame, end) of each part.
  """
  captions = (
    scene_texts.corrupt(
      scene, rng, errors=int(rng.choice(3, p=[0.5, 0.35, 0.15])), start=a, stop=b
    )
    for a, b in thirds
  )
  return " ".join(captions)


def _judge(scene: Scene, rng: np.random.Generator) -> Task:
  question, a, a_wrong, b, b_wrong = make_candidates(scene, rng)
  context = rng.random()
  captions = ""
  if context < 0.55:
    captions = make_narrative(scene, rng)
  elif context < 0.65:
    captions = make_narrative(scene, rng, thirds=[THIRDS[rng.integers(3)]])
  ask = prompts.format_judge_prompt(
    prompts.BRIEF_PROMPTS, question=question, a=a, b=b, narrative=captions
  )
  if a_wrong == b_wrong:
    return Task("judge", ((ask, prompts.EQUAL_VERDICT),))
  better = "A" if a_wrong < b_wrong else "B"
  return Task("judge", ((ask, prompts.BETTER_VERDICT.format(better, "more accurate")),))


def _check(scene: Scene, rng: np.random.Generator) -> Task:
  question, a, wrong, *_ = make_candidates(scene, rng)
  verdict = "No." if wrong else "Yes."
  return Task("check", ((question, a), (prompts.BRIEF_PROMPTS.check, verdict)))


def pack(
  tokenizer: tokenization.PreTrainedTokenizerBase,
  template: tokenization.Template,
  rows: Sequence[Sequence[Task]],
  *,
  length: int,
  videos: Sequence[VideoTokens],
  clips: Sequence[Task] = (),
  clip_videos: Sequence[VideoTokens] = (),
) -> PackedRows:
  """Packs conversations into rows; those that do not fit are dropped.

  Args:
    tokenizer: Tokenizer of the model.
    template: Conversation template of the model.
    rows: Conversations about the video of each row, at least one per row.
    length: Tokens per row.
    videos: Tokens of the video of each row.
    clips: A conversation per row about a part of its video; empty: none.
    clip_videos: Tokens of the parts.
  """
  shape = (len(rows), length)
  tokens = np.zeros(shape, np.int32)
  positions = np.zeros((*shape, videos[0].axes), np.int32)
  segments, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
  for i, tasks in enumerate(rows):
    rest = [_encode(tokenizer, template, task, videos[i]) for task in tasks]
    ids, _, at = rest[0]
    # The ids up to the last video token, which are the same in all conversations.
    head = max(j for j, t in enumerate(ids) if t == tokenization.VIDEO_TOKEN) + 1
    # Each part is (ids, weights, positions, segment).
    parts = [(ids[:head], np.zeros(head), at[:head], 0)]
    if clips:
      clip = _encode(tokenizer, template, clips[i], clip_videos[i])
      parts.append((*clip, CLIP_SEGMENT))
    for k, columns in enumerate(rest, start=CLIP_SEGMENT + 1):
      parts.append((*(column[head:] for column in columns), k))
    start = 0
    for ids, weight, at, segment in parts:
      if start + len(ids) > length:
        continue
      here = slice(start, start + len(ids))
      tokens[i, here], weights[i, here], segments[i, here] = ids, weight, segment
      positions[i, here] = at
      start += len(ids)
  return PackedRows(tokens, segments, positions, weights)


def _encode(tokenizer, template, task: Task, video: VideoTokens):
  """Returns the ids, weights and positions of a conversation."""
  row = tokenization.encode_conversation(tokenizer, template, task.turns, video=video)
  learn = np.array(row.learn)
  if len(task.turns) > 1:  # The first answer may be wrong, so it is no target.
    ends = np.flatnonzero(learn & (np.array(row.ids) == tokenizer.eos_token_id))
    learn[: ends[0] + 1] = False
  weight = learn * WEIGHTS[task.name] / np.sqrt(max(learn.sum(), 1))
  return row.ids, weight.astype(np.float32), row.positions
