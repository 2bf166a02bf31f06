"""Who scores or ranks the responses of a group: what a recipe asks for, as a score."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build, hosts, label, roles, scoring
from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.feedback import endpoint, grm, rank, rewards
from vlmrlaif_jax.feedback.judge import Query

KINDS = ("reward", "scorer", "list", "pairs", "truth", "grm", "verdict")
SCORES = ("reward", "grm", "verdict")  # Those that say by how much.
CHOICES = {
  "kind": KINDS,
  "judge": ("self", "endpoint"),
  "grm_stage": ("sft", *roles.JUDGES),
}


Said: TypeAlias = Callable[[Example], list[str]]  # What a judge said of its responses.
SILENT: Said = lambda example: []
# From what a method tells of responses to the terms that their scores are the sum of.
Terms: TypeAlias = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

SHOWN = 4  # Verdicts on a group of responses that samples show,
LONGEST = 1000  # and characters of what was asked and of what was said.


class Oracle(NamedTuple):
  """Who scores the responses of a group."""

  score: Any  # For Parts; it reads frozen["reward"] or frozen["asked"].
  told: Callable[[], dict[str, float]] = dict  # For the log, of what it scored last.
  said: Callable[[], Said] = lambda: SILENT  # Of the same.
  terms: Terms = lambda info: {}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # "reward": the reward model's scores; "scorer": their order; "list": a judge
      # lists a group; "pairs": a judge compares every two of it; "truth": the hidden
      # truth of the embedded world orders it; "grm": a generative reward model scores
      # every two of it; "verdict": of judges that are taught, whether they are right.
      kind="scorer",
      judge="self",  # Of "list", "pairs" and "grm": a model of ours, or an "endpoint".
      prompt_len=256,  # Tokens of what a judge of ours is asked.
      max_new=12,
      batch=64,  # Queries at once.
      stop_penalty=-1.0,  # Of "reward", for a response without an end.
      length_coef=0.0,  # Of "reward", times length / response_len.
      noise=0.0,  # Share of the responses whose ranks are shuffled, for studies.
      grm_stage="grm",  # That "grm" is of; or "grm_sft", or the untrained "sft".
      aggregate="mean",  # Of "grm", a key of feedback/aggregates.py's AGGREGATES.
      both_orders=True,  # Of "grm": n (n - 1) queries for n responses, or half of it.
      opponents=0,  # Of "grm", that a response meets; 0 for all others.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Refuses an oracle that there is not."""
  for key, known in CHOICES.items():
    if config[key] not in known:
      raise ValueError(f"oracle.{key} must be one of {known}, not {config[key]!r}")
  if config.kind in SCORES and config.noise:
    raise ValueError(
      f"oracle.noise={config.noise} is of ranks, and oracle.kind={config.kind} gives "
      "scores: set oracle.kind=scorer"
    )


def make(
  run: build.Run, config: ConfigDict, examples: Sequence[Example], folder: pathlib.Path
) -> Oracle:
  """The oracle that a config asks for.

  Args:
    examples: that frozen["asked"] counts.
    folder: of the stage; what an endpoint answered is kept beside it.
  """
  check(config)
  read = functools.partial(text.responses_text, run.tokenizer)
  if config.kind == "reward":
    rules = (config.stop_penalty, config.length_coef)
    score = jax.jit(reward(run, *rules))
    return Oracle(score, terms=reward_terms(run, *rules))
  asked = _Asked()
  if config.kind in SCORES:
    heard = _Heard(_compare(run, config, examples, folder, asked))
    score = grm.as_score(heard, examples, read, eos=run.eos)
    told = functools.partial(TOLD[config.kind], heard)
    return Oracle(_on_host(score), told, asked.said)
  ranked = _rank(run, config, folder, asked)
  if config.noise:
    ranked = rank.shuffled(ranked, share=config.noise, seed=run.config.seed)
  return Oracle(_on_host(rank.as_score(ranked, examples, read)), said=asked.said)


def _on_host(score):
  """A scorer of NumPy arrays, as one of a batch wherever that is.

  Each process scores all of it: rules cost nothing, and judges spread what they are
  asked, over devices or, if they are servers, over processes.
  """

  def fetched(frozen, batch):
    tokens, mask = hosts.fetch((batch.tokens, batch.loss_mask))
    return score(frozen, batch._replace(tokens=tokens, loss_mask=mask))

  return fetched


class _Asked:
  """What a judge was asked last, and what it said."""

  def __init__(self):
    self._last: list[tuple[Query, str | None]] = []

  def by(self, ask: rank.Ask) -> rank.Ask:
    """The same judge; what it says is kept."""

    def keeping(queries):
      replies = ask(queries)
      self._last = list(zip(queries, replies, strict=True))
      return replies

    return keeping

  def said(self) -> Said:
    last = self._last
    # A query is named for its example, after what tells it from others on the same;
    # what stands in it before the question are the rules of the judge.
    start = lambda query, example: max(query.prompt.find(example["question"]), 0)
    told = lambda query, reply, example: (
      query.prompt[start(query, example) :][:LONGEST]
      + f" → {'(nothing)' if reply is None else reply[:LONGEST]}"
    )
    return lambda example: [
      told(query, reply, example)
      for query, reply in last
      if query.id.endswith(f":{example['id']}")
    ][:SHOWN]


class _Heard:
  """A Compare that keeps what it found last."""

  def __init__(self, compare: grm.Compare):
    self.compare = compare
    self.last: grm.Comparison | None = None

  def __call__(self, examples, responses) -> grm.Comparison:
    self.last = self.compare(examples, responses)
    return self.last

  def unread(self) -> float:
    """Share of the judge's replies that could not be read."""
    return self.last.unread / max(self.last.calls, 1)


TOLD = {
  "grm": lambda heard: {
    "judge_calls": float(heard.last.calls),
    "judge_unread": heard.unread(),
  },
  "verdict": lambda heard: {
    "accuracy": float(heard.last.scores.mean()),
    "unread": heard.unread(),
  },
}


def reward(run: build.Run, penalty: float, length_coef: float) -> rewards.Score:
  """The reward model and the rules; see rewards.reward."""
  return rewards.reward(
    run.scorer,
    suffix=tuple(text.suffix_ids(run.tokenizer, run.prompts.reward)),
    eos=run.eos,
    penalty=penalty,
    length_coef=length_coef,
    longest=run.config.data.response_len,
  )


def reward_terms(run: build.Run, penalty: float, length_coef: float) -> Terms:
  """What the scores of `reward` are the sum of."""
  return lambda info: rewards.terms(
    np.asarray(info["scores"]),
    np.asarray(info["loss_mask"]).sum(axis=1),
    np.asarray(info["has_stop"]),
    penalty=penalty,
    length_coef=length_coef,
    longest=run.config.data.response_len,
  )


def _rank(run, config, folder, asked: _Asked) -> rank.Rank:
  if config.kind == "truth":
    return rank.by_truth(truth.mistakes)
  if config.kind == "scorer":
    variables = roles.reward_variables(run)
    return rank.by_scores(functools.partial(scoring.score_texts, run, variables))
  ask = asked.by(_ask(run, config, "sft", folder))
  return rank.by_list(ask) if config.kind == "list" else rank.by_wins(ask, run.prompts)


def _compare(run, config, examples, folder, asked: _Asked) -> grm.Compare:
  style = grm.STYLES[run.config.model.prompts]
  if config.kind == "grm":
    return grm.by_comparison(
      asked.by(_ask(run, config, config.grm_stage, folder)),
      style.prompt,
      read=style.read,
      aggregate=config.aggregate,
      both_orders=config.both_orders,
      opponents=config.opponents,
    )
  if not all("better" in e.get("truth", {}) for e in examples):
    raise ValueError(
      "oracle.kind=verdict scores verdicts on pairs, and these prompts ask for none: "
      "it is of the stage grm; take another oracle.kind"
    )
  return functools.partial(grm.by_verdict, read=style.read)


def _ask(run, config, judge: str, folder) -> rank.Ask:
  """An endpoint, or a judge of ours at temperature 0; see roles.judge_variables."""
  if config.judge == "endpoint":
    return endpoint.Endpoint(config.endpoint, folder.parent / "endpoint.sqlite").ask
  variables = roles.judge_variables(run, judge)
  sampling = answer.Sampling(config.prompt_len, config.max_new, config.batch)
  return label.asking(run, variables, sampling)
