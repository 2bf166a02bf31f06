"""Benchmarks of papers, from their own files, and what comes before them.

python launch/run.py --config=configs/benchmarks.py --workdir=runs/demo

Each policy of the workdir answers, and a judge rates. The tiny preset makes the files
of the embedded world, whose truth is exact. Those of the papers are given by where they
lie; one that is missing is told of, with where it comes from and what stands in it:

  --config=configs/benchmarks.py:7b
  --config.evaluate.names="('videochatgpt', 'msvd_qa')"
  --config.evaluate.videochatgpt.questions=FOLDER
  --config.evaluate.videochatgpt.videos=FOLDER
  --config.evaluate.msvd_qa.questions=FILE.json
  --config.evaluate.msvd_qa.videos=FOLDER

Multiple choice is by the letters' log-probabilities and by what is said, or by those of
the options' texts, and of all questions or of some; it needs no judge:

  --config.evaluate.videomme.by="('letter', 'text', 'generation')"
  --config.evaluate.videomme.durations="('short', 'medium')"
  --config.evaluate.prompt_len=1280  # Questions with their options are long.

Object HalBench (chair) reads COCO's annotations and a table of synonyms, too:

  --config.evaluate.chair.synonyms=FILE.txt
  --config.evaluate.chair.annotations="('instances_val2014.json', ...)"

Retrieval (MSVD, MSRVTT) and action recognition (UCF101, HMDB51) compare what is said of
videos by CLIP's text tower:

  --config.evaluate.names="('msrvtt_retrieval', 'ucf101')"
  --config.evaluate.clip=FOLDER  # Of openai/clip-vit-base-patch32.
  --config.evaluate.msrvtt_retrieval.questions=test_videodatainfo.json
  --config.evaluate.ucf101.questions=testlist01.txt

The judge is our own SFT policy, or with --config.evaluate.judge=endpoint a server:

  --config.evaluate.endpoint.url=URL --config.evaluate.endpoint.model=NAME

Scores stand in WORKDIR/eval/NAME/POLICY/scores.json with all that moves them; `python
tools/compare.py benchmarks A B` sets two side by side and warns of what differs.
WORKDIR/eval/results.json holds all of them. More names may be given later: the stage
runs again for those that are not measured yet. lmms-eval runs its own benchmarks on a
policy: docs/stages/evaluation.md.
"""

from ml_collections import ConfigDict

from configs import front, ppo
from vlmrlaif_jax.evals.benchmarks.protocol import load_benchmarks

WORLD = tuple(name for name, each in load_benchmarks().items() if each.world)


def tiny() -> ConfigDict:
  """Returns all benchmarks that the embedded world has, with its exact judge."""
  return measuring(ppo.tiny(), WORLD)


def llava_7b() -> ConfigDict:
  """Returns benchmarks of files that are given."""
  return measuring(ppo.llava_7b(), ())


def measuring(config: ConfigDict, names: tuple[str, ...]) -> ConfigDict:
  """Returns the recipe of configs/ppo.py with these benchmarks."""
  config.recipe = "benchmarks"
  config.evaluate.names = names
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
