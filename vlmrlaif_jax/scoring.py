"""Texts before the reward model: as rows of a batch, and their scores."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlmrlaif_jax import answer, build, sharding
from vlmrlaif_jax.data import pipeline, records, text
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.types import Batch, Pairs, Params


def score_texts(
  run: build.Run,
  variables: Params,
  examples: Sequence[Any],
  texts: Sequence[str],
  batch_size: int = 64,
) -> np.ndarray:
  """The reward model's score of each text as the answer to each example."""
  suffix = tuple(text.suffix_ids(run.tokenizer, run.prompts.reward))
  batch_size = text.bucket(batch_size, multiple=build.row_shards(run.mesh))
  scores = []
  for block in answer.blocks(len(texts), batch_size):
    rows = answer.filled(block, batch_size)
    batch = scored_batch(run, [examples[i] for i in rows], [texts[i] for i in rows])
    out = _scores(run.scorer, variables, sharding.put(batch, run.mesh), suffix)
    scores.append(np.asarray(out)[: len(block)])
  return np.concatenate(scores)


def pair_accuracy(
  run: build.Run, variables: Params, pairs: Sequence[records.PreferenceExample]
) -> float:
  """How often the reward model scores the chosen answer higher."""
  flat = [(pair, out) for pair in pairs for out in records.chosen_and_rejected(pair)]
  examples, texts = zip(*flat, strict=True)
  scores = score_texts(run, variables, examples, texts)
  return float(np.mean(scores[0::2] > scores[1::2]))


_scores = jax.jit(rewards.scalar_scores, static_argnums=(0, 3))


def scorable(run, pairs) -> tuple[list[Any], list[records.Problem]]:
  """(pairs whose answers can be scored, problems of the others)."""
  longest, kept, problems = run.config.data.prompt_len, [], []
  for pair in pairs:
    row = _scored_row(run, pair, pair["output_1"])
    if not run.features.has(pair["video"]):
      problems.append(
        records.Problem(
          pair["id"], "its video cannot be read, or is of no record of the data section"
        )
      )
    elif not text.fits(row, prompt_len=longest, response_len=len(row.ids)):
      problems.append(
        records.Problem(
          pair["id"], f"its prompt is longer than data.prompt_len={longest} tokens"
        )
      )
    else:
      kept.append(pair)
  return kept, problems


def _scored_row(run, example, answered: str) -> text.Encoded:
  """A text as the answer to an example's question, cut where sampling would stop."""
  turns = [*example.get("history", []), (example["question"], answered)]
  row = text.encode(
    run.tokenizer,
    run.template,
    turns,
    video_tokens=build.video_tokens(run, run.config.model.frames),
  )
  return _only_last_answer(row, run.config.data.response_len)


def scored_batch(run, examples, texts) -> Batch:
  """Rows as PPO's rollouts lay them out: prompt, answer and its end."""
  video = build.stack_features(run.features, [e["video"] for e in examples])
  return Batch(video, *scored_rows(run, examples, texts))


def scored_rows(run, examples, texts, suffix: Sequence[int] = ()) -> text.Rows:
  """The same without the videos; suffix: ids that go right after each answer."""
  encoded = [_scored_row(run, e, t) for e, t in zip(examples, texts, strict=True)]
  more = [*suffix]
  return text.pad_rows(
    [text.Encoded(r.ids + more, r.learn + [False] * len(more)) for r in encoded],
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len + len(more),
    pad=run.tokenizer.pad_token_id,
  )


def _only_last_answer(row: text.Encoded, longest: int) -> text.Encoded:
  """Earlier turns made part of the prompt, and an answer cut as sampling would."""
  starts = [i for i, on in enumerate(row.learn) if on and not row.learn[i - 1]]
  learn = [on and i >= starts[-1] for i, on in enumerate(row.learn)]
  stop = starts[-1] + longest
  return text.Encoded(row.ids[:stop], learn[:stop])


def pairs_of_step(run, pairs, size, step) -> Pairs:
  """The pairs of a step, each answer with the reward prompt after it."""
  rows = pipeline.rows_of_step(len(pairs), size, seed=run.config.seed, step=step)
  suffix = tuple(text.suffix_ids(run.tokenizer, run.prompts.reward))
  both = [rewards.with_suffix(batch, suffix) for batch in pairs_batch(run, pairs, rows)]
  return sharding.put(Pairs(*both), run.mesh)


def pair_rows(
  run, pairs, numbers, suffix: Sequence[int] = ()
) -> tuple[text.Rows, text.Rows]:
  """The chosen and the rejected answers of the pairs of these numbers."""
  given = [pairs[i] for i in numbers]
  chosen, rejected = zip(*(records.chosen_and_rejected(p) for p in given), strict=True)
  rows_of = lambda side: scored_rows(run, given, side, suffix)
  return rows_of(chosen), rows_of(rejected)


def pairs_batch(run, pairs, rows) -> Pairs:
  """The pairs of these numbers, on the host."""
  given = [pairs[i] for i in rows]
  sides = zip(*(records.chosen_and_rejected(p) for p in given), strict=True)
  return Pairs(*(scored_batch(run, given, side) for side in sides))
