"""PROGRAM: each policy answers held-out questions; its answers are held against truth.

The embedded world's truth is exact: a short answer is right or wrong, and of a
description it is known which statements nothing in the video supports, the rate of
hallucination (Rohrbach et al. 2018, 1809.02156) over all that is stated. Of a user's
own videos only a reference answer is known, which an answer meets word by word or not.
The judge that labelled the preferences compares the policies, too: where it sees more
progress than truth does, the policy has learned to please it.
"""

import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32
from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build
from vlmrlaif_jax.data import features, records
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import measures, world
from vlmrlaif_jax.evals.measures import Marked
from vlmrlaif_jax.feedback import judge as judging
from vlmrlaif_jax.log import Log, replace_text
from vlmrlaif_jax.report_results import at, compared, say
from vlmrlaif_jax.types import Params

Row: TypeAlias = dict[str, Any]
# The reward model's score of a text as the answer to each example.
Reward: TypeAlias = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]

SHARES = (
  "accuracy",
  "by_kind",
  "hallucination",
  "recall",
  "stopped",
)  # Shown in per cent.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      batch=64,  # Questions at once.
      temperature=0.0,  # 0: the likeliest answer.
      top_p=1.0,
      resamples=2000,  # Of the bootstrap.
      judge=True,  # Whether the first policy judges, too.
      judge_share=1.0,  # Of the questions whose answers differ, that it is asked about.
    )
  )


def total_steps(run: build.Run) -> int:
  """Questions; each counts once all policies have answered it."""
  return len(run.splits.benchmark)


def run_stage(
  run: build.Run,
  policies: dict[str, Params],
  reward: Reward | None,
  folder: pathlib.Path,
  log: Log,
) -> Row:
  """Writes results.json and answers.jsonl into the folder, and returns a summary.

  Args:
    policies: variables of run.policy by name; "sft" and "ppo" are compared, or else
      the first and the last.
    reward: the reward model's scores; None to leave them out.
    log: of total_steps(run).
  """
  replies = ask_all(run, policies, folder, log)
  rows = [i for i, reply in enumerate(next(iter(replies.values()))) if reply.fits]
  examples = [run.splits.benchmark[i] for i in rows]
  report_left_out(run, len(examples), log)
  marked = {
    name: mark(examples, [said[i] for i in rows], reward)
    for name, said in replies.items()
  }
  how = measures.Bootstrap(
    [features.name_of(e["video"]) for e in examples],
    run.config.seed,
    run.config.evaluate.resamples,
  )
  pair = compared(policies)
  results = measures.measure_all(marked, pair, how)
  if run.config.evaluate.judge and pair[0] != pair[1]:
    log.note(f"eval: {pair[0]} judges its own answers and those of {pair[1]}")
    judgements = judge(run, policies[pair[0]], examples, marked, pair)
    add_judge(results, judgements, examples, marked, pair, how)
  results |= {"pair": pair, "questions": len(examples), "videos": len(set(how.groups))}
  shown = [
    answer_row(run, example, {name: marked[name][i] for name in marked})
    for i, example in enumerate(examples)
  ]
  records.write_records(folder / "answers.jsonl", shown)
  replace_text(folder / "results.json", json.dumps(results, indent=2))
  log.table("Held-out questions: mean [95 % interval]", table(results))
  return summary(results)


# Answers.


def ask_all(
  run: build.Run, policies: dict[str, Params], folder: pathlib.Path, log: Log
) -> dict[str, list[answer.Reply]]:
  """Each policy's reply to each question, all written before any is judged."""
  examples = run.splits.benchmark
  requests = [answer.Request(e["id"], e["video"], e["question"]) for e in examples]
  replies: dict[str, list[answer.Reply]] = {}
  for name, variables in policies.items():
    log.note(f"eval: {len(requests)} questions to {name}")
    before = len(replies) * len(requests)
    tell = lambda done, before=before: log.progress(
      (before + done) // len(policies), {}
    )
    path = folder / f"answers_{name}.jsonl"
    replies[name] = answer_all(run, variables, requests, path, tell)
  return replies


def answer_all(
  run: build.Run,
  variables: Params,
  requests: Sequence[answer.Request],
  path: pathlib.Path,
  tell: Callable[[int], None] = lambda done: None,
) -> list[answer.Reply]:
  """A reply to each request, kept in a file from which a killed run goes on.

  The file's first line names what its answers depend on; where that has changed, they
  are made anew.

  Args:
    tell: is given how many are answered, after each batch.
  """
  config = run.config
  sampling = answer.Sampling(
    prompt_len=config.data.prompt_len,
    max_new=config.data.response_len,
    batch=config.evaluate.batch,
    temperature=config.evaluate.temperature,
    top_p=config.evaluate.top_p,
  )
  head = {"fingerprint": fingerprint(run, variables, requests, sampling)}
  kept = records.read_jsonl(path) if path.exists() else []
  rows = kept[1:] if kept[:1] == [head] else []
  if len(rows) < len(requests):  # Of a batch that was cut short, none is kept.
    rows = rows[: len(rows) // sampling.batch * sampling.batch]
    records.write_records(path, [head, *rows])
  for block in answer.blocks(len(requests), sampling.batch):
    if block.stop <= len(rows):
      continue
    part = [requests[i] for i in block]
    replies = answer.answer(run, variables, part, sampling, seed=config.seed)
    made = [
      {"id": r.id, "question": r.question, **reply._asdict()}
      for r, (reply,) in zip(part, replies, strict=True)
    ]
    records.append_jsonl(path, made)
    rows += made
    tell(len(rows))
  return [answer.Reply(row["text"], row["stopped"], row["fits"]) for row in rows]


def fingerprint(
  run: build.Run,
  variables: Params,
  requests: Sequence[answer.Request],
  sampling: answer.Sampling,
) -> str:
  """A name for all that answers depend on."""
  digest = hashlib.sha256(repr((sampling, run.config.seed, run.template)).encode())
  for request in requests:
    # A file of features is named for the video's content, wherever that lies.
    video = run.features.files[features.name_of(request.video)].name
    digest.update(repr((request.id, request.question, video)).encode())
  leaves, _ = jax.tree.flatten_with_path(variables)
  for path, leaf in leaves:
    name = (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
    digest.update(repr((*name, int(checksum(leaf)))).encode())
  return digest.hexdigest()[:16]


@jax.jit
def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
  """A number that changes with an array's elements, made where the array is.

  A sum of integers has no rounding: it is the same on every mesh.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def report_left_out(run: build.Run, kept: int, log: Log) -> None:
  """Tells how many questions are not measured on, and what to do about it.

  Raises:
    ValueError: none is left.
  """
  asked, longest = len(run.splits.benchmark), run.config.data.prompt_len
  said = (
    f"{asked - kept} of {asked} questions are longer than data.prompt_len={longest}"
  )
  if not kept:
    raise ValueError(f"{said} tokens; raise it")
  if kept < asked:
    log.note(f"eval: {said} tokens and left out; raise it to measure on all")


def mark(
  examples: Sequence[Example], replies: Sequence[answer.Reply], reward: Reward | None
) -> list[Marked]:
  """What is known of a policy's answers."""
  texts = [reply.text for reply in replies]
  scores = [None] * len(texts)
  if reward is not None:
    scores = [float(score) for score in reward(examples, texts)]
  return [
    Marked(reply.text, reply.stopped, world.verdict(example, reply.text), score)
    for example, reply, score in zip(examples, replies, scores, strict=True)
  ]


# The judge.


def judge(
  run: build.Run,
  variables: Params,
  examples: Sequence[Example],
  marked: dict[str, list[Marked]],
  pair: tuple[str, str],
) -> dict[int, judging.Judgement]:
  """What a judge says of the pair's answers that differ, by number of the question.

  Args:
    variables: of the judge, a run.policy.
  """
  first, second = ([m.text for m in marked[name]] for name in pair)
  rows = [i for i in range(len(examples)) if first[i] != second[i]]
  rng = np.random.default_rng([run.config.seed, 11])
  count = round(len(rows) * run.config.evaluate.judge_share)
  rows = sorted(rng.permutation(rows)[:count].tolist())
  pairs = [
    judging.Pair(
      examples[i]["id"],
      examples[i]["video"],
      examples[i]["question"],
      first[i],
      second[i],
    )
    for i in rows
  ]
  sampling = answer.Sampling(
    prompt_len=run.config.label.judge_prompt_len,
    max_new=run.config.label.judge_max_new,
    batch=run.config.evaluate.batch,
  )

  def ask(queries: Sequence[judging.Query]) -> list[str | None]:
    requests = [answer.Request(q.id, q.video, q.prompt) for q in queries]
    replies = answer.answer(run, variables, requests, sampling, seed=run.config.seed)
    return [reply.text if reply.fits else None for (reply,) in replies]

  return dict(zip(rows, judging.judge_pairs(pairs, ask, run.prompts), strict=True))


def add_judge(
  results: Row,
  judgements: dict[int, judging.Judgement],
  examples: Sequence[Example],
  marked: dict[str, list[Marked]],
  pair: tuple[str, str],
  how: measures.Bootstrap,
) -> None:
  """Adds to results what became of the judge's pairs, and how often each policy won."""
  wins, truths = {}, {}
  for i, judgement in judgements.items():
    won = win(judgement.outcome)
    if won is not None:
      wins[i] = won
    wrong = [world.mistakes(examples[i], marked[name][i].text) for name in pair]
    if None not in wrong:
      truths[i] = 0.5 + 0.5 * float(np.sign(wrong[0] - wrong[1]))
  names = [judgement.outcome.name for judgement in judgements.values()]
  results["judge"] = {"asked": len(names), "outcomes": dict(Counter(names))}
  if wins:
    measures.drift(wins, truths, pair, results, how)


def win(outcome: judging.Outcome) -> float | None:
  """1 if the second answer wins, 0 if the first, 1/2 if neither; None if not judged."""
  if outcome.preference is not None:
    return float(outcome.preference - 1)
  return 0.5 if outcome.name in ("tie", "order_inconsistent") else None


# What is told.


def answer_row(run: build.Run, example: Example, marked: dict[str, Marked]) -> Row:
  """A question and each policy's answer, as the report shows them."""
  row = {
    "id": example["id"],
    "video": shown_video(run, example),
    "kind": next(iter(marked.values())).verdict.kind,
    "question": example["question"],
    "truth": example.get("truth", {}).get("answer", example["answer"]),
  }
  for name, (text, stopped, verdict, _) in marked.items():
    row[name] = {"text": text, "stopped": stopped, **verdict._asdict()}
  scores = {name: m.reward for name, m in marked.items() if m.reward is not None}
  return row | ({"reward": scores} if scores else {})


def shown_video(run: build.Run, example: Example) -> str | None:
  """A video as the report finds it, also in a workdir that was moved."""
  if not isinstance(example["video"], str):
    return None  # Single frames: the report shows no strip of them.
  path, folder = pathlib.Path(example["video"]), run.workdir / "world" / "videos"
  return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def table(results: Row) -> list[Row]:
  """A row for each measure: every policy's value, and the difference."""
  policies, change = results["policies"], results["difference"]
  places: dict[str, list[str]] = {}
  for stats in policies.values():
    for name in [*measures.MEASURES, "judge_score"]:
      if name in stats:
        places[name] = [name]
      if name == "accuracy":
        places |= {f"  {kind}": ["by_kind", kind] for kind in stats["by_kind"]}
  rows = []
  for label, place in places.items():
    scale = 100 if place[0] in SHARES else 1
    stats = {name: at(policy, place) for name, policy in policies.items()}
    rows.append(
      {
        "measure": label,
        **{name: say(stat, scale, "") for name, stat in stats.items()},
        "difference": say(at(change, place), scale, "", sign="+"),
        "n": str(max(stat.get("n", 0) for stat in stats.values())),
      }
    )
  return rows


def summary(results: Row) -> Row:
  """The numbers that matter most, flat."""
  flat = {"questions": results["questions"], "videos": results["videos"]}
  for name in ("accuracy", "hallucination", "judge_score"):
    for policy, stats in results["policies"].items():
      if name in stats:
        flat[f"{policy}_{name}"] = stats[name]["mean"]
    if name in results["difference"]:
      flat[f"{name}_difference"] = results["difference"][name]["mean"]
  return flat
