"""Data whose records have several videos and images."""

import numpy as np
from PIL import Image

from vlmrlaif_jax.core import jsonl


def write_several(world, folder):
  """The world's files, with two videos and an image in every other record."""
  for name in ("sft", "prompts", "benchmark", "preferences"):
    rows = jsonl.read_jsonl(world / f"{name}.jsonl")
    for number, row in list(enumerate(rows))[::2]:
      image, video = f"{folder}/{name}_{number}.png", row.pop("video")
      Image.fromarray(np.full((24, 32 + 8 * number, 3), 90, np.uint8)).save(image)
      question, *answers = [
        turn["value"].removeprefix("<video>\n") for turn in row.get("conversations", ())
      ] or [row.pop("question")]
      talk = [f"Is <video> like <image> or <video>? {question}", *answers]
      if name == "sft":
        talk = [f"<video>\n{question}", *answers, "<image>Or in <video>?", "No."]
      row["conversations"] = [
        {"from": role, "value": text}
        for role, text in zip(("human", "gpt") * 2, talk, strict=False)
      ]
      row |= {"videos": [video, f"{video}#t=0,0.5"], "images": [image]}
    jsonl.write_records(folder / f"{name}.jsonl", rows)
