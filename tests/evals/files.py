"""Files of benchmarks, and who answers and judges, by script."""

import json

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks.protocol import Judge, Model, all_benchmarks


def config(questions, videos="videos"):
  return ConfigDict(dict(questions=str(questions), videos=str(videos)))


def write(path, rows):
  path.write_text(json.dumps(rows))
  return path


def write_world(folder, examples):
  """Writes all files of the embedded world, of videos in the same folder."""
  for benchmark in all_benchmarks().values():
    if benchmark.world:
      benchmark.world(folder, examples, str(folder))


def model(said):
  """Answers by the text of the question; None to what is not there."""
  return Model(lambda name, questions: [said.get(q.text) for q in questions])


def judge(reply, asked=None, **facts):
  """A judge of scripted replies; `asked` takes up the cases of each call."""

  def ask(cases):
    if asked is not None:
      asked.append(list(cases))
    return [reply(case) for case in cases]

  return Judge("scripted", {"version": "1", **facts}, ask)
