"""Files of benchmarks, and who answers and judges, by script."""

import json

from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks.protocol import Judge, Model


def config(questions, videos="videos"):
  return ConfigDict(dict(questions=str(questions), videos=str(videos)))


def write(path, rows):
  path.write_text(json.dumps(rows))
  return path


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
