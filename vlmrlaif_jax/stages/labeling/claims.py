"""The stage `claims`: preferences by divide and conquer (RLAIF-V, 2405.17220, 2.2).

A policy answers each prompt several times with different seeds. Each answer is divided
into claims. A labeler with access to the video accepts or denies each claim. The answer
with fewer denied claims is preferred. The stage writes:
  answers.jsonl       answers, claims and verdicts of each prompt; a killed run resumes
                      from it; another model discards it
  preferences.jsonl   the pairs
  rates.json          counts of the outcomes of answers and pairs
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
from vlmrlaif_jax.data.templates import show_media
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
from vlmrlaif_jax.stages.labeling import (
  claim_probabilities,
  pairwise,
  preference_rows,
)
from vlmrlaif_jax.stages.stage import Stage

# Division of answers: "rules" of the embedded world; "whole", one claim per answer, for
# comparison; "self", the SFT policy; "endpoint", an OpenAI-compatible server.
SPLITTERS = ("rules", "whole", "self", "endpoint")
# Labeler of claims: the model before SFT, the SFT policy, or a server.
LABELERS = ("base", "sft", "endpoint")
# Checks answers: (questions, answers to each) -> a result for each answer.
ClaimLabeler: TypeAlias = Callable[
  [Sequence[Example], Sequence[Sequence[str]]], list[list[claims.CheckedAnswer]]
]


def default_config() -> ConfigDict:
  """Returns the settings of the section `claims`."""
  return ConfigDict(
    dict(
      # Prompts per round; 0: all. Rounds have different prompts while these last.
      prompts=placeholder(int),
      holdout=0.1,  # Share of the prompts' videos for selecting checkpoints of DPO.
      samples=10,  # Answers per prompt.
      temperature=0.7,  # Sampling temperature of the answers.
      top_p=1.0,
      splitter=placeholder(str),  # One of SPLITTERS.
      labeler="base",  # One of LABELERS.
      pairs=2,  # Maximum pairs per prompt.
      gap=1,  # Minimum difference of the scores of a pair.
      balance=True,  # Drop pairs until chosen and rejected answers are equally long.
      # Tokens of a row: one video and questions about it.
      check_len=placeholder(int),
      check_rows=placeholder(int),  # Rows per batch.
      split_prompt_len=placeholder(int),  # Tokens of a prompt of the splitter "self".
      split_max_new=placeholder(int),  # Tokens of a reply of the splitter "self".
      batch=64,  # Prompts per batch.
      block=64,  # Prompts per block; a killed run loses one block at most.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `claims`; raises UserError for an invalid value."""
  section = config.claims
  with user_errors("claims"):
    check_choices(section, {"splitter": SPLITTERS, "labeler": LABELERS})
    check_at_least(section, {"samples": 2, "prompts": 0, "temperature": 0, "pairs": 1})
    # Also `batch`: dpo.select reads it in runs without this stage.
    check_at_least(section, {"batch": 1, "check_rows": 1, "gap": 0})
    if not 0 < section.holdout < 1:
      raise ValueError(f"holdout must be between 0 and 1, not {section.holdout}")
    if "endpoint" in (section.splitter, section.labeler):
      with subsection("endpoint"):
        endpoint.check(section.endpoint)


def count_blocks(run: Run) -> int:
  """Returns the number of blocks of a round."""
  return math.ceil(len(select_round_prompts(run, 1)) / run.config.claims.block)


def select_round_prompts(run: Run, number: int) -> list[Example]:
  """Returns the prompts of a round, counted from 1, without the held-out ones."""
  config = run.config.claims
  prompts, _ = pipeline.split_for_training(
    run.splits.labels, config.holdout, run.config.seed, "claims.holdout"
  )
  count = min(config.prompts or len(prompts), len(prompts))
  indices = pipeline.shuffled_row_indices(
    len(prompts), count, seed=run.config.seed, step=number - 1
  )
  return [prompts[i] for i in dict.fromkeys(indices.tolist())]


def select_held_out_prompts(run: Run) -> list[Example]:
  """Returns the held-out prompts, which no round uses."""
  config = run.config.claims
  return pipeline.split_held_out(run.splits.labels, config.holdout, run.config.seed)[1]


def label_claims(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Labels the prompts of a round with the policy of the previous round.

  Returns:
    The content of rates.json; see compute_claim_rates.
  """
  config = run.config.claims
  examples = select_round_prompts(run, role_params.get_round(stage))
  _, frozen = role_params.make_policy_roles(run, role_params.get_start_stage(stage))
  labeler, variables = make_labeler(run, folder.parent)
  log.print_note(
    f"{stage}: samples {config.samples} answers to each of {len(examples)} prompts"
  )
  sampling = answering.read_sampling_settings(run.config, "claims", config.samples)
  policy = answering.Answerer(run, frozen["ref"], sampling)

  make = lambda block: make_claim_rows(policy, [examples[i] for i in block], labeler)
  facts = [(e["id"], e["question"], run.features.digest(e["video"])) for e in examples]
  rows = resumable.load_or_compute(
    folder / "answers.jsonl",
    run.watch.wrap_blocks(make),
    count=len(examples),
    batch=config.block,
    fingerprint=resumable.compute_fingerprint(
      {"policy": frozen["ref"], "labeler": variables},
      sampling.cache_key(),
      _select_fixed_settings(config),
      run.config.seed,
      facts,
    ),
    on_progress=lambda done: log.log_progress(
      min(math.ceil(done / config.block), count_blocks(run)), {}
    ),
  )
  return write_claim_pairs(run, stage, examples, rows, folder, log)


def _select_fixed_settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that answers and labels depend on, by name.

  Those of the server are included only if it is used.
  """
  fixed = resume_policy.select_fixed_settings(config, "claims")
  if "endpoint" in (config.splitter, config.labeler):
    return fixed
  return {
    key: value for key, value in fixed.items() if not key.startswith("claims.endpoint.")
  }


def make_labeler(
  run: Run, folder: pathlib.Path, splitter: str = ""
) -> tuple[ClaimLabeler, Params]:
  """Returns the labeler that the config selects, and its variables, {} for a server.

  Args:
    run: The run.
    folder: Folder that saves the replies of a server.
    splitter: Replaces config.claims.splitter. "whole" asks whether an answer to the
      question is right.
  """
  config = run.config.claims
  variables: Params = {}
  server = functools.cache(
    lambda: endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl").ask_or_stop
  )
  if config.labeler == "endpoint":
    yes_no = claims.ask_yes_no(server())
  else:
    is_sft = config.labeler == "sft"
    variables = role_params.load_judge(run, "sft") if is_sft else run.base
    yes_no = lambda queries: claim_probabilities.compute_yes_no_probs(
      run, variables, queries, length=config.check_len, rows=config.check_rows
    )
  divide = _make_divide_fn(run, server, splitter or config.splitter)
  label = functools.partial(claims.check_claims, divide=divide, yes_no=yes_no)
  return label, variables


def _make_divide_fn(
  run: Run, server: Callable[[], claims.AskFn], splitter: str
) -> claims.DivideFn:
  config = run.config.claims
  prompts = claims.CLAIM_PROMPT_STYLES[run.config.model.prompts]
  if splitter == "endpoint":
    return claims.ask_for_claims(server(), prompts)
  if splitter == "self":  # The SFT policy, at temperature 0.
    sampling = SamplingSettings(
      config.split_prompt_len, config.split_max_new, config.batch
    )
    variables = role_params.load_judge(run, "sft")
    ask = answering.Answerer(run, variables, sampling).ask_judge
    return claims.ask_for_claims(ask, prompts)
  whole = lambda question, answer: [(question, answer)] if answer else []
  rule = split_statements if splitter == "rules" else whole
  return claims.split_by_rules(rule, run.prompts.check)


# Answers and pairs.


def make_claim_rows(
  policy: answering.Answerer, examples: Sequence[Example], labeler: ClaimLabeler
) -> list[JsonRow]:
  """Returns a row for each prompt: the answers, their claims and verdicts."""
  replies = policy.generate_replies(answering.make_queries(examples))
  answers = [[reply.text for reply in samples] for samples in replies]
  return [
    {
      "id": example["id"],
      "video": video.get_report_path(policy.run, example),
      "question": show_media(example["question"]),
      "answers": texts,
      "stopped": [reply.stopped for reply in samples],
      "outcomes": [result.outcome for result in results],
      "scores": [result.score for result in results],
      "claims": [list(result.claims) for result in results],
      "chances": [list(result.yes_no_probs) for result in results],
      "mistakes": [truth.count_answer_mistakes(example, text) for text in texts],
      "unsupported": [truth.count_unsupported(example, text) for text in texts],
    }
    for example, texts, samples, results in zip(
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
  """Selects the pairs and writes them with their rates.

  Returns:
    The content of rates.json; see compute_claim_rates.
  """
  config = run.config.claims
  choose = functools.partial(
    claims.choose_pairs, seed=run.config.seed, limit=config.pairs, gap=config.gap
  )
  candidates = []
  for example, row in zip(examples, rows, strict=True):
    scored = zip(row["scores"], row["stopped"], strict=True)
    # Truncated answers have no score.
    scores = [score if stopped else None for score, stopped in scored]
    chosen = choose(example["id"], row["answers"], scores)
    candidates += [(example, row, pair) for pair in chosen]
  selected, rho = list(range(len(candidates))), None
  if config.balance:
    texts = [tuple(row["answers"][i] for i in pair) for _, row, pair in candidates]
    selected, rho = claims.balance_lengths(texts)
  videos = run.workdir / "world" / "videos"
  pairs = [make_claim_preference(*candidates[i], videos) for i in selected]
  summary = compute_claim_rates(rows, [candidates[i][1:] for i in selected])
  summary |= {"pairs_drawn": len(candidates), "rho": rho}
  pairwise.write_preferences(folder, pairs, summary)
  show = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
  table = [{"what": name, "value": show(value)} for name, value in summary.items()]
  log.print_table(f"{stage}: claims", table)
  return summary


def make_claim_preference(
  example: Example, row: JsonRow, pair: tuple[int, int], videos: pathlib.Path
) -> JsonRow:
  """Returns a pair in the format of records.read_preferences, with its verdicts."""
  chosen, rejected = pair
  get_values = lambda name: [row[name][i] for i in pair]
  judge_text = "\n".join(
    f"Output {place}: {_format_verdicts(row, i)}"
    for place, i in enumerate(pair, start=1)
  )
  return preference_rows.make_preference(
    example,
    {
      "id": f"{row['id']}:{chosen}-{rejected}",
      "preference": 1,
      "outputs": get_values("answers"),
      "stopped": get_values("stopped"),
      "mistakes": get_values("mistakes"),
      "narrative": "",
    },
    videos,
    judge_text=judge_text,
  )


def _format_verdicts(row: JsonRow, number: int) -> str:
  """Formats the claims of an answer, accepted (+) or denied (-)."""
  verdicts = zip(row["claims"][number], row["chances"][number], strict=True)
  return " ".join(
    f"[{'+' if yes > no else '-'}] {claim}" for claim, (yes, no) in verdicts
  )


def compute_claim_rates(
  rows: Sequence[JsonRow], pairs: Sequence[tuple[JsonRow, tuple[int, int]]]
) -> dict[str, Any]:
  """Computes counts of answers, claims and pairs, and the accuracy of the pairs.

  "truth_agreement" is the accuracy of the "truth_pairs", whose answers differ in
  mistakes. "supported_agreement" is that of the "supported_pairs", whose answers differ
  in unsupported statements. "claims_unread" counts the claims without a yes or a no.
  """
  outcomes = collections.Counter(outcome for row in rows for outcome in row["outcomes"])
  probs = [pair for row in rows for each in row["chances"] for pair in each]
  judged = [pair for pair in probs if pair is not None]
  count_words = lambda side: [len(row["answers"][p[side]].split()) for row, p in pairs]
  agreements = {
    name: [row[name][p[0]] < row[name][p[1]] for row, p in pairs
           if row[name][p[0]] is not None and row[name][p[0]] != row[name][p[1]]]
    for name in ("mistakes", "unsupported")
  }  # fmt: skip
  return {
    "prompts": len(rows),
    **{f"answers_{name}": outcomes[name] for name in claims.CLAIM_OUTCOMES},
    "claims": len(judged),
    "claims_unread": len(probs) - len(judged),
    "claims_denied": pairwise.average_or_none([not yes > no for yes, no in judged]),
    "pairs": len(pairs),
    "chosen_words": pairwise.average_or_none(count_words(0)),
    "rejected_words": pairwise.average_or_none(count_words(1)),
    "truth_agreement": pairwise.average_or_none(agreements["mistakes"]),
    "truth_pairs": len(agreements["mistakes"]),
    "supported_agreement": pairwise.average_or_none(agreements["unsupported"]),
    "supported_pairs": len(agreements["unsupported"]),
  }


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of the stage."""
  config, data = run.config.claims, run.config.data
  _, frozen = role_params.make_policy_roles(run, role_params.get_start_stage(stage))
  sampling = answering.read_sampling_settings(run.config, "claims", config.samples)
  functions = [
    workloads.make_encode_function(run, config.batch),
    workloads.make_answer_function(run, frozen["ref"], "answers", sampling, runs=1.0),
  ]
  if config.splitter == "self":
    split = SamplingSettings(
      config.split_prompt_len, config.split_max_new, config.batch
    )
    runs = float(config.samples)
    functions.append(
      workloads.make_answer_function(run, frozen["ref"], "split", split, runs=runs)
    )
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  return Workload(functions, 0, config.batch, tokens)


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
