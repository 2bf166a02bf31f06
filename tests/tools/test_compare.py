"""tools/compare.py: two ways to score or to label, two results, several seeds."""

import pathlib
import subprocess
import sys

import pytest

from tests.helpers.made_run import stat, write_json, write_lines
from tools import comparisons

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = {"frames": 50, "judge": {"name": "endpoint", "version": "m-1"}}


def cells(table):
  """The cells of each line of a Markdown table, but for the line below its head."""
  head, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
  return [[c.strip() for c in line.split("|")[1:-1]] for line in (head, *lines)]


def program(*given):
  command = [sys.executable, ROOT / "tools" / "compare.py", *given]
  return subprocess.run(command, capture_output=True, text=True, check=False)


# Scores of claims.


def write_claims(root, *prompts):
  asked = [
    {"id": f"p-{i}-0", "truth": {"kind": kind}} for i, (kind, *_) in enumerate(prompts)
  ]
  rows = [
    {
      "id": f"p-{i}-0",
      "answers": list(answers),
      "scores": scores,
      "mistakes": mistakes,
      "unsupported": [max(m - 1, 0) for m in mistakes],
    }
    for i, (_, answers, scores, mistakes) in enumerate(prompts)
  ]
  write_lines(root / "world" / "prompts.jsonl", asked)
  write_lines(root / "claims_1" / "answers.jsonl", [{"fingerprint": "x"}, *rows])
  return root


@pytest.fixture
def scored(tmp_path):
  first = write_claims(
    tmp_path / "a",
    ("description", "xyz", [0, -1, -2], [0, 1, 2]),
    ("motion", "xy", [0, -1], [1, 0]),
  )
  second = write_claims(
    tmp_path / "b",
    ("description", "xyz", [-1, 0, None], [0, 1, 2]),
    ("motion", "xy", [-1, 0], [1, 0]),
  )
  return first, second


def test_claims_are_compared_on_pairs_that_scores_and_truth_order(scored):
  _, *lines = cells(comparisons.compare_claims([scored], "claims_1"))
  found = {tuple(line[:2]): line[2:] for line in lines}
  first, second, change = found["descriptions", "mistakes"]
  assert first.startswith("100.0 %") and first.endswith("of 3")
  assert second.startswith("0.0 %") and second.endswith("of 1")
  assert change.startswith("+100.0")
  # x and y say nothing wrong; only z does, and of that B has no score.
  assert found["descriptions", "unsupported"][0] == "too few pairs"
  first, second, _ = found["short answers", "mistakes"]
  assert first.startswith("0.0 %") and second.startswith("100.0 %")


def test_claims_about_other_answers_are_refused(scored, tmp_path):
  other = write_claims(tmp_path / "c", ("motion", "xw", [0, 0], [1, 0]))
  with pytest.raises(ValueError, match="answers"):
    comparisons.compare_claims([(scored[0], other)], "claims_1")


def test_workdir_without_claims_is_named(scored, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none/claims_1/answers\.jsonl"):
    comparisons.compare_claims([(scored[0], tmp_path / "none")], "claims_1")


# Labels.


def write_labels(root, *rows):
  write_lines(
    root / "label" / "blocks" / "block_00000.jsonl",
    [
      {"id": f"p-{i}-0", "preference": preference, "mistakes": mistakes}
      for i, (preference, mistakes) in enumerate(rows)
    ],
  )
  return root


@pytest.fixture
def labelled(tmp_path):
  first = [(1, [0, 1]), (2, [1, 0]), (None, [0, 1]), (1, [1, 1])]
  second = [(1, [0, 1]), (1, [1, 0]), (1, [0, 1]), (None, [1, 1])]
  return write_labels(tmp_path / "a", *first), write_labels(tmp_path / "b", *second)


def test_labels_are_compared_on_kept_pairs_of_which_truth_prefers_one(labelled):
  (_, first, second, change) = cells(comparisons.compare_labels([labelled]))[1]
  assert first.startswith("100.0 %") and first.endswith("of 2")
  assert second.startswith("66.7 %") and second.endswith("of 3")
  assert change.startswith("+33.3")


def test_labels_of_other_prompts_are_refused(labelled, tmp_path):
  other = write_labels(tmp_path / "c", (1, [0, 1]))
  with pytest.raises(ValueError, match="id"):
    comparisons.compare_labels([(labelled[0], other)])


def test_workdir_without_labels_is_named(labelled, tmp_path):
  with pytest.raises(FileNotFoundError, match="none"):
    comparisons.compare_labels([(labelled[0], tmp_path / "none")])


# Benchmarks.


def write_benchmark(root, mean, recipe=RECIPE):
  rows = [(f"{root.name}{i}" if i == 3 else f"{i}", mean + i) for i in range(4)]
  write_lines(
    root / "rows.jsonl",
    [{"id": id, "video": id, "values": {"detail": value}} for id, value in rows],
  )
  scores = {"detail": stat(mean, 1, 7)}
  told = {"scores": scores, "counts": {"unparsed": 2}, "recipe": recipe}
  write_json(root / "scores.json", told)
  return root


@pytest.fixture
def results(tmp_path):
  return write_benchmark(tmp_path / "a", 2.5), write_benchmark(tmp_path / "b", 3.0)


def test_benchmarks_have_scores_and_counts_in_columns(results):
  head, detail, unparsed = cells(comparisons.compare_benchmarks(*results))
  assert head[-1] == "B - A"
  assert detail[0] == "detail"
  assert detail[1].startswith("2.500") and detail[2].startswith("3.000")
  assert unparsed == ["unparsed", "2", "2", ""]


def test_difference_of_benchmarks_is_over_the_cases_that_both_have(results):
  detail = cells(comparisons.compare_benchmarks(*results))[1]
  assert detail[-1] == "+0.500 [+0.500, +0.500] of 3"


def test_difference_of_ratios_is_of_their_sums(results):
  rows = ([(1.0, 1), (0.0, 3)], [(0.5, 2), (0.0, 0)])
  for root, each in zip(results, rows, strict=True):
    write_lines(
      root / "rows.jsonl",
      [
        {
          "id": i,
          "video": str(i),
          "values": {"detail": value},
          "weights": {"detail": weight},
        }
        for i, (value, weight) in enumerate(each)
      ],
    )
  assert cells(comparisons.compare_benchmarks(*results))[1][-1].startswith("+0.250")


def test_settings_that_differ_between_benchmarks_are_named(results, tmp_path):
  judge = {"name": "endpoint", "version": "m-2", "max_tokens": 9}
  other = write_benchmark(tmp_path / "c", 3.0, {"frames": 8, "judge": judge})
  text = comparisons.compare_benchmarks(results[0], other)
  warned = [line.split()[1] for line in text.splitlines() if "warning" in line]
  assert warned == ["frames", "judge.version", "judge.max_tokens"]


def test_missing_benchmark_is_named(results, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none has no scores\.json"):
    comparisons.compare_benchmarks(results[0], tmp_path / "none")


# Seeds.


def policy(accuracy, words):
  return {
    "accuracy": stat(accuracy, 0.1),
    "false_premise.accuracy": stat(accuracy, 0.1),
    "hallucination": stat(0.25, 0.1),
    "words": stat(words, 0.1),
  }


def write_evaluation(root, **policies):
  held_out = {
    "policies": policies,
    "pair": list(policies)[:2],
    "questions": 9,
    "videos": 3,
    "difference": {"accuracy": stat(0.125, 0.1)},
  }
  write_json(root / "eval" / "results.json", {"held_out": held_out})
  return root


def test_seeds_share_a_row_with_their_mean_and_each(tmp_path):
  first = write_evaluation(tmp_path / "a", sft=policy(0.5, 4), dpo_1=policy(0.75, 3))
  second = write_evaluation(tmp_path / "b", sft=policy(0.25, 5), dpo_1=policy(0.5, 2))
  _, sft, dpo = cells(comparisons.summarize_seeds([first, second]))
  # The mean over kinds was not measured.
  assert sft[:4] == ["sft", "", "37.5 (50.0, 25.0)", "37.5 (50.0, 25.0)"]
  assert dpo[:3] == ["dpo_1", "", "62.5 (75.0, 50.0)"]
  assert dpo[-3:] == ["", "", "2.5 (3.0, 2.0)"]  # The others were not measured.


def test_policies_that_a_seed_lacks_are_left_out(tmp_path):
  first = write_evaluation(tmp_path / "a", sft=policy(0.5, 4), dpo_1=policy(0.75, 3))
  second = write_evaluation(tmp_path / "b", sft=policy(0.25, 5))
  assert "dpo_1" not in comparisons.summarize_seeds([first, second])


def test_each_seed_has_a_table(tmp_path):
  policies = dict(sft=policy(0.5, 4), dpo=policy(0.75, 3))
  roots = [write_evaluation(tmp_path / name, **policies) for name in "ab"]
  text = comparisons.make_seed_tables(roots)
  assert text.count("9 questions, 3 videos") == 2
  right = cells(text)[1]
  assert right[:3] == ["correct answers", "50.0 [40.0, 60.0]", "75.0 [65.0, 85.0]"]
  assert right[3].startswith("+12.5")


def test_unfinished_evaluation_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"results\.json"):
    comparisons.summarize_seeds([tmp_path])


# The program.


def test_help_shows_each_subcommand():
  text = program("--help").stdout
  names = ("claims", "labels", "benchmarks", "seeds")
  assert all(f"compare.py {name} " in text for name in names)


@pytest.mark.parametrize(
  ("given", "named"),
  [
    ((), "claims, labels, benchmarks, seeds"),
    (("else",), "'else'"),
    (("labels", "a"), "A:B"),
    (("benchmarks", "a"), "two folders"),
    (("labels", "a:b", "--each"), "--each"),
  ],
)
def test_wrong_arguments_are_named_with_the_usage(given, named):
  ended = program(*given)
  assert ended.returncode == 1
  assert named in ended.stdout + ended.stderr


def test_program_prints_a_table(labelled):
  ended = program("labels", ":".join(map(str, labelled)))
  assert ended.returncode == 0 and cells(ended.stdout)[0][1:] == ["A", "B", "A - B"]


def test_program_ends_with_an_error_that_names_what_is_missing(tmp_path):
  ended = program("seeds", "--each", str(tmp_path / "none"))
  assert ended.returncode == 1 and "none/eval/results.json" in ended.stderr


# Plans.


def test_plans_differ_in_the_figures_that_are_named(tmp_path):
  for side, seconds in (("a", 2.0), ("b", 2.5)):
    rows = [{"stage": "ppo", "functions": [{"function": "update", "seconds": seconds}]}]
    write_json(tmp_path / side / "estimates" / "ppo_v5e-16.json", rows)
  equal = comparisons.compare_plans(tmp_path / "a", tmp_path / "a")
  assert equal == "1 plans, 0 figures differ."
  _, (plan, figure, *values) = cells(
    comparisons.compare_plans(tmp_path / "a", tmp_path / "b")
  )
  assert plan == "estimates/ppo_v5e-16"
  assert figure == "0.functions.0.seconds" and values == ["2.0", "2.5"]


def test_plans_that_one_folder_lacks_are_an_error(tmp_path):
  write_json(tmp_path / "a" / "ppo.json", [])
  write_json(tmp_path / "b" / "dpo.json", [])
  with pytest.raises(ValueError, match="dpo, ppo"):
    comparisons.compare_plans(tmp_path / "a", tmp_path / "b")
  (tmp_path / "none").mkdir()
  done = program("plans", tmp_path / "a", tmp_path / "none")
  assert done.returncode == 1 and str(tmp_path / "none") in done.stderr
