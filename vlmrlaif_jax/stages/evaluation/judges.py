"""The stage `judges`: judges compared with truth and with held-out labels.

The reward model, the policy that judges untaught, and the generative reward models are
shown the same pairs: those of the labels that were held out, those of a file, and two
answers of the policy to held-out questions, of which truth tells the better one. What
they score answers is held against people's scores in a file, or against truth's.
"""

import pathlib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, jsonl, resumable
from vlmrlaif_jax.core.errors import check_at_least, subsection, user_errors
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow, read_numbered_rows
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, records
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.summary import POINTS, format_row
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.generative_rm import JUDGE_STYLES, make_worded_style
from vlmrlaif_jax.runtime import answering, resume_policy, role_params, scoring
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import encode_videos
from vlmrlaif_jax.stages.evaluation import judge_correlation
from vlmrlaif_jax.stages.evaluation.judge_correlation import GroupScorer
from vlmrlaif_jax.stages.stage import Stage
from vlmrlaif_jax.stages.training import generative_rm, rm
from vlmrlaif_jax.stages.training.generative_rm import Pairs, PreferenceJudge


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      samples=4,  # Answers to each question; the first two that differ are compared.
      temperature=1.0,  # Of the answers.
      top_p=1.0,
      # Tokens of what a generative judge is asked, video included.
      prompt_len=placeholder(int),
      max_new=placeholder(int),  # Tokens of what it says.
      batch=64,  # Questions at once.
      resamples=2000,  # Of the bootstrap.
      # Files that judges are measured on, too: of preferences, or MLLM-as-a-Judge's
      # Pair tasks; and of its Score tasks, in place of answers that truth scores.
      pairs="",
      scores="",
      videos="",  # The folder that both name their videos or images from.
      groups=100,  # Questions whose answers truth scores.
      both_orders=True,  # Of two answers that are scored.
      endpoint=endpoint.default_config(),  # A judge as well, if it has a url.
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `judges`."""
  given = config.judges
  with user_errors("judges"):
    check_at_least(given, {"samples": 2, "temperature": 0})
    check_at_least(given, {"resamples": 1, "groups": 0, "prompt_len": 1, "max_new": 1})
    if given.endpoint.url:
      with subsection("endpoint"):
        endpoint.check(given.endpoint)


def count_judge_questions(run: Run) -> int:
  """Questions that the policy answers twice or more, for judges to choose."""
  return len(run.splits.benchmark) + len(run.splits.shifted)


def run_judges(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> JsonRow:
  """Holds each judge against truth, and against labels that it was not taught.

  Writes results.json, pairs.jsonl with what each judge said of each pair, and
  scores.json of how its scores go with the right ones.
  """
  policy = role_params.load_judge(run, "sft")
  _, labelled = rm.split_preference_pairs(run, log, least=1)
  run, given = load_judge_pairs(run, log)
  known = {
    "truth": judge_correlation.answer_questions(
      run, policy, run.splits.benchmark, folder, log
    ),
    "shifted": judge_correlation.answer_questions(
      run, policy, run.splits.shifted, folder, log
    ),
  }
  run, groups = judge_correlation.make_answer_groups(run, known["truth"], log)
  sets = {"labels": labelled, "file": given}
  for name, answers in known.items():
    sets[name] = [pair for pair in map(judge_agreement.make_pair, answers) if pair]
  pairs = [(name, pair) for name, each in sets.items() for pair in each]
  said: dict[str, list[JsonRow]] = {}
  there = load_available_judges(run, policy, folder)
  for name, (judge, _, variables) in there.items():
    log.print_note(f"judges: {len(pairs)} pairs to {name}")
    said[name] = load_or_ask_verdicts(
      run, judge, [p for _, p in pairs], variables, folder / f"said_{name}.jsonl"
    )
  results = {}
  for name in filter(sets.get, sets):
    here = [i for i, (of, _) in enumerate(pairs) if of == name]
    chosen = {judge: [rows[i]["choice"] for i in here] for judge, rows in said.items()}
    results[name] = measure_judges(run, sets[name], chosen)
  keys = ("id", "question", "output_1", "output_2", "preference")
  rows = [
    {"set": name, **{key: value for key, value in pair.items() if key in keys}}
    | {"judges": {judge: rows[i] for judge, rows in said.items()}}
    for i, (name, pair) in enumerate(pairs)
  ]
  distributed.on_process_zero(lambda: jsonl.write_records(folder / "pairs.jsonl", rows))
  distributed.on_process_zero(lambda: write_json(folder / "results.json", results))
  log.print_table("Judges: per cent of pairs [95 % interval]", format_judges(results))
  summary = {
    f"{name}_{judge}": stats["accuracy"]["mean"]
    for name, found in results.items()
    for judge, stats in found["judges"].items()
  }
  scorers = {name: (scorer, own) for name, (_, scorer, own) in there.items()}
  told = judge_correlation.measure_correlations(run, scorers, groups, folder, log)
  return summary | {
    f"pearson_{judge}_{way}": stat["mean"]
    for judge, stats in told["judges"].items()
    for way, stat in stats.items()
    if stat
  }


def load_judge_pairs(run: Run, log: StageLog) -> tuple[Run, Pairs]:
  """The pairs of config.judges.pairs that can be judged, and the run with features of
  their videos.
  """
  config = run.config.judges
  if not config.pairs:
    return run, []
  path = pathlib.Path(config.pairs)
  problems: list[records.SkippedRecord] = []
  first = next(iter(read_numbered_rows(path)), ("", {}))[1]
  if "answer1" in first:
    pairs = judge_agreement.load_pairs(path, config.videos)
  else:
    pairs, problems = records.read_preferences(path, videos=config.videos or None)
  run = encode_videos(run, [pair["video"] for pair in pairs], log.print_note)
  total = len(pairs) + len(problems)
  pairs, more = scoring.select_scorable(run, pairs)
  if problems or more:
    log.print_note(records.format_skipped_records([*problems, *more], total=total))
  return run, pairs


def load_available_judges(
  run: Run, policy: Params, folder: pathlib.Path
) -> dict[str, tuple[PreferenceJudge, GroupScorer, Params]]:
  """Each judge that there is, of pairs in one order and of answers, and its variables.

  Args:
    policy: variables of the SFT policy, which judges untaught.
  """
  config, label = run.config.judges, run.config.label
  lengths = answering.SamplingSettings(config.prompt_len, config.max_new, config.batch)
  ask_of = lambda variables: answering.Answerer(run, variables, lengths).ask_judge
  by_asking, comparing = generative_rm.prompted_judge, judge_correlation.pairwise_scorer
  style = JUDGE_STYLES[run.config.model.prompts]
  # Asked as it was for the labels, but told nothing of the video.
  asked = answering.SamplingSettings(
    label.judge_prompt_len, label.judge_max_new, config.batch
  )
  words = by_asking(
    answering.Answerer(run, policy, asked).ask_judge, make_worded_style(run.prompts)
  )
  found = {"untrained": (words, comparing(run, ask_of(policy), style), policy)}
  if role_params.has_reward_model(run):
    reward = role_params.load_reward_model(run)
    by_score = judge_correlation.reward_scorer(run, reward)
    found["reward_model"] = (reward_judge(run, reward), by_score, reward)
  for name, variables in role_params.load_judges(run).items():
    if name != "sft":
      ask = ask_of(variables)
      found[name] = (by_asking(ask, style), comparing(run, ask, style), variables)
  if config.endpoint.url:
    ask = endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl").ask
    style = JUDGE_STYLES["paper"]
    found["endpoint"] = (by_asking(ask, style), comparing(run, ask, style), {})
  return found


def reward_judge(run: Run, variables: Params) -> PreferenceJudge:
  """A reward model, which scores each answer alone."""

  def judge(pairs):
    sides = [
      scoring.score_texts(run, variables, pairs, [pair[side] for pair in pairs])
      for side in ("output_1", "output_2")
    ]
    return [
      {
        "text": f"{a:.4f}, {b:.4f}",
        "choice": judge_agreement.choose_by_scores((a, b)),
      }
      for a, b in zip(*(side.tolist() for side in sides), strict=True)
    ]

  return judge


def load_or_ask_verdicts(
  run: Run,
  judge: PreferenceJudge,
  pairs: Pairs,
  variables: Params,
  path: pathlib.Path,
) -> list[JsonRow]:
  """What the judge says of each pair; what is in the file is taken from there."""
  config = run.config.judges
  facts = [(p["id"], p["question"], p["output_1"], p["output_2"]) for p in pairs]
  lengths = (config.prompt_len, config.max_new, run.config.model.prompts)
  if not variables:
    lengths += tuple(
      resume_policy.select_fixed_settings(config.endpoint, "judges.endpoint").items()
    )
  return resumable.load_or_compute(
    path,
    run.watch.wrap_blocks(lambda block: judge([pairs[i] for i in block])),
    count=len(pairs),
    batch=answering.BATCHES * config.batch,
    fingerprint=resumable.compute_fingerprint(
      variables, facts, lengths, run.config.seed
    ),
  )


def measure_judges(
  run: Run, pairs: Pairs, chosen: dict[str, list[judge_agreement.PairChoice]]
) -> JsonRow:
  """A set's results: of each judge, and of the last beside the others."""
  better = [pair["preference"] for pair in pairs]
  videos = [features.format_video_name(pair["video"]) for pair in pairs]
  how = Resampling(videos, run.config.seed, run.config.judges.resamples)
  return {
    "pairs": len(pairs),
    "videos": len(set(videos)),
    "judges": {
      name: judge_agreement.measure_accuracy(each, better, how)
      for name, each in chosen.items()
    },
    "difference": judge_agreement.compare_accuracies(chosen, better, how),
  }


def format_judges(results: JsonRow) -> list[JsonRow]:
  """Returns a row for each set and judge."""
  measures = ("accuracy", "tied", "unread", "slot_bias")
  return [
    {"pairs": f"{found['pairs']} {name}", "judge": judge}
    | format_row({measure: stats.get(measure, {}) for measure in measures}, POINTS)
    for name, found in results.items()
    for judge, stats in found["judges"].items()
  ]


STAGES = (
  Stage(
    name="judges",
    title="The judges against truth",
    section="judges",
    run=run_judges,
    total_steps=count_judge_questions,
    check=check,
    reads=lambda config: ("rm", "label"),  # The pairs held out, and how SFT judged.
    is_measurement=True,
  ),
)
