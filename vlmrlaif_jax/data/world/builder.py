"""TFDS builder of the embedded world: mp4 files, LLaVA-style records, ground truth.

  build_world(folder, sizes={"sft": 600}, seed=0)  # Renders and writes the data set.
  read_split(folder, "sft")                        # Returns the records of a split.

TensorFlow is never imported.
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

# Share of each kind of question. The other questions request a description.
PROMPT_MIX = {
  "attribute": 0.2,
  "count": 0.1,
  "motion": 0.15,
  "event": 0.1,
  "order": 0.05,
  "presence": 0.05,
  "false_premise": 0.15,
}

# The index of a split seeds its random numbers. The videos of "shifted", a benchmark,
# look different from all others.
WORLD_SPLITS = ("pretrain", "sft", "prompts", "benchmark", "shifted", "labels")
QUESTIONS_PER_VIDEO = {
  "sft": 2,
  "prompts": 3,
  "benchmark": 5,
  "shifted": 5,
  "labels": 3,
}


class _LocalInfo(tfds.core.DatasetInfo):
  """Metadata of a data set that no bucket contains."""

  def initialize_from_bucket(self) -> None:
    """Does nothing. TFDS would request a bucket and leave a temporary folder."""


class World(tfds.core.GeneratorBasedBuilder):
  """A data set of clips of moving shapes.

  Args:
    data_dir: Folder of the data set.
    sizes: Videos of each split; the names are among WORLD_SPLITS.
    seed: Seed of the scenes.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}
  name = "world"

  def __init__(self, *, data_dir: str | os.PathLike, sizes: dict[str, int], seed: int):
    unknown = set(sizes) - set(WORLD_SPLITS)
    if unknown:
      raise ValueError(f"splits must be among {WORLD_SPLITS}, not {sorted(unknown)}")
    self.sizes, self.seed = sizes, seed
    self.folder = pathlib.Path(data_dir)
    super().__init__(data_dir=str(data_dir), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return _LocalInfo(
      builder=self,
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
    # Video encoding and most of NumPy release the GIL.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for records in pool.map(make, range(self.sizes[split])):
        for record in records:
          yield record["id"], {"record": json.dumps(record)}


def make_records(
  split: str, index: int, *, seed: int, folder: pathlib.Path
) -> list[dict]:
  """Renders one video of a split and returns its records.

  Random numbers depend on the seed, the split and the index only.

  Args:
    split: One of WORLD_SPLITS.
    index: Index of the video within the split.
    seed: Seed of the data set.
    folder: Folder of the data set.
  """
  rng = np.random.default_rng([seed, WORLD_SPLITS.index(split), index])
  truth = scene.sample_scene(rng)
  video = f"{split}/{index:06d}.mp4"
  look = scene.SHIFTED_STYLE if split == "shifted" else scene.USUAL_STYLE
  scene.write_mp4(folder / "videos" / video, scene.render_scene(truth, look))
  if split == "pretrain":
    return [_make_record(f"{split}-{index}", video, "", None, {"scene": truth})]
  questions: set[str] = set()
  records: list[dict[str, Any]] = []
  for _ in range(QUESTIONS_PER_VIDEO[split]):
    kind, question, right, careless = _sample_question(truth, rng)
    if question not in questions:
      questions.add(question)
      answer = careless if split == "sft" else None
      truths = {"scene": truth, "kind": kind, "answer": right}
      name = f"{split}-{index}-{len(records)}"
      records.append(_make_record(name, video, question, answer, truths))
  return records


def _sample_question(truth, rng) -> tuple[str, str, str, str]:
  """Returns (kind, question, right answer, answer of careless instruction data)."""
  kinds = [*PROMPT_MIX, "description"]
  weights = [*PROMPT_MIX.values(), 1 - sum(PROMPT_MIX.values())]
  questions = language.make_questions(truth, rng)
  kind = str(rng.choice(kinds, p=weights))
  if kind == "description" or kind not in questions:
    careless = language.make_careless_description(truth, rng)
    right = language.describe_scene(truth)
    return "description", language.DESCRIBE_EVENTS, right, careless
  question = questions[kind]
  careless = language.make_careless_answer(question, rng)
  return kind, question.question, question.answer, careless


def _make_record(name, video, question, answer, truth) -> dict:
  """Returns a LLaVA-style record. Training stages must not read its "truth"."""
  turns = [{"from": "human", "value": f"<video>\n{question}"}]
  if answer is not None:
    turns.append({"from": "gpt", "value": answer})
  truth = {**truth, "scene": scene.scene_to_json(truth["scene"])}
  return {"id": name, "video": video, "conversations": turns, "truth": truth}


def build_world(folder: str | os.PathLike, *, sizes: dict[str, int], seed: int) -> None:
  """Renders and writes the data set unless it exists; safe to call after a kill.

  Args:
    folder: Folder of the data set.
    sizes: Videos of each split.
    seed: Seed of the scenes.
  """
  builder = World(data_dir=folder, sizes=dict(sizes), seed=seed)
  tfds.disable_progress_bar()
  # TFDS prints messages about a download, although nothing is downloaded.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()


def read_split(folder: str | os.PathLike, split: str) -> list[dict]:
  """Returns the records of a split, ordered by the hashes of their ids."""
  # `builder_from_directory` would import the classes that files of the folder name.
  source = World(data_dir=folder, sizes={}, seed=0).as_data_source(split)
  return [json.loads(source[i]["record"]) for i in range(len(source))]
