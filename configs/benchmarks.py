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

from configs import front, ppo
from vlmrlaif_jax.data.world import language
from vlmrlaif_jax.evals.benchmarks.protocol import all_benchmarks
from vlmrlaif_jax.stages.evaluation import benchmarks

STAGES = ("sft_short", "sft_long", "label", "rm", "ppo", "benchmarks")
WORLD = tuple(name for name, each in all_benchmarks().items() if each.world)


def tiny() -> ConfigDict:
  """Returns all benchmarks that the embedded world has, with its exact judge."""
  return ending(
    ppo.tiny(),
    names=WORLD,
    judge="exact",
    judge_prompt_len=768,
    judge_max_new=32,
    likeness="statements",
    prompt_len=160,
    multiple_choice=dict(by=("letter", "text", "generation")),
    # In words that the small policies know.
    retrieval=dict(question=language.HAPPENS),
    action=dict(question=language.HAPPENS),
  )


def llava_7b() -> ConfigDict:
  """Returns benchmarks of files that are given, sampled as VLM-RLAIF's scripts do."""
  return ending(
    ppo.llava_7b(), temperature=0.2, judge_prompt_len=2048, judge_max_new=64
  )


def ending(config: ConfigDict, **values) -> ConfigDict:
  """Returns the recipe of configs/ppo.py with benchmarks in place of the evaluation."""
  config.update(recipe="benchmarks", stages=STAGES)
  del config.evaluate
  config.benchmarks = front.section(benchmarks.default_config(), **values)
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
