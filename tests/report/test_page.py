"""The page: what is on it, what it says is missing, that it needs nothing else."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from tests.helpers.made_run import (
  ATTACK,
  answer,
  write_facts,
  write_json,
  write_lines,
  write_run,
)
from vlmrlaif_jax.report.files import list_report_stages
from vlmrlaif_jax.report.page import write_report
from vlmrlaif_jax.report.stages import summarize_phases
from vlmrlaif_jax.report.tables import collect_label_rates


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("report") / "tiny")


@pytest.fixture(scope="module")
def page(run):
  return write_report(run).read_text()


class Reader(HTMLParser):
  """Collects tags, texts and scripts, and checks that what is opened is closed."""

  VOID = {"meta", "link", "img", "input", "br"}
  DRAWN = {"path", "circle", "polyline"}

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.text = [], [], ""
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    assert tag in self.DRAWN, f"<{tag}/> is not closed in HTML"
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data + " "

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def words(page):
  return " ".join(Reader(page).text.split())


def shown(page):
  """What the sample viewer is given."""
  _, begin, rest = page.partition('<script type="application/json" id="data">')
  assert begin
  return json.loads(rest[: rest.index("</script>")])


def source(page, name):
  return next(each for each in shown(page)["sources"] if each["name"] == name)


def test_every_tag_is_closed(page):
  assert Reader(page).open == []


def test_page_names_no_other_place(page):
  assert re.findall(r"https?://|url\(|@import|\bfetch\(", page) == []


def test_every_source_is_inside_the_page(page):
  reader = Reader(page)
  clips = [clip["uri"] for clip in shown(page)["clips"]]
  assert len(clips) == 6
  assert all(clip.startswith("data:image/webp;base64,") for clip in clips)
  assert [x["href"] for x in reader.all("link")] == ["data:,"]
  assert not any("src" in attrs for _, attrs in reader.tags)


def test_page_is_small(run, page):
  assert (run / "report.html").stat().st_size < 2_000_000


def test_answers_are_escaped(page):
  assert ATTACK not in page
  texts = [a["text"] for g in source(page, "eval")["groups"] for a in g["answers"]]
  assert ATTACK in texts
  assert "&lt;/script&gt;&lt;script&gt;alert(&#39;x&#39;)" in page  # In the layouts.


def test_nothing_is_missing_from_a_whole_run(page):
  assert "Missing from this run" not in page


@pytest.mark.parametrize(
  "text",
  [
    "PPO 78.1 % [75.4, 80.8], SFT 69.5 % [66.8, 72.2]. Difference: +8.6 points",
    "+8.6 points [+5.9, +11.3], better.",
    "−4.3 [−6.0, −2.6]",  # Hallucination.
    "10 corrected 10 broken 10 right both times 10 wrong both times",
    "The judge compared 2,000 pairs of answers.",
    "83.2 % of its decisions agree with exact truth",
    "310 tie (15.5 %)",
    "84.8 % agreement between the two orders",
    "55.0 % of choices are for the first answer",
    "8.2 words in a chosen answer, 6.5 in a rejected one",
    "pretrain_see 20m03s",
    "36m31s in total",
    '"kl_coef": 0.0625',
    "policy llava: original LLaVA; 0.01 GB reward_model x: </script>",
  ],
)
def test_page_says(page, text):
  assert text in words(page)


def test_clearly_better_values_are_marked(page):
  best = re.findall(r'<td class="num best">\s*<span>([^<]*)</span>', page)
  assert best == ["78.1 %", "20.9 %"]


def test_curves_of_interest_come_first_and_the_rest_is_folded(page):
  titles = re.findall(r"<b>([a-z_ ]+)</b>", page[page.index('id="stage-ppo"') :])
  assert titles[:5] == [
    "judge and truth",
    "reward",
    "kl",
    "response_length",
    "clip_fraction",
  ]
  folded = page[page.index("more charts of ppo</summary>") :]
  assert re.findall(r"<b>([a-z_]+)</b>", folded)[:2] == ["lr", "policy_loss"]


def test_empty_run_says_what_is_missing(tmp_path):
  said = words(write_report(tmp_path).read_text())
  assert "No verdict yet: the evaluation has not finished." in said
  assert "Missing from this run: 1 config.json: " in said


def test_stages_of_the_config_that_have_not_run_are_missing(tmp_path):
  write_json(tmp_path / "config.json", {"stages": ["sft_long", "mine_2", "grpo"]})
  for name in ("sft_long", "grpo"):
    write_json(tmp_path / name / "done.json", {"seconds": 1.0, "summary": {}})
  write_facts(tmp_path, "grpo", has_rollouts=True)
  said = words(write_report(tmp_path).read_text())
  assert "Missing from this run: 2 mine_2: has not run grpo/samples: " in said


def test_running_stage_is_shown_with_what_it_has(tmp_path):
  write_json(tmp_path / "config.json", {"stages": ["sft_short"]})
  write_facts(tmp_path, "sft_short", "Supervised fine-tuning (SFT): short answers")
  rows = [{"step": step, "time": 0.0, "loss": 1 / step} for step in range(1, 5)]
  write_lines(tmp_path / "sft_short/metrics.jsonl", rows)
  with open(tmp_path / "sft_short/metrics.jsonl", "a") as file:
    file.write('{"step": 5, "lo')
  said = words(write_report(tmp_path).read_text())
  assert "sft_short: has not finished (no sft_short/done.json)" in said
  assert "Supervised fine-tuning (SFT): short answers 4 steps" in said


def test_unreadable_video_has_the_reason_in_its_place(tmp_path):
  (tmp_path / "broken.mp4").write_bytes(b"this is no video")
  write_facts(tmp_path, "eval")
  rows = [answer(0) | {"video": str(tmp_path / "broken.mp4")}, answer(1)]
  write_lines(tmp_path / "eval/answers.jsonl", rows)
  first, second = shown(write_report(tmp_path).read_text())["clips"]
  assert first["error"].startswith(f"{tmp_path}/broken.mp4: ")
  assert second["error"] == "no such file: v1.mp4"


def test_broken_json_is_named_and_left_out(tmp_path, capsys):
  write_facts(tmp_path, "eval")
  (tmp_path / "eval/results.json").write_text('{"policies"')
  assert write_report(tmp_path).exists()
  assert "eval/results.json is not JSON" in capsys.readouterr().out


def test_workdir_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    write_report(tmp_path / "nowhere")


def test_page_of_one_stage_tells_of_it_alone(run):
  page = write_report(run, stage="ppo").read_text()
  assert [each["name"] for each in shown(page)["sources"]] == ["ppo"]
  assert 'id="stage-ppo"' in page and 'id="stage-rm"' not in page
  assert 'id="result"' not in page and 'id="labels"' not in page
  assert (run / "ppo/report.html").read_text() == page


def test_stage_that_is_not_there_is_named_with_those_that_are(run):
  with pytest.raises(FileNotFoundError, match="no stage 'dpo': it has .*rm, ppo, eval"):
    write_report(run, stage="dpo")


# Alarms.


def alarm(step, name="length drift", message="it grows"):
  return {"step": step, "name": name, "message": message, "remedy": "Stop it."}


def with_alarms(folder, *alarms):
  rows = [{"step": t, "time": 0.0, "reward": t, "kl": t / 9} for t in range(1, 11)]
  write_lines(folder / "ppo/metrics.jsonl", rows)
  write_lines(folder / "ppo/alarms.jsonl", alarms)
  return write_report(folder).read_text()


def test_alarms_stand_before_the_curves_with_their_remedy(tmp_path):
  alarms = [alarm(4), alarm(6, "kl", "it leaps"), alarm(9, message="it grew")]
  page = with_alarms(tmp_path, *alarms)
  part = page[page.index('id="stage-ppo"') : page.index('class="charts"')]
  told = " ".join(re.sub(r"<[^>]*>", "", part).split())
  assert "length drift, 2 times from step 4 to 9: it grew Stop it." in told
  assert "kl, step 6: it leaps Stop it." in told


def test_alarms_are_marked_on_every_curve(tmp_path):
  page = with_alarms(tmp_path, alarm(4), alarm(4, "kl"), alarm(99))
  assert page.count("<title>step 4: length drift, kl</title>") == 2  # reward and kl
  assert "step 99" not in page[page.index('class="charts"') : page.index('id="time"')]


def test_stage_without_alarms_says_nothing_of_them(page):
  assert 'class="alarms"' not in page and 'class="alarm"' not in page


# Labels and stages.


def test_stages_stand_as_they_started_with_measurements_last(tmp_path):
  names = ["sft_long", "claims_2", "dpo_2", "claims_10", "dpo_10"]
  write_facts(tmp_path, "eval", started=1.0, is_measurement=True)
  for start, name in enumerate(names, 2):
    write_facts(tmp_path, name, started=start)
  (tmp_path / "world").mkdir()
  assert list_report_stages(tmp_path) == [*names, "eval"]


def test_a_stage_is_known_by_any_of_the_files_that_all_stages_write(tmp_path):
  write_lines(tmp_path / "b/metrics.jsonl", [])
  write_json(tmp_path / "a/done.json", {"seconds": 1.0, "summary": {}})
  assert list_report_stages(tmp_path) == ["a", "b"]
  assert '<h3 id="stage-a">a ' in write_report(tmp_path).read_text()


def test_claims_of_each_round_stand_among_the_labels(tmp_path):
  rates = {
    "prompts": 6, "answers_scored": 30, "answers_no_claims": 10, "claims": 90,
    "claims_denied": 0.25, "truth_agreement": 0.8, "rho": None,
  }  # fmt: skip
  for name in ("claims_1", "claims_2"):
    write_facts(tmp_path, name, f"Claims, round {name[-1]}")
    write_json(tmp_path / name / "rates.json", rates)
    rates["claims"] = 70
  first, second = collect_label_rates(tmp_path, ["claims_1", "claims_2"])
  assert first["title"] == "Claims, round 1" and second["title"] == "Claims, round 2"
  assert second["outcomes"] == {"scored": 30, "no claims": 10}
  assert second["others"] == {"prompts": 6}
  said = words(write_report(tmp_path).read_text())
  assert "40 answers, 90 claims." in said and "40 answers, 70 claims." in said
  assert "80.0 % of the preference pairs agree with exact truth" in said
  assert "30 scored (75.0 %) 10 no claims (25.0 %)" in said
  assert "25.0 % of the claims are denied" in said


def test_phases_leave_out_the_step_that_compiles():
  rows = [
    {"step": 1, "phases": {"sample": 90.0, "idle": 10.0}},
    {"step": 2},
    {"step": 3, "phases": {"sample": 1.0, "update": 3.0, "save": 0.001}},
    {"step": 4, "phases": {"sample": 1.0, "idle": 5.0}},
  ]
  found = summarize_phases(rows)
  assert [(row["name"], row["seconds"]) for row in found] == [
    ("idle", 5.0),
    ("update", 3.0),
    ("sample", 2.0),
  ]
  assert found[2]["share"] == pytest.approx(0.2, abs=1e-3)


def test_page_shows_the_phases_of_a_stage(tmp_path):
  rows = [{"step": 1, "time": 0.0, "phases": {"sample": 6.0, "score": 2.0}}]
  write_lines(tmp_path / "ppo/metrics.jsonl", rows)
  page = write_report(tmp_path).read_text()
  time = page[page.index('id="time"') : page.index('id="config"')]
  assert re.search(r"sample</td><td.*?>6</td><td.*?>75 %", time)


def test_results_and_answers_are_found_whatever_the_stage_is_called(run, tmp_path):
  shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("world"))
  names = {"ppo": "mine", "label": "judged", "eval": "measured"}
  for old, new in names.items():
    (tmp_path / "run" / old).rename(tmp_path / "run" / new)
  page = write_report(tmp_path / "run").read_text()
  assert "PPO 78.1 % [75.4, 80.8], SFT" in words(page)
  assert "The judge compared 2,000 pairs" in page
  assert [each["name"] for each in shown(page)["sources"]] == [
    "judged",
    "mine",
    "measured",
  ]
  assert "judge and truth" in page
