import pytest

from perf import model
from perf import shared_prefix as bench


def test_each_case_is_timed_in_both_forms(tmp_path):
  size = model.SIZES["tiny"]
  size = size._replace(llm={**size.llm, "embed": 64, "layers": 1})
  asked = model.Bench("small", size, "none", 2, "", tmp_path)
  case = bench.Case(prompts=1, group=2, prompt_len=30, response_len=3)
  rows = list(bench.measure(asked, [case], repeats=1))
  assert [row.case for row in rows] == [case]
  assert rows[0].plain > 0 and rows[0].shared > 0


def test_table_tells_how_many_times_faster():
  made = bench.format_table([bench.Timed(bench.Case(2, 8, 64, 32), 3.0, 1.5)])
  assert made.splitlines()[-1] == "| 2 | 8 | 64 | 32 | 3 | 1.5 | 2.00 |"


def test_prompts_too_short_for_their_video_are_refused():
  with pytest.raises(ValueError, match="--lengths must be over 28 tokens.*got 20"):
    bench.make_rollout(model.SIZES["tiny"], bench.Case(1, 2, 20, 3))
