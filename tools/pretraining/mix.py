"""What a base model is pretrained on: many small tasks about one video, packed.

A row holds one video, shown once, and many conversations about it. Each
conversation sees the video and itself, not its neighbours, and its positions go on
from the video's: to the model it looks like a row of its own. One more conversation
is about a third of the clip, with video features of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tools.pretraining import sayings
from vlmrlaif_jax.data import prompts, tokenization
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.data.world.scene import CLIP_FRAMES, SCENE_FRAMES, Scene

THIRDS = tuple(
  (start, start + CLIP_FRAMES) for start in range(0, SCENE_FRAMES, CLIP_FRAMES)
)
WEIGHTS = {
  "image": 1.0,
  "caption": 2.0,  # One a row; the narrative is made of them.
  "describe": 1.0,
  "happens": 0.7,
  "answer": 1.0,
  "check": 1.5,
  "judge": 2.5,
}
CLIP_SEGMENT = 1  # The conversation about a third of the clip; it sees only itself.


class Task(NamedTuple):
  """One conversation; only its last answer is learned."""

  name: str  # Of WEIGHTS.
  turns: tuple[tuple[str, str], ...]


class Packed(NamedTuple):
  """Rows of packed conversations."""

  tokens: Int[np.ndarray, "batch time"]
  segments: Int[np.ndarray, "batch time"]  # 0: the video, -1: padding.
  positions: Int[np.ndarray, "batch time"]
  weights: Float[np.ndarray, "batch time"]  # Of the loss on each token.


def tasks(scene: Scene, rng: np.random.Generator, *, judging: bool) -> list[Task]:
  """Conversations about a whole clip, in random order.

  Args:
    scene: what the clip shows.
    rng: draws the conversations.
    judging: whether there are some that judge answers, which come to be learned only
      once the clip is seen well.
  """
  made = []
  if rng.random() < 0.6:
    made.append(Task("describe", ((sayings.DESCRIBE, language.describe_scene(scene)),)))
  if rng.random() < 0.6:
    said = language.make_careless_description(scene, rng, omission=0.0)
    made.append(Task("happens", ((language.DESCRIBE_EVENTS, said),)))
  for question in language.make_questions(scene, rng).values():
    if rng.random() < 0.75:
      said = language.make_careless_answer(question, rng, denial=0.0)
      made.append(Task("answer", ((question.question, said),)))
  if not made:  # One scene in some 25,000: a row needs a conversation.
    made.append(Task("describe", ((sayings.DESCRIBE, language.describe_scene(scene)),)))
  if judging:
    made += [_check(scene, rng) for _ in range(4)]
  order = rng.permutation(len(made))
  # The longest come first: what does not fit in a row is left out.
  judged = [_judge(scene, rng) for _ in range(2)] if judging else []
  return judged + [made[i] for i in order]


def image_tasks(scene: Scene, frame: int, rng: np.random.Generator) -> list[Task]:
  """Conversations about one frame."""
  told = sayings.describe_image(scene, frame)
  asked = sayings.image_questions(scene, frame, rng)
  return [
    Task("image", ((sayings.IMAGE, told),)),
    *(Task("answer", (asked[i],)) for i in rng.permutation(len(asked))),
  ]


def clip_task(scene: Scene, third: int) -> Task:
  """The caption of a third of the clip."""
  said = language.describe_scene(scene, *THIRDS[third])
  return Task("caption", ((prompts.BRIEF_PROMPTS.caption, said),))


def candidates(
  scene: Scene, rng: np.random.Generator
) -> tuple[str, str, int, str, int]:
  """(question, an answer, its mistakes, another answer, its mistakes)."""
  if rng.random() < 0.4:
    ask = language.DESCRIBE_EVENTS if rng.random() < 0.8 else sayings.DESCRIBE
    a, b = (
      language.describe_scene(scene)
      if n == 0
      else language.make_careless_description(scene, rng, rate=1.0, omission=0.0)
      if rng.random() < 0.4
      else sayings.corrupt(scene, rng, errors=int(n))
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
  made = language.make_questions(scene, rng)
  kinds = [*made, "false_premise"]  # Twice as often as any other.
  question = made[str(rng.choice(kinds))]
  wrongs = [str(w) for w in rng.permutation(question.wrong)]
  if question.kind in ("attribute", "motion") and rng.random() < 0.4:
    # Or else most denials would be right, and every denial would come to seem so.
    wrongs.sort(key=lambda said: said != question.wrong[-1])
  answers = [question.answer, *wrongs]
  right_and_wrong = rng.random() < 0.9 or len(answers) < 3
  a, b = rng.permutation(answers[:2] if right_and_wrong else answers[1:3])
  wrong = lambda said: int(said != question.answer)
  return question.question, str(a), wrong(a), str(b), wrong(b)


def narrative(
  scene: Scene,
  rng: np.random.Generator,
  *,
  thirds: Sequence[tuple[int, int]] = THIRDS,
) -> str:
  """Captions of parts of the clip, some with mistakes, as a model would give them."""
  captions = (
    sayings.corrupt(
      scene, rng, errors=int(rng.choice(3, p=[0.5, 0.35, 0.15])), start=a, stop=b
    )
    for a, b in thirds
  )
  return " ".join(captions)


def _judge(scene: Scene, rng: np.random.Generator) -> Task:
  question, a, a_wrong, b, b_wrong = candidates(scene, rng)
  context = rng.random()
  told = ""
  if context < 0.55:
    told = narrative(scene, rng)
  elif context < 0.65:
    told = narrative(scene, rng, thirds=[THIRDS[rng.integers(3)]])
  ask = prompts.format_judge_prompt(
    prompts.BRIEF_PROMPTS, question=question, a=a, b=b, narrative=told
  )
  if a_wrong == b_wrong:
    return Task("judge", ((ask, prompts.EQUAL_VERDICT),))
  better = "A" if a_wrong < b_wrong else "B"
  return Task("judge", ((ask, prompts.BETTER_VERDICT.format(better, "more accurate")),))


def _check(scene: Scene, rng: np.random.Generator) -> Task:
  question, a, wrong, *_ = candidates(scene, rng)
  verdict = "No." if wrong else "Yes."
  return Task("check", ((question, a), (prompts.BRIEF_PROMPTS.check, verdict)))


def pack(
  tokenizer: tokenization.PreTrainedTokenizerBase,
  rows: Sequence[Sequence[Task]],
  *,
  length: int,
  video_tokens: int,
  clips: Sequence[Task] = (),
  clip_tokens: int = 0,
) -> Packed:
  """Rows of `length` tokens, each filled with as many conversations as fit.

  Args:
    tokenizer: of the model.
    rows: conversations about each row's video; at least one.
    length: tokens of a row.
    video_tokens: features of a video.
    clips: a conversation of each row about a part of its video; none if empty.
    clip_tokens: features of such a part.
  """
  shape = (len(rows), length)
  tokens, positions = np.zeros((2, *shape), np.int32)
  segments, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
  for i, told in enumerate(rows):
    rest = [_encode(tokenizer, task, video_tokens) for task in told]
    head = len(rest[0][0]) - len(rest[0][2])  # Ids up to the last video token.
    # (ids, weights, segment, position of the first)
    parts = [(rest[0][0][:head], np.zeros(head), 0, 0)]
    if clips:
      ids, weight, _ = _encode(tokenizer, clips[i], clip_tokens)
      parts.append((ids, weight, CLIP_SEGMENT, 0))
    for k, (_, weight, body) in enumerate(rest, start=CLIP_SEGMENT + 1):
      parts.append((body, weight[head:], k, head))
    at = 0
    for ids, weight, segment, first in parts:
      if at + len(ids) > length:
        continue
      here = slice(at, at + len(ids))
      tokens[i, here], weights[i, here], segments[i, here] = ids, weight, segment
      positions[i, here] = first + np.arange(len(ids))
      at += len(ids)
  return Packed(tokens, segments, positions, weights)


def _encode(tokenizer, task: Task, video_tokens: int):
  """(all ids, weights, ids after the video) of a conversation."""
  template = tokenization.CONVERSATION_TEMPLATES["brief"]
  row = tokenization.encode_conversation(
    tokenizer, template, task.turns, video_tokens=video_tokens
  )
  learn = np.array(row.learn)
  if len(task.turns) > 1:  # The earlier answer may be wrong: it is not learned.
    ends = np.flatnonzero(learn & (np.array(row.ids) == tokenizer.eos_token_id))
    learn[: ends[0] + 1] = False
  weight = learn * WEIGHTS[task.name] / np.sqrt(max(learn.sum(), 1))
  last = max(j for j, t in enumerate(row.ids) if t == tokenization.VIDEO_TOKEN)
  return row.ids, weight.astype(np.float32), row.ids[last + 1 :]
