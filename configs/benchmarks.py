"""Benchmarks of papers, from their own files, and what comes before them.

python launch/run.py --config=configs/benchmarks.py --workdir=runs/demo

Each policy of the workdir answers, and a judge rates. The tiny preset makes the files
of the embedded world, whose truth is exact. Those of the papers are given by where they
lie; one that is missing is told of, with where it comes from and what stands in it:

  --config=configs/benchmarks.py:7b
  --config.benchmarks.names="('videochatgpt', 'msvd_qa')"
  --config.benchmarks.videochatgpt.questions=FOLDER
  --config.benchmarks.videochatgpt.videos=FOLDER
  --config.benchmarks.msvd_qa.questions=FILE.json
  --config.benchmarks.msvd_qa.videos=FOLDER

Multiple choice is by the letters' log-probabilities and by what is said, or by those of
the options' texts, and of all questions or of some; it needs no judge:

  --config.benchmarks.videomme.by="('letter', 'text', 'generation')"
  --config.benchmarks.videomme.durations="('short', 'medium')"
  --config.benchmarks.prompt_len=1280  # Questions with their options are long.

Object HalBench (chair) reads COCO's annotations and a table of synonyms, too:

  --config.benchmarks.chair.synonyms=FILE.txt
  --config.benchmarks.chair.annotations="('instances_val2014.json', ...)"

Retrieval (MSVD, MSRVTT) and action recognition (UCF101, HMDB51) compare what is said of
videos by CLIP's text tower:

  --config.benchmarks.names="('msrvtt_retrieval', 'ucf101')"
  --config.benchmarks.clip=FOLDER  # Of openai/clip-vit-base-patch32.
  --config.benchmarks.msrvtt_retrieval.questions=test_videodatainfo.json
  --config.benchmarks.ucf101.questions=testlist01.txt

The judge is our own SFT policy, or with --config.benchmarks.judge=endpoint a server:

  --config.benchmarks.endpoint.url=URL --config.benchmarks.endpoint.model=NAME

Scores stand in WORKDIR/benchmarks/NAME/POLICY/scores.json with all that moves them;
`python tools/compare.py benchmarks A B` sets two side by side and warns of what
differs. WORKDIR/benchmarks/results.json holds all of them.
lmms-eval runs its own benchmarks on a policy: docs/stages/evaluation.md. To add a
benchmark to a workdir, remove its benchmarks/done.json and give more names: the answers
and judgements that are there are kept.
"""

from ml_collections import ConfigDict

from configs import common
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.evals.benchmarks.protocol import all_benchmarks

WORLD = tuple(name for name, each in all_benchmarks().items() if each.world)
STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "benchmarks")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("benchmarks", STAGES, preset)
  if preset == "tiny":
    world(config)
  return config


def world(config: ConfigDict) -> None:
  """All benchmarks that the embedded world has, with its exact judge."""
  config.benchmarks.update(
    names=WORLD, judge="exact", likeness="statements", prompt_len=160
  )
  config.benchmarks.multiple_choice.by = ("letter", "text", "generation")
  # In words that the small policies know.
  config.benchmarks.retrieval.question = language.HAPPENS
  config.benchmarks.action.question = language.HAPPENS
