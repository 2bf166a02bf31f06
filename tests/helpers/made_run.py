"""A workdir such as a whole run leaves, made up: for tests of what reads one."""

import json
import math
import random

import av
import numpy as np

KINDS = ("motion", "colour", "shape", "count")
TITLES = {  # Titles of the stages, in the order they start.
  "pretrain_see": "Pretraining: to see clips",
  "sft_long": "Supervised fine-tuning (SFT): long answers",
  "label": "Preference labels by the AI judge",
  "rm": "Reward model",
  "ppo": "PPO",
  "eval": "Evaluation",
}
ATTACK = "</script><script>alert('x')</script> & \"more\""


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_facts(root, name, title=None, *, started=0.0, **flags):
  """Writes stage.json, as a stage does when it starts."""
  facts = {"title": title or name, "started": started, **flags}
  write_json(root / name / "stage.json", facts)


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
  """The outcomes in turn: corrected, broken, right both times, wrong both times."""
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
  """Of a step: two prompts with three answers, and four with one."""
  prompt = max(row // 3, row - 4)
  score = draw.gauss(step / 40, 0.3)
  return {
    "id": f"p{prompt}" if prompt < 2 else f"p{prompt}-{step}",
    "video": f"v{prompt % 6}.mp4",
    "kind": KINDS[prompt % 4],
    "prompt": f"How does square {prompt} move?",
    "response": f"At step {step} it moves to side {row % 3}. {ATTACK}",
    "score": score,
    "terms": {"reward model": score + 1, "no end": -1.0} if row == 3 else {},
    "raw_terms": {"reward model": score + 1, "no end": 0.5} if row == 3 else {},
    "kl": 0.01 * step,
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
    "truth": 0.5 + step / 100,
    "kl": None if step == 3 else 0.05 * (1 - down) + draw.random() * 0.01,
    "policy_loss": draw.gauss(0, 0.02),
    "value_loss": down + 0.1 * draw.random(),
    "entropy": 1.5 * down + 0.5,
    "response_length": 20 + 10 * down + draw.gauss(0, 1),
    "clip_fraction": 0.1 * draw.random(),
    "grad_norm": 1 + draw.random(),
  }


def block_row(index):
  outcome = ("kept", "order_inconsistent", "tie", "identical")[index % 4]
  said = ["Output A is better.", "Output B is better."]
  return {
    "id": f"l{index}",
    "video": "v0.mp4",
    "question": "What happens?",
    "outcome": outcome,
    "preference": 1 if outcome == "kept" else None,
    "outputs": ["A red square moves right.", "A blue disk jumps."],
    "stopped": [True, index != 4],
    "verdicts": said if outcome != "identical" else [],
    "choices": ["A", "B"] if outcome != "identical" else [],
    "narrative": "A red square crosses the picture from left to right.",
    "mistakes": [0, 2],
  }


def write_label_stage(root):
  rates = {"asked": 2000, "kept": 1400, "tie": 310, "order_inconsistent": 250}
  rates |= {"unparsable": 40, "truth_agreement": 0.8321, "first_chosen": 0.55}
  rates |= {"chosen_words": 8.25, "rejected_words": 6.5}
  write_json(root / "label/rates.json", rates)
  write_lines(root / "label/blocks/block_00000.jsonl", map(block_row, range(40)))


def write_eval_stage(root):
  policies = {
    name: {
      "accuracy": stat(mean, 0.027),
      "hallucination": stat(0.6 - mean / 2, 0.02),
      "judge_score": stat(3 + mean, 0.1),
      **{
        f"{kind}.accuracy": stat(mean + i / 40, 0.05, 250)
        for i, kind in enumerate(KINDS)
      },
    }
    for name, mean in (("sft", 0.695), ("ppo", 0.781))
  }
  difference = {
    "accuracy": {"mean": 0.086, "low": 0.059, "high": 0.113},
    "hallucination": {"mean": -0.043, "low": -0.06, "high": -0.026},
  }
  held_out = {"policies": policies, "difference": difference}
  write_json(root / "eval/results.json", {"held_out": held_out})
  write_lines(root / "eval/answers.jsonl", [answer(i) for i in range(40)])


def write_run(root):
  """A workdir such as a whole run leaves."""
  draw = random.Random(0)
  config = {"seed": 7, "stages": list(TITLES), "ppo": {"kl_coef": 0.0625, "steps": 40}}
  write_json(root / "config.json", config)
  layouts = {"policy": "llava: original LLaVA; 0.01 GB", "reward_model": f"x: {ATTACK}"}
  write_json(root / "checkpoints.json", layouts)
  for index in range(6):
    write_video(root / f"world/videos/v{index}.mp4", index)
  for start, (name, title) in enumerate(TITLES.items()):
    flags = {"has_rollouts": name == "ppo", "is_measurement": name == "eval"}
    write_facts(root, name, title, started=1.7e9 + start, **flags)
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
    rows = [sample(step, row, draw) for row in range(10)]
    write_lines(root / f"ppo/samples/step_{step}.jsonl", rows)
  write_label_stage(root)
  write_eval_stage(root)
  return root
