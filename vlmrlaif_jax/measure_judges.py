"""PROGRAM: judges held against truth, and against labels that they were not taught.

The reward model, the policy that judges untaught, and the generative reward models are
shown the same pairs: those of the labels that were held out, and two answers of the
policy to held-out questions, of which truth tells the better one.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build, hosts, judges, roles, scoring
from vlmrlaif_jax.data import features, records
from vlmrlaif_jax.data.prompts import judge_prompt
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.evals import common, preference
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.judges import Judge, Pairs, Row
from vlmrlaif_jax.log import Log, replace_text
from vlmrlaif_jax.report_results import say
from vlmrlaif_jax.types import Params


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      samples=4,  # Answers to each question; the first two that differ are compared.
      temperature=1.0,  # Of the answers.
      top_p=1.0,
      prompt_len=160,  # Tokens of what a generative judge is asked, video included.
      max_new=16,  # Tokens of what it says.
      batch=64,  # Questions at once.
      resamples=2000,  # Of the bootstrap.
    )
  )


def total_steps(run: build.Run) -> int:
  """Questions that the policy answers twice or more, for judges to choose."""
  return len(run.splits.benchmark) + len(run.splits.shifted)


def run_stage(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> Row:
  """Holds each judge against truth, and against labels that it was not taught.

  Writes results.json, and pairs.jsonl with what each judge said of each pair.
  """
  policy = roles.judge_variables(run, "sft")
  _, labelled = judges.preferences(run, log, least=1)
  sets = {
    "labels": labelled,
    "truth": pairs_of(run, policy, run.splits.benchmark, folder, log),
    "shifted": pairs_of(run, policy, run.splits.shifted, folder, log),
  }
  pairs = [(name, pair) for name, each in sets.items() for pair in each]
  said: dict[str, list[Row]] = {}
  for name, (judge, variables) in there_are(run, policy).items():
    log.note(f"judges: {len(pairs)} pairs to {name}")
    said[name] = kept_verdicts(
      run, judge, [p for _, p in pairs], variables, folder / f"said_{name}.jsonl"
    )
  results = {}
  for name in filter(sets.get, sets):
    here = [i for i, (of, _) in enumerate(pairs) if of == name]
    chosen = {judge: [rows[i]["choice"] for i in here] for judge, rows in said.items()}
    results[name] = measured(run, sets[name], chosen)
  rows = [pair_row(name, pair, said, i) for i, (name, pair) in enumerate(pairs)]
  hosts.once(lambda: records.write_records(folder / "pairs.jsonl", rows))
  text = json.dumps(results, indent=2)
  hosts.once(lambda: replace_text(folder / "results.json", text))
  log.table("Judges: per cent of pairs [95 % interval]", table(results))
  return {
    f"{name}_{judge}": stats["accuracy"]["mean"]
    for name, found in results.items()
    for judge, stats in found["judges"].items()
  }


def there_are(run: build.Run, policy: Params) -> dict[str, tuple[Judge, Params]]:
  """Each judge that there is, with its variables; all see a pair in one order.

  Args:
    policy: variables of the SFT policy, which judges untaught.
  """
  config = run.config.judges
  lengths = answer.Sampling(config.prompt_len, config.max_new, config.batch)
  found = {"untrained": (by_words(run, policy), policy)}
  if roles.has_reward_model(run):
    reward = roles.reward_variables(run)
    found["reward_model"] = (by_reward(run, reward), reward)
  for name, variables in roles.judges(run).items():
    if name != "sft":
      found[name] = (judges.by_box(run, variables, lengths), variables)
  return found


def by_words(run: build.Run, variables: Params) -> Judge:
  """A policy asked as it was for the labels, but told nothing of the video."""
  config = run.config.label
  lengths = answer.Sampling(
    config.judge_prompt_len, config.judge_max_new, run.config.judges.batch
  )
  prompt = functools.partial(judge_prompt, run.prompts)
  return judges.by_asking(run, variables, lengths, prompt, preference.choice_of_verdict)


def by_reward(run: build.Run, variables: Params) -> Judge:
  """A reward model, which scores each answer alone."""

  def judge(pairs):
    sides = [
      scoring.score_texts(run, variables, pairs, [pair[side] for pair in pairs])
      for side in ("output_1", "output_2")
    ]
    return [
      {"text": f"{a:.4f}, {b:.4f}", "choice": preference.choice_of_scores((a, b))}
      for a, b in zip(*(side.tolist() for side in sides), strict=True)
    ]

  return judge


def pairs_of(
  run: build.Run,
  variables: Params,
  examples: Sequence[Example],
  folder: pathlib.Path,
  log: Log,
) -> Pairs:
  """Two answers of a policy to each question, where truth tells which is better."""
  config = run.config.judges
  known = [e for e in examples if "scene" in e.get("truth", {})]
  if not known:
    return []
  sampling = answer.sampling_of(run.config, "judges", config.samples)

  def make(block: range) -> list[Row]:
    part = [known[i] for i in block]
    asked = [
      answer.Request(f"answer:{e['id']}", e["video"], e["question"]) for e in part
    ]
    replies = answer.answer(run, variables, asked, sampling, seed=run.config.seed)
    return [
      {"id": e["id"], "texts": [reply.text for reply in each if reply.stopped]}
      for e, each in zip(part, replies, strict=True)
    ]

  rows = common.kept_rows(
    folder / f"answers_{known[0]['source']}.jsonl",
    run.watch.blocks(make),
    count=len(known),
    batch=answer.BATCHES * config.batch,
    fingerprint=common.fingerprint(
      variables, sampling, run.config.seed, run.template, [e["id"] for e in known]
    ),
    tell=lambda done: log.progress(done, {}, note=f"of {known[0]['source']}"),
  )
  pairs = []
  for example, row in zip(known, rows, strict=True):
    texts = [text for text in row["texts"] if text]
    wrong = [truth.mistakes(example, text) for text in texts]
    pairs.append(preference.pair_of(example, texts, wrong))
  return [pair for pair in pairs if pair is not None]


def kept_verdicts(
  run: build.Run,
  judge: Judge,
  pairs: Pairs,
  variables: Params,
  path: pathlib.Path,
) -> list[Row]:
  """What the judge says of each pair; what is in the file is taken from there."""
  config = run.config.judges
  facts = [(p["id"], p["question"], p["output_1"], p["output_2"]) for p in pairs]
  lengths = (config.prompt_len, config.max_new, run.config.model.prompts)
  return common.kept_rows(
    path,
    run.watch.blocks(lambda block: judge([pairs[i] for i in block])),
    count=len(pairs),
    batch=answer.BATCHES * config.batch,
    fingerprint=common.fingerprint(variables, facts, lengths, run.config.seed),
  )


def measured(
  run: build.Run, pairs: Pairs, chosen: dict[str, list[preference.Choice]]
) -> Row:
  """A set's results: of each judge, and of the last beside the others."""
  better = [pair["preference"] for pair in pairs]
  videos = [features.name_of(pair["video"]) for pair in pairs]
  how = preference.Bootstrap(videos, run.config.seed, run.config.judges.resamples)
  last = list(chosen)[-1]
  return {
    "pairs": len(pairs),
    "videos": len(set(videos)),
    "judges": {
      name: preference.measure(each, better, how) for name, each in chosen.items()
    },
    "difference": preference.differences(chosen, better, how, of=last),
  }


def pair_row(name: str, pair: PreferenceExample, said, number: int) -> Row:
  """A line of pairs.jsonl."""
  keys = ("id", "question", "output_1", "output_2", "preference")
  judged = {judge: rows[number] for judge, rows in said.items()}
  return {"set": name, **{key: pair[key] for key in keys}, "judges": judged}


def table(results: Row) -> list[Row]:
  """A row for each set and judge."""
  return [
    {
      "pairs": f"{found['pairs']} {name}",
      "judge": judge,
      **{
        measure: say(stats.get(measure, {}), 100, "")
        for measure in ("accuracy", "tied", "unread", "slot_bias")
      },
    }
    for name, found in results.items()
    for judge, stats in found["judges"].items()
  ]
