"""The stage `claims`: preferences by divide and conquer (RLAIF-V, 2405.17220, 2.2).

A policy answers each prompt several times under other seeds; each answer is divided
into claims, and a labeler that sees the video says of each whether it holds. An answer
of which fewer claims are denied is preferred. What it writes:
  answers.jsonl       every prompt's answers, their claims and verdicts; a killed run
                      goes on from it, and it is made anew if a model has changed
  preferences.jsonl   the pairs
  rates.json          what became of all answers and pairs
"""

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.errors import (
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world.statements import split_statements
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import claims, endpoint
from vlmrlaif_jax.runtime import (
  answering,
  resume_policy,
  role_params,
  video,
  workloads,
)
from vlmrlaif_jax.runtime.answering import SamplingSettings
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.labeling import claim_probabilities, pairwise
from vlmrlaif_jax.stages.stage import Stage

# How answers are divided: by the embedded world's rules; not at all, an answer being
# one claim, for comparison; by the SFT policy; by an OpenAI-compatible server.
SPLITTERS = ("rules", "whole", "self", "endpoint")
# Who says whether a claim holds: the model before SFT, the SFT policy, or a server.
LABELERS = ("base", "sft", "endpoint")
# (questions, the answers to each) -> what becomes of each answer.
ClaimLabeler: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str]]], list[list[claims.CheckedAnswer]]
]


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # Of each round; 0: all. Each round has others, as far as they go.
      prompts=placeholder(int),
      holdout=0.1,  # Of the prompts' videos, to choose checkpoints on; see dpo.select.
      samples=10,  # Answers to each prompt.
      temperature=0.7,  # Of the answers.
      top_p=1.0,
      splitter=placeholder(str),  # One of SPLITTERS.
      labeler="base",  # One of LABELERS.
      pairs=2,  # Of each prompt, at most.
      gap=1,  # Least difference of the scores of a pair.
      balance=True,  # Leave out pairs, so that chosen and rejected are equally long.
      # Tokens of a row: the video once, and questions about it.
      check_len=placeholder(int),
      check_rows=placeholder(int),  # At once.
      split_prompt_len=placeholder(int),  # Of "self": tokens of what it is asked.
      split_max_new=placeholder(int),
      batch=64,  # Prompts at once.
      block=64,  # Prompts; what a killed run loses at most.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `claims`."""
  given = config.claims
  with user_errors("claims"):
    check_choices(given, {"splitter": SPLITTERS, "labeler": LABELERS})
    check_at_least(given, {"samples": 2, "prompts": 0, "temperature": 0, "pairs": 1})
    # `batch` here too: dpo.select reads it where no stage `claims` runs.
    check_at_least(given, {"batch": 1, "check_rows": 1, "gap": 0})
    if not 0 < given.holdout < 1:
      raise ValueError(f"holdout must be between 0 and 1, not {given.holdout}")
    if "endpoint" in (given.splitter, given.labeler):
      with subsection("endpoint"):
        endpoint.check(given.endpoint)


def count_blocks(run: Run) -> int:
  """Blocks."""
  return math.ceil(len(select_round_prompts(run, 1)) / run.config.claims.block)


def select_round_prompts(run: Run, number: int) -> list[Example]:
  """The prompts of a round, counted from 1; none is held out."""
  config = run.config.claims
  learned, _ = pipeline.split_held_out(
    run.splits.prompts, config.holdout, run.config.seed
  )
  count = min(config.prompts or len(learned), len(learned))
  order = pipeline.shuffled_row_indices(
    len(learned), count, seed=run.config.seed, step=number - 1
  )
  return [learned[i] for i in dict.fromkeys(order.tolist())]


def select_held_out_prompts(run: Run) -> list[Example]:
  """The prompts that no round answers."""
  config = run.config.claims
  return pipeline.split_held_out(run.splits.prompts, config.holdout, run.config.seed)[1]


def label_claims(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Labels a round's prompts with the policy of the round before.

  Returns:
    What rates.json holds; see `rates`.
  """
  config = run.config.claims
  examples = select_round_prompts(run, role_params.get_round(stage))
  _, frozen = role_params.make_policy_roles(run, role_params.get_start_stage(stage))
  labeler, variables = make_labeler(run, folder.parent)
  log.print_note(
    f"{stage}: {config.samples} answers to each of {len(examples)} prompts"
  )
  sampling = answering.read_sampling_settings(run.config, "claims", config.samples)
  policy = answering.Answerer(run, frozen["ref"], sampling)

  make = lambda block: make_claim_rows(policy, [examples[i] for i in block], labeler)
  asked = [(e["id"], e["question"], run.features.digest(e["video"]))
           for e in examples]  # fmt: skip
  rows = resumable.load_or_compute(
    folder / "answers.jsonl",
    run.watch.wrap_blocks(make),
    count=len(examples),
    batch=config.block,
    fingerprint=resumable.compute_fingerprint(
      {"policy": frozen["ref"], "labeler": variables},
      sampling.cache_key(),
      resume_policy.select_fixed_settings(config, "claims"),
      run.config.seed,
      asked,
    ),
    on_progress=lambda done: log.log_progress(
      min(math.ceil(done / config.block), count_blocks(run)), {}
    ),
  )
  return write_claim_pairs(run, stage, examples, rows, folder, log)


def make_labeler(run: Run, folder: pathlib.Path) -> tuple[ClaimLabeler, Params]:
  """Returns the labeler that the config selects, and its variables, {} for a server.

  Args:
    run: the run.
    folder: where what a server says is kept.
  """
  config = run.config.claims
  variables: Params = {}
  server = functools.cache(
    lambda: endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl").ask
  )
  if config.labeler == "endpoint":
    yes_no = claims.parse_yes_no_probs(server())
  else:
    variables = run.base
    if config.labeler == "sft":
      variables = role_params.load_judge(run, "sft")
    yes_no = lambda queries: claim_probabilities.compute_yes_no_probs(
      run, variables, queries, length=config.check_len, rows=config.check_rows
    )
  divide = _divider(run, server)
  label = functools.partial(claims.check_claims, divide=divide, yes_no=yes_no)
  return label, variables


def _divider(run: Run, server: Callable[[], claims.AskFn]) -> claims.DivideFn:
  config, prompts = (
    run.config.claims,
    claims.CLAIM_PROMPT_STYLES[run.config.model.prompts],
  )
  if config.splitter == "endpoint":
    return claims.ask_for_claims(server(), prompts)
  if config.splitter == "self":  # The SFT policy, at temperature 0.
    sampling = SamplingSettings(
      config.split_prompt_len, config.split_max_new, config.batch
    )
    variables = role_params.load_judge(run, "sft")
    ask = answering.Answerer(run, variables, sampling).ask_judge
    return claims.ask_for_claims(ask, prompts)
  whole = lambda question, said: [(question, said)] if said else []
  rule = split_statements if config.splitter == "rules" else whole
  return claims.split_by_rules(rule, run.prompts.check)


# Answers and pairs.


def make_claim_rows(
  policy: answering.Answerer, examples: Sequence[Example], labeler: ClaimLabeler
) -> list[JsonRow]:
  """A row for each prompt: a policy's answers, and what became of them."""
  replies = policy.generate_replies(answering.make_queries(examples))
  answers = [[reply.text for reply in said] for said in replies]
  return [
    {
      "id": example["id"],
      "video": video.get_report_path(policy.run, example),
      "question": example["question"],
      "answers": texts,
      "stopped": [reply.stopped for reply in said],
      "outcomes": [each.outcome for each in checked],
      "scores": [each.score for each in checked],
      "claims": [list(each.claims) for each in checked],
      "chances": [list(each.chances) for each in checked],
      "mistakes": [truth.count_answer_mistakes(example, reply.text) for reply in said],
      "unsupported": [truth.count_unsupported(example, reply.text) for reply in said],
    }
    for example, texts, said, checked in zip(
      examples, answers, replies, labeler(examples, answers), strict=True
    )
  ]


def write_claim_pairs(
  run: Run,
  stage: str,
  examples: Sequence[Example],
  rows: Sequence[JsonRow],
  folder: pathlib.Path,
  log: StageLog,
) -> dict[str, Any]:
  """Chooses the pairs, writes them and their rates, and returns those."""
  config = run.config.claims
  choose = functools.partial(
    claims.choose_pairs, seed=run.config.seed, limit=config.pairs, gap=config.gap
  )
  drawn = []
  for example, row in zip(examples, rows, strict=True):
    scored = zip(row["scores"], row["stopped"], strict=True)
    scores = [score if stopped else None for score, stopped in scored]  # None was cut.
    chosen = choose(example["id"], row["answers"], scores)
    drawn += [(example, row, pair) for pair in chosen]
  kept, rho = list(range(len(drawn))), None
  if config.balance:
    texts = [tuple(row["answers"][i] for i in pair) for _, row, pair in drawn]
    kept, rho = claims.balance_lengths(texts)
  videos = run.workdir / "world" / "videos"
  pairs = [make_claim_preference(*drawn[i], videos) for i in kept]
  summary = compute_claim_rates(rows, [drawn[i][1:] for i in kept])
  summary |= {"pairs_drawn": len(drawn), "rho": rho}
  pairwise.write_preferences(folder, pairs, summary)
  say = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
  told = [{"what": name, "value": say(value)} for name, value in summary.items()]
  log.print_table(f"{stage}: claims", told)
  return summary


def make_claim_preference(
  example: Example, row: JsonRow, pair: tuple[int, int], videos: pathlib.Path
) -> JsonRow:
  """A pair as records.read_preferences takes it, with each claim's verdict."""
  chosen, rejected = pair
  of = lambda name: [row[name][i] for i in pair]
  told = "\n".join(
    f"Output {place}: {_verdicts(row, i)}" for place, i in enumerate(pair, start=1)
  )
  return pairwise.make_preference(
    example,
    {
      "id": f"{row['id']}:{chosen}-{rejected}",
      "preference": 1,
      "outputs": of("answers"),
      "stopped": of("stopped"),
      "mistakes": of("mistakes"),
      "narrative": "",
    },
    videos,
    told=told,
  )


def _verdicts(row: JsonRow, number: int) -> str:
  """Each claim of an answer, accepted (+) or rejected (-)."""
  verdicts = zip(row["claims"][number], row["chances"][number], strict=True)
  return " ".join(
    f"[{'+' if yes > no else '-'}] {said}" for said, (yes, no) in verdicts
  )


def compute_claim_rates(
  rows: Sequence[JsonRow], pairs: Sequence[tuple[JsonRow, tuple[int, int]]]
) -> dict[str, Any]:
  """What became of answers, claims and pairs, and how often the pairs are right.

  "truth_agreement" is a share of "truth_pairs": those whose answers differ in
  mistakes. "supported_agreement" likewise, of statements that nothing bears out alone.
  """
  outcomes = collections.Counter(o for row in rows for o in row["outcomes"])
  chances = [pair for row in rows for each in row["chances"] for pair in each]
  asked = [pair for pair in chances if pair is not None]
  length = lambda side: [len(row["answers"][p[side]].split()) for row, p in pairs]
  agreed = {
    name: [row[name][p[0]] < row[name][p[1]] for row, p in pairs
           if row[name][p[0]] is not None and row[name][p[0]] != row[name][p[1]]]
    for name in ("mistakes", "unsupported")
  }  # fmt: skip
  return {
    "prompts": len(rows),
    **{f"answers_{name}": outcomes[name] for name in claims.CLAIM_OUTCOMES},
    "claims": len(asked),
    "claims_denied": pairwise.mean_or_none([not yes > no for yes, no in asked]),
    "pairs": len(pairs),
    "chosen_words": pairwise.mean_or_none(length(0)),
    "rejected_words": pairwise.mean_or_none(length(1)),
    "truth_agreement": pairwise.mean_or_none(agreed["mistakes"]),
    "truth_pairs": len(agreed["mistakes"]),
    "supported_agreement": pairwise.mean_or_none(agreed["unsupported"]),
    "supported_pairs": len(agreed["unsupported"]),
  }


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  config, data = run.config.claims, run.config.data
  _, frozen = role_params.make_policy_roles(run, role_params.get_start_stage(stage))
  sampling = answering.read_sampling_settings(run.config, "claims", config.samples)
  each = [
    workloads.make_encode_function(run, config.batch),
    workloads.make_answer_function(run, frozen["ref"], "answers", sampling, runs=1.0),
  ]
  if config.splitter == "self":
    split = SamplingSettings(
      config.split_prompt_len, config.split_max_new, config.batch
    )
    runs = float(config.samples)
    each.append(
      workloads.make_answer_function(run, frozen["ref"], "split", split, runs=runs)
    )
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  return Workload(each, 0, config.batch, tokens)


STAGES = (
  Stage(
    name="claims",
    title="Claims of the policy's answers, one by one",
    section="claims",
    run=label_claims,
    total_steps=count_blocks,
    check=check,
    workload=workload,
    in_rounds=True,
    paper="2405.17220",
  ),
)
