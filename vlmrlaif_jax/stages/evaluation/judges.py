"""The stage `judges`: compares judges with the ground truth and with held-out labels.

The reward model, the untrained policy and the generative reward models judge the same
pairs: the held-out labels, those of a file, and two answers of the policy to held-out
questions with a known ground truth. Their scores of answers are compared with human
scores of a file, or with the ground truth.
"""

import pathlib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, jsonl, resumable
from vlmrlaif_jax.core.errors import check_at_least, subsection, user_errors
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, pipeline, records
from vlmrlaif_jax.data.formats.row_files import read_file_rows
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.data.templates import show_media
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.summary import POINTS, format_row
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.generative_rm import JUDGE_STYLES, make_worded_style
from vlmrlaif_jax.runtime import answering, resume_policy, role_params, scoring
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import encode_videos, get_media_folder
from vlmrlaif_jax.stages.evaluation import judge_correlation
from vlmrlaif_jax.stages.evaluation.judge_correlation import GroupScorer
from vlmrlaif_jax.stages.stage import PREFERENCES, Stage
from vlmrlaif_jax.stages.training import common, generative_rm
from vlmrlaif_jax.stages.training.generative_rm import Pairs, PreferenceJudge


def default_config() -> ConfigDict:
  """Returns the settings of the section `judges`."""
  return ConfigDict(
    dict(
      samples=4,  # Answers per question; the first two distinct ones are compared.
      temperature=1.0,  # Sampling temperature of the answers.
      top_p=1.0,
      # Tokens of a generative judge's prompt, video included.
      prompt_len=placeholder(int),
      max_new=placeholder(int),  # Tokens of its response.
      batch=64,  # Questions per batch.
      resamples=2000,  # Bootstrap resamples.
      # Optional files. `pairs`: preferences, or Pair tasks of MLLM-as-a-Judge.
      # `scores`: its Score tasks, in place of answers with a ground truth.
      pairs="",
      scores="",
      videos="",  # Folder of the videos or images of both files.
      groups=100,  # Maximum questions whose answers the ground truth scores.
      both_orders=True,  # Whether judges score each pair in both orders.
      server=False,  # Whether the server of `endpoint` is an additional judge.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `judges`; raises UserError for an invalid value."""
  section = config.judges
  with user_errors("judges"):
    check_at_least(section, {"samples": 2, "temperature": 0})
    check_at_least(
      section, {"resamples": 1, "groups": 0, "prompt_len": 1, "max_new": 1}
    )
    shared_url = config.judge.url if "judge" in config else ""
    if not section.server and section.endpoint.url != shared_url:
      raise ValueError(
        f"endpoint.url={section.endpoint.url!r} is not queried: set "
        "--config.judges.server=True, or leave it out"
      )
    if section.server:
      with subsection("endpoint"):
        endpoint.check(section.endpoint)


def count_judge_questions(run: Run) -> int:
  """Returns the number of questions that the policy answers for the judges."""
  return len(run.splits.benchmark) + len(run.splits.shifted)


def run_judges(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> JsonRow:
  """Compares each judge with the ground truth and with held-out labels.

  Writes results.json, pairs.jsonl with the verdicts, and scores.json with correlations.

  Returns:
    Accuracies by "SET_JUDGE", and correlations by "pearson_JUDGE_GROUPING".
  """
  policy = role_params.load_judge(run, "sft")
  labels = common.load_training_preferences(run, "rm", log, min_count=1)
  _, labeled = pipeline.split_held_out(labels, run.config.rm.holdout, run.config.seed)
  run, file_pairs = load_judge_pairs(run, log)
  answers_by_set = {
    "truth": judge_correlation.answer_questions(
      run, policy, run.splits.benchmark, folder, log
    ),
    "shifted": judge_correlation.answer_questions(
      run, policy, run.splits.shifted, folder, log
    ),
  }
  run, groups = judge_correlation.make_answer_groups(run, answers_by_set["truth"], log)
  sets = {"labels": labeled, "file": file_pairs}
  for name, answers in answers_by_set.items():
    sets[name] = [pair for pair in map(judge_agreement.make_pair, answers) if pair]
  pairs = [(name, pair) for name, each in sets.items() for pair in each]
  verdicts: dict[str, list[JsonRow]] = {}
  available = load_available_judges(run, policy, folder)
  for name, (judge, _, variables) in available.items():
    log.print_note(f"judges: {name} judges {len(pairs)} pairs")
    verdicts[name] = load_or_ask_verdicts(
      run, judge, [p for _, p in pairs], variables, folder / f"said_{name}.jsonl"
    )
  results = {}
  for name in filter(sets.get, sets):
    indices = [i for i, (set_name, _) in enumerate(pairs) if set_name == name]
    chosen = {
      judge: [rows[i]["choice"] for i in indices] for judge, rows in verdicts.items()
    }
    results[name] = measure_judges(run, sets[name], chosen)
  rows = _make_pair_rows(pairs, verdicts)
  distributed.on_process_zero(lambda: jsonl.write_records(folder / "pairs.jsonl", rows))
  distributed.on_process_zero(lambda: write_json(folder / "results.json", results))
  log.print_table("Judges: per cent of pairs [95 % interval]", format_judges(results))
  summary = {
    f"{name}_{judge}": stats["accuracy"]["mean"]
    for name, measured in results.items()
    for judge, stats in measured["judges"].items()
  }
  scorers = {name: (scorer, own) for name, (_, scorer, own) in available.items()}
  correlations = judge_correlation.measure_correlations(
    run, scorers, groups, folder, log
  )
  return summary | {
    f"pearson_{judge}_{way}": stat["mean"]
    for judge, stats in correlations["judges"].items()
    for way, stat in stats.items()
    if stat
  }


def _make_pair_rows(
  pairs: Sequence[tuple[str, PreferenceExample]],
  verdicts: Mapping[str, Sequence[JsonRow]],
) -> list[JsonRow]:
  """Returns the rows of pairs.jsonl: each pair with its set and all its verdicts."""
  keys = ("id", "question", "output_1", "output_2", "preference")
  return [
    {"set": name, **{key: value for key, value in pair.items() if key in keys}}
    | {"question": show_media(pair["question"])}
    | {"judges": {judge: rows[i] for judge, rows in verdicts.items()}}
    for i, (name, pair) in enumerate(pairs)
  ]


def load_judge_pairs(run: Run, log: StageLog) -> tuple[Run, Pairs]:
  """Loads the pairs of config.judges.pairs that can be judged.

  Returns:
    The run with the features of the videos, and the pairs.
  """
  config = run.config.judges
  if not config.pairs:
    return run, []
  path = pathlib.Path(config.pairs)
  problems: list[records.SkippedRecord] = []
  first = next(read_file_rows(path), ("", {}))[1]
  if "answer1" in first:
    pairs = judge_agreement.load_pairs(path, config.videos, problems)
  else:
    pairs, problems = records.read_preferences(
      path,
      videos=config.videos or None,
      written=get_media_folder(run),
      allow_outside=run.config.data.allow_outside,
    )
  run = encode_videos(run, [pair["video"] for pair in pairs], log.print_note)
  total = len(pairs) + len(problems)
  pairs, unscorable = scoring.select_scorable(run, pairs)
  if problems or unscorable:
    problems += unscorable
    log.print_note(records.format_skipped_records(problems, total=total))
  return run, pairs


def load_available_judges(
  run: Run, policy: Params, folder: pathlib.Path
) -> dict[str, tuple[PreferenceJudge, GroupScorer, Params]]:
  """Loads the judges of the workdir and the endpoint.

  `policy` has the variables of the SFT policy, the untrained judge. Replies of the
  endpoint are saved in `folder`.

  Returns:
    For each judge: a judge of pairs, a scorer of answers, and its variables.
  """
  config, label = run.config.judges, run.config.label
  lengths = answering.SamplingSettings(config.prompt_len, config.max_new, config.batch)
  make_ask_fn = lambda variables: answering.Answerer(run, variables, lengths).ask_judge
  make_judge = generative_rm.make_prompted_judge
  make_scorer = judge_correlation.make_pairwise_scorer
  style = JUDGE_STYLES[run.config.model.prompts]
  # The prompts are those of the stage `label`, without captions.
  label_sampling = answering.SamplingSettings(
    label.judge_prompt_len, label.judge_max_new, config.batch
  )
  worded_judge = make_judge(
    answering.Answerer(run, policy, label_sampling).ask_judge,
    make_worded_style(run.prompts),
  )
  scorer = make_scorer(run, make_ask_fn(policy), style)
  judges = {"untrained": (worded_judge, scorer, policy)}
  if role_params.has_reward_model(run):
    reward = role_params.load_reward_model(run)
    reward_scorer = judge_correlation.make_reward_group_scorer(run, reward)
    judges["reward_model"] = (make_reward_judge(run, reward), reward_scorer, reward)
  for name, variables in role_params.load_judges(run).items():
    if name != "sft":
      ask = make_ask_fn(variables)
      judges[name] = (make_judge(ask, style), make_scorer(run, ask, style), variables)
  if config.server:
    ask = endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl").ask
    style = JUDGE_STYLES["paper"]
    judges["endpoint"] = (make_judge(ask, style), make_scorer(run, ask, style), {})
  return judges


def make_reward_judge(run: Run, variables: Params) -> PreferenceJudge:
  """Returns a judge that scores each answer alone with the reward model."""

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
  """Returns the judge's verdict of each pair, from the file where it has one.

  The verdicts depend on `variables`, which are {} for a server.
  """
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
  """Computes the accuracy of each judge, and differences from the last judge."""
  better = [pair["preference"] for pair in pairs]
  videos = [features.format_video_name(pair["video"]) for pair in pairs]
  resampling = Resampling(videos, run.config.seed, run.config.judges.resamples)
  return {
    "pairs": len(pairs),
    "videos": len(set(videos)),
    "judges": {
      name: judge_agreement.measure_accuracy(each, better, resampling)
      for name, each in chosen.items()
    },
    "difference": judge_agreement.compare_accuracies(chosen, better, resampling),
  }


def format_judges(results: JsonRow) -> list[JsonRow]:
  """Returns a table row for each set and judge."""
  measures = ("accuracy", "tied", "unread", "slot_bias")
  return [
    {"pairs": f"{measured['pairs']} {name}", "judge": judge}
    | format_row({measure: stats.get(measure, {}) for measure in measures}, POINTS)
    for name, measured in results.items()
    for judge, stats in measured["judges"].items()
  ]


STAGES = (
  Stage(
    name="judges",
    title="The judges against truth",
    section="judges",
    run=run_judges,
    total_steps=count_judge_questions,
    check=check,
    reads=lambda config: ("rm", "label"),  # The held-out share, and lengths.
    files={"pairs": PREFERENCES, "scores": "a file of scores of MLLM-as-a-Judge"},
    is_measurement=True,
  ),
)
