"""The page: what is on it, what it says is missing, that it needs nothing else."""

import json
import math
import random
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from vlmrlaif_jax import report, report_stages
from vlmrlaif_jax.report import spread, write_report

KINDS = ("motion", "colour", "shape", "count")
ATTACK = "<script>alert('x')</script> & \"more\""


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_video(path, index, size=64):
  """A square of one colour that crosses the picture."""
  path.parent.mkdir(parents=True, exist_ok=True)
  colour = [(220, 60, 50), (40, 110, 220), (60, 170, 80), (230, 190, 40)][index % 4]
  with av.open(str(path), "w") as box:
    stream = box.add_stream("libx264", rate=8)
    stream.width = stream.height = size
    stream.pix_fmt = "yuv420p"
    for t in range(16):
      picture = np.full((size, size, 3), 235, np.uint8)
      x = round(t / 15 * size * 0.7)
      picture[size // 3 : size // 3 + size // 4, x : x + size // 4] = colour
      box.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
    box.mux(stream.encode(None))


def stat(mean, half, n=1000):
  return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def answer(index):
  """The outcomes in turn: mended, broken, right both times, wrong both times."""
  was, now = [(False, True), (True, False), (True, True), (False, False)][index % 4]
  text = "The red square moves to the right and then stops near the edge."
  return {
    "id": f"q{index}",
    "video": f"v{index % 6}.mp4",
    "kind": KINDS[index // 4 % 4],
    "question": f"Where does the square go in clip {index}?",
    "truth": "to the right",
    "sft": {"text": text, "correct": was, "unsupported": ["a blue disk"]},
    "ppo": {"text": ATTACK, "correct": now, "unsupported": []},
    "reward": {"sft": 0.25, "ppo": 0.875},
  }


def sample(step, row, draw):
  return {
    "id": f"p{row}",
    "video": f"v{row % 6}.mp4",
    "prompt": "USER: <video>\nHow does the red square move? ASSISTANT:",
    "response": f"At step {step} it moves to the right. {ATTACK}",
    "score": draw.gauss(step / 40, 0.3),
    "valid": row != 5,
    "advantage": draw.gauss(0, 1),
    "truth": None if row == 4 else draw.random() < 0.5 + step / 100,
    "has_stop": row != 3,
  }


def metrics(stage, step, draw):
  down = math.exp(-step / 40)
  row = {"step": step, "time": 1.7e9 + step, "lr": 2e-4 * down}
  if stage != "ppo":
    return row | {
      "loss": 2 * down + 0.3 + draw.gauss(0, 0.05),
      "accuracy": 1 - down,
      "grad_norm": 1 + draw.random(),
    }
  return row | {
    "reward": 1 - down + draw.gauss(0, 0.1),
    "kl": None if step == 3 else 0.05 * (1 - down) + draw.random() * 0.01,
    "policy_loss": draw.gauss(0, 0.02),
    "value_loss": down + 0.1 * draw.random(),
    "entropy": 1.5 * down + 0.5,
    "response_length": 20 + 10 * down + draw.gauss(0, 1),
    "clip_fraction": 0.1 * draw.random(),
    "grad_norm": 1 + draw.random(),
  }


def write_label_stage(root):
  rates = {"asked": 2000, "kept": 1400, "tie": 310, "order_inconsistent": 250}
  rates |= {"unparsable": 40, "truth_agreement": 0.8321, "seconds_per_pair": 0.031}
  write_json(root / "label/rates.json", rates)
  pair = {
    "video": "v0.mp4",
    "question": "What happens?",
    "output_1": {"value": "A red square moves right."},
    "output_2": {"value": "A blue disk jumps."},
    "judge_text": "The first answer names the red square. [[A]]",
    "narrative": "A red square crosses the picture from left to right.",
  }
  rows = [
    pair | {"id": str(i), "preference": 1 + i % 2, "agrees_with_truth": i % 3 > 0}
    for i in range(30)
  ]
  write_lines(root / "label/preferences.jsonl", rows)


def write_eval_stage(root):
  policies = {
    name: {
      "accuracy": stat(mean, 0.027),
      "hallucination": stat(0.6 - mean / 2, 0.02),
      "judge_score": stat(3 + mean, 0.1),
      "by_kind": {kind: stat(mean + i / 40, 0.05, 250) for i, kind in enumerate(KINDS)},
    }
    for name, mean in (("sft", 0.695), ("ppo", 0.781))
  }
  difference = {
    "accuracy": {"mean": 0.086, "low": 0.059, "high": 0.113},
    "hallucination": {"mean": -0.043, "low": -0.06, "high": -0.026},
  }
  write_json(
    root / "eval/results.json", {"policies": policies, "difference": difference}
  )
  write_lines(root / "eval/answers.jsonl", [answer(i) for i in range(40)])


def write_run(root):
  """A workdir such as a whole run leaves."""
  draw = random.Random(0)
  stages = ["pretrain_see", "sft_long", "label", "rm", "ppo", "eval"]
  config = {"seed": 7, "stages": stages, "ppo": {"kl_coef": 0.0625, "steps": 40}}
  write_json(root / "config.json", config)
  layouts = {"policy": "llava: original LLaVA; 0.01 GB", "scorer": f"x: {ATTACK}"}
  write_json(root / "checkpoints.json", layouts)
  for index in range(6):
    write_video(root / f"world/videos/v{index}.mp4", index)
  seconds = {"pretrain_see": 1203.4, "sft_long": 87.0, "label": 140.0, "rm": 95.5}
  for stage, time in {**seconds, "ppo": 610.0, "eval": 55.0}.items():
    write_json(root / stage / "done.json", {"seconds": time, "summary": {"rows": 512}})
  for stage, steps in {
    "pretrain_see": 400,
    "sft_long": 60,
    "rm": 50,
    "ppo": 40,
  }.items():
    rows = [metrics(stage, step, draw) for step in range(1, steps + 1)]
    write_lines(root / stage / "metrics.jsonl", rows)
  for step in range(0, 41, 5):
    rows = [sample(step, row, draw) for row in range(8)]
    write_lines(root / f"ppo/samples/step_{step}.jsonl", rows)
  write_label_stage(root)
  write_eval_stage(root)
  return root


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


def test_every_tag_is_closed(page):
  assert Reader(page).open == []


def test_page_names_no_other_place(page):
  assert re.findall(r"https?://|url\(|@import", page) == []


def test_every_source_is_inside_the_page(page):
  reader = Reader(page)
  sources = [x["src"] for x in reader.all("img")]
  assert len(sources) > 90
  assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
  assert [x["href"] for x in reader.all("link")] == ["data:,"]
  assert reader.all("script") == [{}]


def test_page_is_small(run, page):
  assert (run / "report.html").stat().st_size < 2_000_000


def test_answers_are_escaped(page):
  assert ATTACK not in page
  assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp;" in page
  assert ATTACK in words(page)


def test_nothing_is_missing_from_a_whole_run(page):
  assert "Missing from this run" not in page


@pytest.mark.parametrize(
  "text",
  [
    "PPO 78.1 % [75.4, 80.8] against SFT 69.5 % [66.8, 72.2] correct on held-out truth",
    "+8.6 points [+5.9, +11.3], better.",
    "−4.3 [−6.0, −2.6]",  # Hallucination.
    "from SFT to PPO: 10 mended 10 broken 10 right both times 10 wrong both times",
    "The judge was shown 2,000 pairs of answers.",
    "it agreed with exact truth 83.2 % of the time",
    "310 tie (15.5 %)",
    "0.031 seconds per pair",
    "pretrain_see 20m03s",
    "36m31s of work",
    "reward 0.875",
    "Not in the video: a blue disk",
    "It was told: A red square crosses",
    "not valid: left out of the loss",
    "cut off",
    '"kl_coef": 0.0625',
    "Truth: to the right",
    "policy llava: original LLaVA; 0.01 GB scorer x: <script>",
  ],
)
def test_page_says(page, text):
  assert text in words(page)


def test_clearly_better_values_are_marked(page):
  best = re.findall(r'<td class="num best">\s*<span>([^<]*)</span>', page)
  assert best == ["78.1 %", "20.9 %"]


def test_a_dozen_videos_are_shown_in_eight_frames(page):
  assert page.count('class="strip n8"') == 12


def test_examples_are_of_every_outcome(page):
  outcomes = re.findall(r"(?:motion|colour|shape|count) · ([a-z ]+)<", page)
  assert {name: outcomes.count(name) for name in outcomes} == {
    "mended": 4,
    "broken": 4,
    "right both times": 2,
    "wrong both times": 2,
  }


def test_slider_has_a_place_for_each_step(page):
  reader = Reader(page)
  steps = [x["data-step"] for x in reader.all("div") if "data-step" in x]
  assert steps == [str(step) for step in range(0, 41, 5)]
  assert [x["max"] for x in reader.all("input")] == ["8"]


def test_curves_of_interest_come_first_and_the_rest_is_folded(page):
  titles = re.findall(r"<b>([a-z_ ]+)</b>", page[page.index("<h3>PPO") :])
  assert titles[:2] == ["judge and truth", "reward"]
  folded = page[page.index("more of ppo</summary>") :]
  assert re.findall(r"<b>([a-z_]+)</b>", folded)[:3] == [
    "lr",
    "clip_fraction",
    "grad_norm",
  ]


def test_empty_run_says_what_is_missing(tmp_path):
  said = words(write_report(tmp_path).read_text())
  assert "No verdict yet: the evaluation has not finished." in said
  for stage in ("pretrain_see", "sft_short", "label", "rm", "ppo", "eval"):
    assert f"{stage}: has not run" in said
  assert "config.json: no such file (the config)" in said


def test_stage_without_its_files_says_which(tmp_path):
  for name in ("label", "ppo", "eval"):
    write_json(tmp_path / name / "done.json", {"seconds": 1.0, "summary": {}})
  said = words(write_report(tmp_path).read_text())
  names = ("rates.json", "preferences.jsonl", "results.json", "answers.jsonl")
  stages = ("label", "label", "eval", "eval")
  for stage, name in zip(stages, names, strict=True):
    assert f"{stage}/{name}: no such file" in said
  assert "ppo/samples: no such file" in said


def test_running_stage_is_shown_with_what_it_has(tmp_path):
  rows = [{"step": step, "time": 0.0, "loss": 1 / step} for step in range(1, 5)]
  write_lines(tmp_path / "sft_short/metrics.jsonl", rows)
  with open(tmp_path / "sft_short/metrics.jsonl", "a") as file:
    file.write('{"step": 5, "lo')
  said = words(write_report(tmp_path).read_text())
  assert "sft_short: has not finished (no sft_short/done.json)" in said
  assert "Supervised fine-tuning (SFT): short answers 4 steps" in said


def test_unreadable_video_is_a_grey_box_with_the_reason(tmp_path):
  (tmp_path / "broken.mp4").write_bytes(b"this is no video")
  rows = [answer(0) | {"video": str(tmp_path / "broken.mp4")}, answer(1)]
  write_lines(tmp_path / "eval/answers.jsonl", rows)
  page = write_report(tmp_path).read_text()
  first, second = re.findall(r'<div class="strip none">([^<]*)</div>', page)
  assert first.startswith(f"{tmp_path}/broken.mp4: ")
  assert second == "no such file: v1.mp4"


def test_broken_json_names_the_file(tmp_path):
  (tmp_path / "eval").mkdir()
  (tmp_path / "eval/results.json").write_text('{"policies"')
  with pytest.raises(ValueError, match=r"eval/results.json is not JSON"):
    write_report(tmp_path)


def test_workdir_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    write_report(tmp_path / "nowhere")


def test_spread_takes_from_each_kind_in_turn():
  rows = [{"kind": kind} for kind in "aaabbc"]
  assert [row["kind"] for row in spread(rows, "kind", 5)] == list("abcab")


def test_rounds_stand_in_order_with_their_titles(tmp_path):
  for name in ("dpo_10", "claims_2", "dpo_2", "claims_10", "sft_long", "eval", "world"):
    (tmp_path / name).mkdir()
  names = report_stages.stages_there(tmp_path)
  assert names == ["sft_long", "claims_2", "dpo_2", "claims_10", "dpo_10", "eval"]
  assert report_stages.title("dpo_10") == "DPO, round 10"
  assert report_stages.title("sft_long") == report_stages.STAGES["sft_long"]


def test_claims_of_the_last_round_stand_for_labels(tmp_path):
  rates = {
    "prompts": 6, "answers_scored": 30, "answers_no_claims": 10, "claims": 90,
    "claims_denied": 0.25, "truth_agreement": 0.8, "rho": None,
  }  # fmt: skip
  for name in ("claims_1", "claims_2"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "rates.json").write_text(json.dumps(rates))
    rates["claims"] = 70
  made = report.labels_view(tmp_path)
  assert made["told"].endswith("round 2: 40 answers, 70 claims.")
  assert [part["share"] for part in made["parts"]] == [0.75, 0.25]
  page = write_report(tmp_path).read_text()
  assert "round 2: 40 answers" in page and "80.0 % of the time" in page


def test_phases_leave_out_the_step_that_compiles():
  rows = [
    {"step": 1, "phases": {"sample": 90.0, "idle": 10.0}},
    {"step": 2},
    {"step": 3, "phases": {"sample": 1.0, "update": 3.0, "save": 0.001}},
    {"step": 4, "phases": {"sample": 1.0, "idle": 5.0}},
  ]
  found = report_stages.phases_of(rows)
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
  time = page[page.index('id="time"') : page.index('id="videos"')]
  assert re.search(r"sample</td><td.*?>6</td><td.*?>75 %", time)
