"""TFDS builder of the embedded world: mp4 files, LLaVA-style records, hidden truth.

builder = World(data_dir=folder, sizes={"sft": 600}, seed=0)
builder.download_and_prepare()        # Renders videos, writes ArrayRecord files.
read_split(folder, "sft")             # -> records; TensorFlow is never imported.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vlmrlaif_jax.data.world import language, scene

# How often each kind of question is asked; the rest ask what happens in the video.
PROMPT_MIX = {
  "attribute": 0.2,
  "count": 0.1,
  "motion": 0.15,
  "event": 0.1,
  "order": 0.05,
  "presence": 0.05,
  "false_premise": 0.15,
}

# What is random follows from a split's place here. "shifted": a benchmark of videos
# that look unlike all others.
WORLD_SPLITS = ("pretrain", "sft", "prompts", "benchmark", "shifted")
QUESTIONS_PER_VIDEO = {"sft": 2, "prompts": 3, "benchmark": 5, "shifted": 5}


class World(tfds.core.GeneratorBasedBuilder):
  """Clips of moving shapes: `sizes` says how many videos each split has."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}
  name = "world"

  def __init__(self, *, data_dir: str | os.PathLike, sizes: dict[str, int], seed: int):
    unknown = set(sizes) - set(WORLD_SPLITS)
    if unknown:
      raise ValueError(f"splits must be of {WORLD_SPLITS}, not {sorted(unknown)}")
    self.sizes, self.seed = sizes, seed
    self.folder = pathlib.Path(data_dir)
    super().__init__(data_dir=str(data_dir), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description="Short clips of moving shapes with instruction records and truth.",
      features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {split: self._generate_examples(split) for split in self.sizes}

  def _generate_examples(self, split):
    videos = self.folder / "videos" / split
    videos.mkdir(parents=True, exist_ok=True)
    make = lambda i: make_records(split, i, seed=self.seed, folder=self.folder)
    # Encoding and most of NumPy let other threads run.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for records in pool.map(make, range(self.sizes[split])):
        for record in records:
          yield record["id"], {"record": json.dumps(record)}


def make_records(
  split: str, index: int, *, seed: int, folder: pathlib.Path
) -> list[dict]:
  """Renders one video of a split and says what is asked and told of it.

  All that is random follows from the seed, the split and the index.
  """
  rng = np.random.default_rng([seed, WORLD_SPLITS.index(split), index])
  truth = scene.sample_scene(rng)
  video = f"{split}/{index:06d}.mp4"
  look = scene.SHIFTED_STYLE if split == "shifted" else scene.USUAL_STYLE
  scene.write_mp4(folder / "videos" / video, scene.render_scene(truth, look))
  if split == "pretrain":
    return [_record(f"{split}-{index}", video, "", None, {"scene": truth})]
  asked: set[str] = set()
  records: list[dict[str, Any]] = []
  for _ in range(QUESTIONS_PER_VIDEO[split]):
    kind, question, right, told = _ask(truth, rng)
    if question not in asked:
      asked.add(question)
      answer = told if split == "sft" else None
      truths = {"scene": truth, "kind": kind, "answer": right}
      name = f"{split}-{index}-{len(records)}"
      records.append(_record(name, video, question, answer, truths))
  return records


def _ask(truth, rng) -> tuple[str, str, str, str]:
  """(kind, question, right answer, answer as instruction data has it)."""
  kinds = [*PROMPT_MIX, "description"]
  weights = [*PROMPT_MIX.values(), 1 - sum(PROMPT_MIX.values())]
  made = language.make_questions(truth, rng)
  kind = str(rng.choice(kinds, p=weights))
  if kind == "description" or kind not in made:
    told = language.make_careless_description(truth, rng)
    return "description", language.DESCRIBE_EVENTS, language.describe_scene(truth), told
  question = made[kind]
  told = language.make_careless_answer(question, rng)
  return kind, question.question, question.answer, told


def _record(name, video, question, answer, truth) -> dict:
  """One LLaVA-style record; what stands under "truth" no training stage may read."""
  turns = [{"from": "human", "value": f"<video>\n{question}"}]
  if answer is not None:
    turns.append({"from": "gpt", "value": answer})
  truth = {**truth, "scene": scene.scene_to_json(truth["scene"])}
  return {"id": name, "video": video, "conversations": turns, "truth": truth}


def build_world(folder: str | os.PathLike, *, sizes: dict[str, int], seed: int) -> None:
  """Renders and writes what is not there yet; safe to call again, or after a kill."""
  builder = World(data_dir=folder, sizes=dict(sizes), seed=seed)
  tfds.disable_progress_bar()
  # It would tell of a download, and there is none.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()


def read_split(folder: str | os.PathLike, split: str) -> list[dict]:
  """The records of a split, in the order of their ids' hashes."""
  path = pathlib.Path(folder) / World.name / str(World.VERSION)
  source = tfds.builder_from_directory(str(path)).as_data_source(split)
  return [json.loads(source[i]["record"]) for i in range(len(source))]
