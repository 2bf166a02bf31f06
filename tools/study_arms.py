"""The papers' tables in miniature, three seeds each: see tools/run_study.py.

python tools/run_study.py --workdir=runs/study
"""

from tools.study import Arm, Row, Score, Scores, Table

SEEDS = (0, 1, 2)

SFT = ("sft_short", "sft_long")
LABELLED = (*SFT, "label")
MEASURED = ("videochatgpt", "zero_shot_qa", "retrieval", "action")
ONLY_SFT = "stages=('sft_short','sft_long','eval')"
PPO = "stages=('sft_short','sft_long','rm','ppo','eval')"  # Labels are another arm's.
# What VLM-RLAIF calls video instructions and short QA.
INSTRUCTIONS = ("description",)
QA = ("attribute", "count", "order", "presence", "false_premise")

ARMS = (
  Arm(
    "small",
    recipe="pretrain.py:small",
    once=True,
    made="export/llava/preprocessor_config.json",
  ),
  Arm("demo", export="sft_long"),
  # Of SFT.
  Arm("sft_a", flags=(ONLY_SFT,), start="demo", kinds=INSTRUCTIONS),
  Arm("sft_ab", flags=(ONLY_SFT,), start="demo", kinds=(*INSTRUCTIONS, *QA)),
  # All records in both stages: as many steps, in no order.
  Arm("sft_mixed", flags=(ONLY_SFT, "sft.short_share=1.0"), start="demo"),
  # Of what the judge is told.
  Arm("context_none", flags=("label.context=none",), start="demo", shared=SFT),
  Arm("context_one", flags=("label.context=one",), start="demo", shared=SFT),
  # Of how many preferences there are.
  Arm("pairs_10", start="demo", shared=LABELLED, pairs=0.1),
  Arm("pairs_25", start="demo", shared=LABELLED, pairs=0.25),
  Arm("pairs_50", start="demo", shared=LABELLED, pairs=0.5),
  # Of sizes: all learn from the preferences of the demo.
  Arm(
    "small_sft",
    recipe="sft.py",
    flags=("model.path={study}/small/export/llava",),
    start="demo",
    export="sft_long",
  ),
  Arm(
    "tiny_by_small",
    flags=("model.reward_model_path={small_sft}/export",),
    start="demo",
    shared=LABELLED,
  ),
  Arm(
    "small_by_small",
    flags=(
      PPO,
      "model.path={study}/small/export/llava",
      "rm.preferences={demo}/label/preferences.jsonl",
    ),
    start="small_sft",
    shared=SFT,
  ),
  Arm(
    "small_by_tiny",
    flags=(
      PPO,
      "model.path={study}/small/export/llava",
      "model.reward_model_path={demo}/export",
      "rm.preferences={demo}/label/preferences.jsonl",
    ),
    start="small_sft",
    shared=SFT,
  ),
  # The successors.
  Arm("dpo", recipe="dpo.py", start="demo", shared=LABELLED),
  Arm(
    "grpo_rank",
    recipe="grpo_rank.py",
    flags=("grpo.batch_size=12", "grpo.steps=32"),  # About as many samples as PPO's.
    start="demo",
    shared=(*LABELLED, "rm"),
  ),
  Arm("grpo_grm", recipe="grpo_grm.py", start="demo", shared=LABELLED),
  Arm("rlaif_v", recipe="rlaif_v.py", start="demo", shared=SFT),
  # The benchmarks of papers.
  Arm(
    "bench",
    recipe="benchmarks.py",
    flags=(
      f"evaluate.names={('videochatgpt', 'zero_shot_qa', 'retrieval', 'action')}",
    ),
    start="demo",
    shared=(*LABELLED, "rm", "ppo"),
  ),
)

TABLES = (
  Table(
    "sft",
    "SFT: data and curriculum (VLM-RLAIF, table 4)",
    "mean of the five criteria",
    (
      Row("instructions", "sft_a", "sft", "2.45"),
      Row("+ short QA", "sft_ab", "sft", "-"),
      Row("+ narratives of objects, mixed", "sft_mixed", "sft", "-"),
      Row("+ narratives of objects, short ones first", "demo", "sft", "2.75"),
    ),
  ),
  Table(
    "context",
    "Context of the judge (VLM-RLAIF, table 5)",
    "mean of the five criteria",
    (
      Row("no RLAIF", "demo", "sft", "2.75"),
      Row("nothing", "context_none", "ppo", "3.21"),
      Row("one clip", "context_one", "ppo", "3.37"),
      Row("the whole narrative", "demo", "ppo", "3.49"),
    ),
  ),
  Table(
    "pairs",
    "How many preferences (VLM-RLAIF, figure 5)",
    "the more, the better, 10k to 40k",
    (
      Row("none: SFT", "demo", "sft"),
      Row("10 %", "pairs_10", "ppo"),
      Row("25 %", "pairs_25", "ppo"),
      Row("50 %", "pairs_50", "ppo"),
      Row("100 %", "demo", "ppo"),
    ),
  ),
  Table(
    "sizes",
    "Size of policy and of reward model (VLM-RLAIF, tables 7 and 8)",
    "mean of the five criteria; accuracy on MSVD-QA",
    (
      Row("tiny, SFT", "demo", "sft", "2.75; 67.2"),
      Row("tiny, reward model small", "tiny_by_small", "ppo", "3.37; 75.1"),
      Row("tiny, reward model tiny", "demo", "ppo", "3.49; 76.4"),
      Row("small, SFT", "small_by_small", "sft"),
      Row("small, reward model small", "small_by_small", "ppo"),
      Row("small, reward model tiny", "small_by_tiny", "ppo"),
    ),
  ),
  Table(
    "successors",
    "The methods compared",
    "MSVD-QA, by Oracle-RLAIF",
    (
      Row("SFT", "demo", "sft"),
      Row("VLM-RLAIF: PPO", "demo", "ppo", "68.5"),
      Row("Oracle-RLAIF: GRPO_rank", "grpo_rank", "grpo", "72.9"),
      Row("Generative RLHF-V", "grpo_grm", "grpo"),
      Row("RLAIF-V, four rounds", "rlaif_v", "dpo_4"),
      Row("DPO on the preferences", "dpo", "dpo"),
    ),
  ),
)

SCORES = (
  Scores(
    "benchmarks",
    "RLAIF against SFT, by benchmark (VLM-RLAIF, tables 1 to 3)",
    "bench",
    ("sft", "ppo"),
    (
      Score("correctness, of 5", "videochatgpt", "correctness", 1, ("2.79", "3.63")),
      Score("detail", "videochatgpt", "detail", 1, ("2.82", "3.25")),
      Score("context", "videochatgpt", "context", 1, ("3.37", "4.00")),
      Score("temporal", "videochatgpt", "temporal", 1, ("2.28", "3.23")),
      Score("consistency", "videochatgpt", "consistency", 1, ("2.49", "3.32")),
      Score("QA, correct, %", "zero_shot_qa", "accuracy", 100, ("67.2", "76.4")),
      Score("QA, score, of 5", "zero_shot_qa", "score", 1, ("-", "4.0")),
      Score("retrieval R@1, %", "retrieval", "r1", 100, ("-", "36.0")),
      Score("retrieval R@5, %", "retrieval", "r5", 100, ("-", "63.4")),
      Score("action top-1, %", "action", "top1", 100, ("-", "62.8")),
      Score("action top-5, %", "action", "top5", 100, ("-", "85.9")),
    ),
  ),
)
