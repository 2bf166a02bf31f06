"""Scores text-to-video retrieval by descriptions of each video, on MSVD and MSRVTT.

Follows VLM-Eval (Li et al. 2023, 2311.11865), which VLM-RLAIF uses. The policy
describes every video. The first caption of each video retrieves it if its description
is among the most similar ones.

Two points differ from the script. Equal descriptions of several videos tie and count by
chance, where the script takes the last. Every video counts, where the script uses a
caption of several videos once and divides by all videos. VLM-RLAIF's prompt and test
videos are not published.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.data.records import SkippedRecord, format_skipped_records
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkItem,
  BenchmarkModel,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.question_files import is_empty
from vlmrlaif_jax.evals.text_similarity import count_hits

SOURCE = protocol.Source(
  "text-to-video retrieval",
  "https://www.microsoft.com/en-us/research/publication/msr-vtt-a-large-video-"
  "description-dataset-for-bridging-video-and-language (MSRVTT) and "
  "https://www.cs.utexas.edu/~ml/clamp/videoDescription (MSVD)",
  """  QUESTIONS.json   MSRVTT's test_videodatainfo.json: {"sentences":
                   [{"video_id": "video7010", "caption": ...}, ...], "videos":
                   [{"video_id": "video7010", "split": "test"}, ...]}, the latter
                   if not all are to be measured on, or
  QUESTIONS.txt    MSVD's sents_test_lc_nopunc.txt: a line of vid1301, a tab and a
                   caption for each, and with it
  MAPPING.txt      youtube_mapping.txt: a line of a video's name and vid1301
  VIDEOS/          a folder
    NAME.mp4       by "video_id" or by name, with a suffix""",
)
SETTINGS = {
  "mapping": "",  # MSVD's file of video names.
  "split": "test",  # Split of MSRVTT's videos, if the file has splits.
  "question": "Describe the video concisely.",  # One of VLM-Eval's eleven prompts.
}


def load(
  config: ConfigDict, problems: list[SkippedRecord] | None = None
) -> list[BenchmarkItem]:
  """Loads the videos of the file with their first captions, in order.

  `problems` receives the skipped rows.
  """
  path = pathlib.Path(config.questions)
  if not path.is_file():
    raise FileNotFoundError(f"no file at {path}: {SOURCE.describe()}")
  read = _read_msvd if path.suffix == ".txt" else _read_msrvtt
  captions: dict[str, str] = {}
  skipped: list[SkippedRecord] = []
  for name, caption in read(path, config, skipped):
    captions.setdefault(name, caption)
  if problems is not None:
    problems += skipped
  if len(captions) < 2:
    raise ValueError(
      f"{path} has {len(captions)} videos to choose from: two or more are required. "
      f"{format_skipped_records(skipped, total=len(skipped))}\n{SOURCE.describe()}"
    )
  return [
    BenchmarkItem(protocol.make_question(config, name, name, config.question), caption)
    for name, caption in captions.items()
  ]


def _read_msrvtt(
  path: pathlib.Path, config: ConfigDict, problems: list[SkippedRecord]
) -> list[tuple[str, str]]:
  try:
    content = read_json(path)
    rows = content["sentences"]
    splits = {str(v["video_id"]): v.get("split") for v in content.get("videos", ())}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is not MSRVTT's ({error!r}): {SOURCE.describe()}"
    ) from None
  pairs = []
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or any(
      is_empty(row.get(key)) for key in ("video_id", "caption")
    ):
      reason = "it has no video_id or no caption"
      problems.append(SkippedRecord(f"sentence {number}", reason, path.name))
      continue
    pairs.append((str(row["video_id"]), str(row["caption"])))
  return [pair for pair in pairs if splits.get(pair[0]) in (None, config.split)]


def _read_msvd(
  path: pathlib.Path, config: ConfigDict, problems: list[SkippedRecord]
) -> list[tuple[str, str]]:
  mapping = pathlib.Path(config.mapping)
  if not config.mapping or not mapping.is_file():
    raise FileNotFoundError(
      f"no file at mapping={config.mapping!r}: {SOURCE.describe()}"
    )
  pairs = [line.split() for line in mapping.read_text().splitlines() if line.strip()]
  names = {pair[-1]: pair[0] for pair in pairs}
  rows = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    video, tab, caption = line.partition("\t")
    if not tab or video not in names or not caption.strip():
      reason = f"it is not a video of {mapping.name}, a tab and a caption"
      problems.append(SkippedRecord(f"line {number}", reason, path.name))
      continue
    rows.append((names[video], caption))
  return rows


def run(
  items: Sequence[BenchmarkItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether each caption retrieves its video: "r1" and "r5"."""
  texts = model.answer([item.question for item in items])
  answered = [i for i, text in enumerate(texts) if text is not None]
  descriptions = [texts[i] or "" for i in answered]
  captions = [items[i].answer for i in answered]
  scores = model.similarity.compare(descriptions, captions).T
  labels = np.arange(len(answered))
  hits = dict(zip(answered, count_hits(scores, labels, "r"), strict=True))
  return [
    protocol.make_rule_case(item.question, hits.get(i), item.answer)
    for i, item in enumerate(items)
  ]


_RETRIEVAL = protocol.Benchmark(
  "retrieval",
  SOURCE,
  load,
  run,
  settings=SETTINGS,
  scoring="similarity",
  files=("questions", "mapping"),
  shares=("r1", "r5"),
  world=world_files.write_retrieval,
)
BENCHMARKS = (
  _RETRIEVAL,
  _RETRIEVAL._replace(name="msvd_retrieval", world=None),
  _RETRIEVAL._replace(name="msrvtt_retrieval", world=None),
)
