"""Content hashes of a run's files, so that no run resumes on files that have changed.

They are files of data and of reward functions. The hashes are in WORKDIR/data.json,
next to config.json. They depend on the content alone: a file may be moved, and its time
stamp may change.
"""

import hashlib
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import hash_file, read_json, write_json
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.feedback.terms import functions
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import load_stages

HASH_FILE = "data.json"
VIDEOS = "data.videos"  # Key of the hash of all videos of the records.
REMEDY = (
  "Use another --workdir for the changed files, restore the old content, or remove the "
  "folders of the stages that must run again."
)


def hash_data_files(config: ConfigDict) -> dict[str, dict[str, str]]:
  """Hashes every file and folder of records, preferences and questions of a config.

  So are the files of reward functions, but not modules that they import.

  Returns:
    Setting, as "data.records" -> its "path" and the "sha256" of its content. The hash
    of a benchmark's questions includes all of its files, and that of a reward function
    its name.
  """
  names = {
    ("data", name) for name in ("records", "prompts", "label_prompts", "benchmark")
  }
  for stage in load_stages().values():
    names |= {(stage.section, name) for name in stage.files}
  hashes = {}
  for section, name in sorted(names):
    path = config[section][name] if section in config else ""
    if path and pathlib.Path(path).exists():
      content = _hash_content(pathlib.Path(path))
      hashes[f"{section}.{name}"] = {"path": path, "sha256": content}
  for name in config.evaluate.names if "evaluate" in config else ():
    settings, benchmark = config.evaluate[name], protocol.load_benchmarks()[name]
    if benchmark.load and pathlib.Path(settings.questions or "-").exists():
      content = protocol.hash_benchmark_files(benchmark, settings)
      key = f"evaluate.{name}.questions"
      hashes[key] = {"path": settings.questions, "sha256": content}
  return hashes | _hash_reward_files(config)


def _hash_reward_files(config: ConfigDict) -> dict[str, dict[str, str]]:
  hashes = {}
  for name, term in config.reward.terms.items() if "reward" in config else ():
    text = term.get("fn", name)
    path = functions.find_function_file(text)
    if path and path.exists() and term.get("weight", 1.0):
      content = json.dumps([text.rpartition(":")[2], _hash_content(path)])
      digest = hashlib.sha256(content.encode()).hexdigest()
      hashes[f"reward.terms.{name}.fn"] = {"path": text, "sha256": digest}
  return hashes


def _hash_content(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, or of the names and contents of a folder's files."""
  files = sorted(path.rglob("*")) if path.is_dir() else [path]
  digest = hashlib.sha256()
  for file in filter(pathlib.Path.is_file, files):
    name = "" if file == path else str(file.relative_to(path))
    digest.update(json.dumps([name, hash_file(file)]).encode())
  return digest.hexdigest()


def is_unmoved_content(
  key: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> bool:
  """Returns whether a setting names data whose content is compared by its hash.

  Args:
    key: Full name of a setting.
    before: Hashes of the workdir.
    now: Hashes of the config's files.
  """
  section, _, name = key.rpartition(".")
  if key == VIDEOS:  # Compared by check_videos.
    return "data.records" in before.keys() & now.keys()
  if section.startswith("evaluate."):
    # Answers are cached by the content of the videos.
    benchmark = protocol.load_benchmarks().get(section.removeprefix("evaluate."))
    key = f"{section}.questions"
    if benchmark is None or name not in (*benchmark.files, "videos"):
      return False
  return key in before.keys() & now.keys()


def check_unchanged(
  root: pathlib.Path, now: Mapping[str, Any], sections: Collection[str] | None = None
) -> None:
  """Checks that files have the content that the workdir's stages have read.

  Args:
    root: The workdir.
    now: Hashes of the config's files.
    sections: Sections whose files must not change; None for all.

  Raises:
    UserError: Content has changed. The message names each file.
  """
  before = read_json(root / HASH_FILE, default={})
  changed = [
    f"  --config.{key}={now[key]['path']}: sha256 {before[key]['sha256'][:12]} in the "
    f"workdir, {now[key]['sha256'][:12]} now"
    for key in sorted(before.keys() & now.keys())
    if before[key]["sha256"] != now[key]["sha256"]
    and (sections is None or key.split(".")[0] in sections)
  ]
  if changed:
    raise UserError(
      f"files of the run in {root} have changed since its stages began:\n"
      + "\n".join(changed)
      + f"\n{REMEDY}"
    )


def write_hashes(root: pathlib.Path, now: Mapping[str, Any]) -> None:
  """Adds hashes to those of the workdir."""
  write_json(root / HASH_FILE, {**read_json(root / HASH_FILE, default={}), **now})


def check_videos(run: Run, *, is_begun: bool) -> None:
  """Checks that the records' videos have the content that the workdir's stages read.

  Args:
    run: The run with the features of its videos.
    is_begun: Whether a stage has read the videos. If not, the hash is only written.

  Raises:
    UserError: A video has changed, is new, or can no longer be read.
  """
  store = run.features
  rows = sorted(
    {(e["id"], store.digest(e["video"])) for part in run.splits for e in part}
  )
  content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
  now = {VIDEOS: {"path": run.config.data.videos, "sha256": content}}

  def check() -> None:
    if is_begun:
      check_unchanged(run.workdir, now)
    write_hashes(run.workdir, now)

  distributed.on_process_zero(check)
