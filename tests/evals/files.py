"""Files of benchmarks, and who answers and judges, by script."""

import json

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkReply,
  CaseJudge,
  load_benchmarks,
)
from vlmrlaif_jax.evals.bootstrap import Resampling


def config(questions, videos="videos"):
  return ConfigDict(dict(questions=str(questions), videos=str(videos)))


def write(path, rows):
  path.write_text(json.dumps(rows))
  return path


def write_world(folder, examples):
  """Writes all files of the embedded world, of videos in the same folder."""
  for benchmark in load_benchmarks().values():
    if benchmark.world:
      benchmark.world(folder, examples, str(folder))


def model(said):
  """Answers by the text of the question; None to what is not there."""
  return says(lambda questions: [said.get(q.text) for q in questions])


def says(answer, **more):
  """A model of a function from questions to texts, None where there is no answer."""

  def replies(questions):
    return [
      None if text is None else BenchmarkReply(text) for text in answer(questions)
    ]

  return BenchmarkModel(replies, **more)


def run(benchmark, model, judge, config):
  """The scores of a benchmark's module."""
  rows = benchmark.run(benchmark.load(config), model, judge, config)
  return protocol.average_scores(rows, Resampling())


def judge(reply, asked=None, **facts):
  """A judge of scripted replies; `asked` takes up the cases of each call."""

  def ask(cases):
    if asked is not None:
      asked.append(list(cases))
    return [reply(case) for case in cases]

  return CaseJudge("scripted", {"version": "1", **facts}, ask)
