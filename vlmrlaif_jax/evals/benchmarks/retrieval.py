"""Text-to-video retrieval by what a policy says of each video, of MSVD and MSRVTT.

As VLM-Eval (Li et al. 2023, 2311.11865), which VLM-RLAIF follows: the first caption of
each video looks for it among what was said of all videos, and finds it if that is among
the most alike. Two things differ. What was said word for word alike of several videos
ties, and counts by chance, where the script takes the last; and every video counts,
where the script asks a caption of several videos once and divides by all videos. Which
of its prompts, and which test videos, VLM-RLAIF took is not published.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkItem,
  BenchmarkModel,
  CaseJudge,
  ScoredCase,
)
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
  "mapping": "",  # MSVD's file of names.
  "split": "test",  # Of MSRVTT's videos, where the file has splits.
  "question": "Describe the video concisely.",  # One of VLM-Eval's eleven.
}


def load(config: ConfigDict) -> list[BenchmarkItem]:
  """The videos of the file, in its order."""
  path = pathlib.Path(config.questions)
  if not path.is_file():
    raise FileNotFoundError(f"no file at {path}: {SOURCE.describe()}")
  read = _msvd if path.suffix == ".txt" else _msrvtt
  captions: dict[str, str] = {}
  for name, caption in read(path, config):
    captions.setdefault(name, caption)
  if len(captions) < 2:
    raise ValueError(f"{path} has {len(captions)} videos to choose from: give more")
  return [
    BenchmarkItem(protocol.make_question(config, name, name, config.question), caption)
    for name, caption in captions.items()
  ]


def _msrvtt(path: pathlib.Path, config: ConfigDict) -> list[tuple[str, str]]:
  try:
    told = json.loads(path.read_bytes())
    rows = [(str(s["video_id"]), str(s["caption"])) for s in told["sentences"]]
    splits = {str(v["video_id"]): v.get("split") for v in told.get("videos", ())}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is not MSRVTT's ({error!r}): {SOURCE.describe()}") from None
  return [row for row in rows if splits.get(row[0]) in (None, config.split)]


def _msvd(path: pathlib.Path, config: ConfigDict) -> list[tuple[str, str]]:
  mapping = pathlib.Path(config.mapping)
  if not config.mapping or not mapping.is_file():
    raise FileNotFoundError(f"no file at mapping={config.mapping!r}: {SOURCE.describe()}")
  pairs = [line.split() for line in mapping.read_text().splitlines() if line.strip()]
  names = {pair[-1]: pair[0] for pair in pairs}
  rows = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    video, tab, caption = line.partition("\t")
    if not tab or video not in names:
      raise ValueError(
        f"{path}, line {number} is no video of {mapping}, a tab and a caption: "
        + SOURCE.describe()
      )
    rows.append((names[video], caption))
  return rows


def run(
  items: Sequence[BenchmarkItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
) -> list[ScoredCase]:
  """Returns whether each caption finds its video: r1 and r5."""
  texts = model.answer([item.question for item in items])
  there = [i for i, text in enumerate(texts) if text is not None]
  said, captions = [texts[i] or "" for i in there], [items[i].answer for i in there]
  alike = model.similarity.compare(said, captions).T
  found = dict(zip(there, count_hits(alike, np.arange(len(there)), "r"), strict=True))
  return [
    protocol.make_rule_case(item.question, found.get(i), item.answer)
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
