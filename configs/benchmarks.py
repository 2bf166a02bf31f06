"""Benchmarks of papers, from their own files, after the recipe configs/ppo.py.

python launch/run.py --config=configs/benchmarks.py --workdir=runs/demo

Each policy of the workdir answers the questions, and a judge scores the answers. The
tiny preset creates benchmarks of the embedded world with exact ground truth. The
benchmarks of papers need their files. If a file is missing, an error names its source
and its format:

  --config=configs/benchmarks.py:7b
  --config.evaluate.names="('videochatgpt', 'msvd_qa')"
  --config.evaluate.videochatgpt.questions=FOLDER
  --config.evaluate.videochatgpt.videos=FOLDER
  --config.evaluate.msvd_qa.questions=FILE.json
  --config.evaluate.msvd_qa.videos=FOLDER

Multiple choice compares log-probabilities of the letters or of the options' texts, or
reads a generated answer. It needs no judge, and can be limited to some questions:

  --config.evaluate.videomme.by="('letter', 'text', 'generation')"
  --config.evaluate.videomme.durations="('short', 'medium')"
  --config.evaluate.prompt_len=1280  # Questions with their options are long.

Object HalBench (chair) also reads COCO's annotations and a table of synonyms:

  --config.evaluate.chair.synonyms=FILE.txt
  --config.evaluate.chair.annotations="('instances_val2014.json', ...)"

Retrieval (MSVD, MSRVTT) and action recognition (UCF101, HMDB51) compare answers about
videos with CLIP's text tower:

  --config.evaluate.names="('msrvtt_retrieval', 'ucf101')"
  --config.evaluate.clip=FOLDER  # The files of openai/clip-vit-base-patch32.
  --config.evaluate.msrvtt_retrieval.questions=test_videodatainfo.json
  --config.evaluate.ucf101.questions=testlist01.txt

The judge is the SFT policy, or with --config.evaluate.judge=endpoint a server:

  --config.judge.url=URL --config.judge.model=NAME

WORKDIR/eval/NAME/POLICY/scores.json contains the scores and everything that affects
them. `python tools/compare.py benchmarks A B` compares two of these files and warns of
differences. WORKDIR/eval/results.json contains all scores. If names are added later,
the stage runs again for those without results. lmms-eval runs its own benchmarks on a
policy: docs/stages/evaluation.md.
"""

from ml_collections import ConfigDict

from configs import front, ppo
from vlmrlaif_jax.evals.benchmarks.protocol import load_benchmarks

WORLD = tuple(name for name, each in load_benchmarks().items() if each.world)


def tiny() -> ConfigDict:
  """Returns all benchmarks of the embedded world, with its exact judge."""
  return set_benchmarks(ppo.tiny(), WORLD)


def llava_7b() -> ConfigDict:
  """Returns a recipe whose benchmarks are set by flags."""
  return set_benchmarks(ppo.llava_7b(), ())


def set_benchmarks(config: ConfigDict, names: tuple[str, ...]) -> ConfigDict:
  """Converts the recipe of configs/ppo.py to these benchmarks."""
  config.recipe = "benchmarks"
  config.evaluate.names = names
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
