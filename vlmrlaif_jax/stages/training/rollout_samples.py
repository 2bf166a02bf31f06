"""What a stage that samples leaves to look at: answers, and what became of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.types import Collect, Params, untimed
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common, oracles

Row: TypeAlias = dict[str, Any]

AGAIN = 16  # Of the first step's prompts, how many are written anew with each file.
KEPT = (  # Of what collect tells.
  *("tokens", "loss_mask", "scores", "valid", "has_stop"),
  *("row_advantages", "row_kl"),
)


class Sampled(NamedTuple):
  """The responses of a step, with a row for each."""

  asked: list[Example]
  texts: list[str]
  mistakes: list[int | None]
  info: dict[str, np.ndarray]  # Of KEPT.


def read(
  run: Run, config: ConfigDict, examples: Sequence[Example], step: int, info
) -> Sampled:
  """A step's responses, from what collect tells of them.

  Args:
    config: of the stage; it has batch_size and samples.
    examples: that the stage asks about.
  """
  found = distributed.fetch({name: info[name] for name in KEPT})
  texts = tokenization.responses_text(
    run.tokenizer, found["tokens"], found["loss_mask"]
  )
  order = common.order_of(run, len(examples), config.batch_size, step)
  asked = [examples[i] for i in np.repeat(order, config.samples)]
  wrong = [truth.mistakes(e, t) for e, t in zip(asked, texts, strict=True)]
  return Sampled(asked, texts, wrong, found)


def right(sampled: Sampled) -> dict[str, float]:
  """How right the responses are, if that is known: the share that are by the "truth" of
  the embedded world, or that have "met_reference", a user's own answer."""
  known = [wrong == 0 for wrong in sampled.mistakes if wrong is not None]
  met = [
    truth.verdict(example, said).correct
    for example, said, wrong in zip(*sampled[:3], strict=True)
    if wrong is None and example.get("answer")
  ]
  shares = {"truth": known, "met_reference": met}
  return {name: float(np.mean(each)) for name, each in shares.items() if each}


def is_due(config: ConfigDict, step: int) -> bool:
  """Whether a step, counted from 0, is one whose answers are kept."""
  return (step + 1) % config.samples_every == 0 or step == 0


def rows(
  run: Run,
  sampled: Sampled,
  terms: oracles.Terms,
  said: oracles.Said = oracles.SILENT,
) -> list[Row]:
  """A row for each response, as the report shows it.

  Args:
    said: what a judge said stands in the row of an example's first response.
  """
  parts, info, made = terms(sampled.info), sampled.info, []
  for i, example in enumerate(sampled.asked):
    first = i == 0 or sampled.asked[i - 1] is not example
    judged = said(example) if first else []
    valid, wrong = bool(info["valid"][i]), sampled.mistakes[i]
    row = {
      "id": example["id"],
      "video": run_lib.shown_video(run, example),
      "kind": (example.get("truth") or {}).get("kind"),
      "prompt": example["question"],
      "response": sampled.texts[i],
      "score": float(info["scores"][i]),
      "terms": {name: float(x[i]) for name, x in parts.items()} if valid else {},
      "kl": float(info["row_kl"][i]),
      "valid": valid,
      "advantage": float(info["row_advantages"][i]),
      "has_stop": bool(info["has_stop"][i]),
      "truth": None if wrong is None else wrong == 0,
    }
    made.append(row | ({"judge": judged} if judged else {}))
  return made


class Again:
  """The first step's prompts, answered by the policy as it is at a later one.

  With the first step's random numbers, too: what differs is the policy's doing. It
  takes one rollout more for each file of samples. A `look` of loop.Hooks.

  Args:
    collect: of the method; it is compiled already.
    data, key: of the stage; see train.fit and train.key_of.
    show: the rows that show what was sampled.
    The others: see read.
  """

  def __init__(
    self,
    run: Run,
    config: ConfigDict,
    examples: Sequence[Example],
    collect: Collect,
    data: Callable[[int], Any],
    key: jax.Array,
    show: Callable[[Sampled], list[Row]],
  ):
    self._read = functools.partial(read, run, config, examples, 0)
    self._collect, self._data, self._show = collect, data, show
    self._key, self._config = jax.random.fold_in(key, 0), config
    self._rows: dict[int, list[Row]] = {}

  def __call__(self, step: int, params: Params, frozen: Params) -> None:
    if step == 0 or not is_due(self._config, step):
      return
    begun = self._collect.begin(self._key, params, frozen, self._data(0))
    _, info = self._collect.finish(params, frozen, begun, untimed)
    shown = self._show(self._read(info))[: AGAIN * self._config.samples]
    self._rows[step] = [row | {"again": True} for row in shown]

  def rows(self, step: int) -> list[Row]:
    """Those of a step that is_due, once."""
    return self._rows.pop(step, [])
