"""PROGRAM: opens the policies of a chat: those of a run, or one checkpoint.

`open_chat_workdir` and `open_model` are the main functions. chat_clip.py reads clips,
chat_stream.py generates answers, and launch/chat.py is the program.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import AnyArray, Batch, Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.interface import Visual
from vlmrlaif_jax.evals.summary import select_comparable
from vlmrlaif_jax.feedback.claims import compute_self_rewards
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.runtime import loading, role_params, scoring
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.arrays import has_checkpoint
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import load_workdir_policies

DEFAULT_FRAMES = 12  # Frames of a clip for checkpoints that do not state them.


class ChatJudge(NamedTuple):
  """The model that scores answers."""

  name: str  # Description on the page.
  # (prompts with answers, first column of the answers) -> scores.
  score: Callable[[Batch, int], Float[AnyArray, " batch"]]


class ChatClip(NamedTuple):
  """A clip that is encoded, or several clips and images."""

  features: Float[np.ndarray, "..."]  # Features of the prompt; see FeatureStore.get.
  layouts: tuple[Visual, ...]  # Grid and times of the frames of each.


class ChatSession(NamedTuple):
  """The policies of a chat and their judge."""

  run: Run  # Run without data.
  policies: dict[str, Params]  # Name -> all variables; SFT's policy first.
  judge: ChatJudge | None
  max_prompt: int  # Largest number of tokens of a conversation, with the clip.


def open_chat_workdir(
  workdir: str, mesh: Mesh, *, max_prompt: int, note: Callable[[str], None]
) -> ChatSession:
  """Opens SFT's policy of a run and the one to compare: PPO's, or else the last.

  Raises:
    FileNotFoundError: The workdir has no run, or the run has no policy yet.
  """
  root = pathlib.Path(workdir)
  config = read_config(root)
  if not has_checkpoint(root / role_params.SFT_STAGES[1]):
    raise FileNotFoundError(
      f"{root} has no policy yet: its stage {role_params.SFT_STAGES[1]} has not run. "
      "Run it first."
    )
  has_separate_reward_model = has_checkpoint(root / "rm")
  run, _ = loading.load_run_without_data(
    config, root, note, has_separate_reward_model=has_separate_reward_model, mesh=mesh
  )
  available = load_workdir_policies(run)
  names = dict.fromkeys(select_comparable(available))
  policies = {name: available[name] for name in names}
  judge = _make_judge(run, available, list(names)[-1])
  return ChatSession(run, policies, judge, max_prompt)


def read_config(root: pathlib.Path) -> ConfigDict:
  """Reads the config of a run and sets the model section for inference.

  Raises:
    FileNotFoundError: The folder has no run.
  """
  if not (root / "config.json").exists():
    raise FileNotFoundError(f"no run in {root}. Give the workdir of launch/run.py.")
  config = ConfigDict(read_json(root / "config.json"))
  config.model.update(attention="auto", remat="none")
  return config


def read_frame_count(path: str) -> int:
  """Returns the frames per clip on which an export was trained.

  Other checkpoints do not have the number. The result is then DEFAULT_FRAMES.

  Raises:
    ValueError: The number of a checkpoint is not positive.
  """
  file = run_lib.resolve_checkpoint(path) / "processor_config.json"
  settings = read_json(file, default={})
  frames = settings.get("num_frames") if isinstance(settings, dict) else None
  if frames is None:
    return DEFAULT_FRAMES
  if not isinstance(frames, int) or frames < 1:
    raise ValueError(f"{file}: num_frames must be 1 or more, got {frames!r}")
  return frames


def open_model(
  path: str,
  model: ConfigDict,
  mesh: Mesh,
  *,
  max_prompt: int,
  note: Callable[[str], None],
) -> ChatSession:
  """Opens a checkpoint in Hugging Face's format, without a judge.

  `model` is a model section. Its template "" selects the template of the checkpoint.
  """
  folder = run_lib.resolve_checkpoint(path)
  # Raises for another model, whose tokenizer may require code that is not here.
  checkpoint_layouts.find_layout(folder, tower=model.tower)
  tokenizer = tokenization.load_tokenizer(
    checkpoint_layouts.find_tokenizer_folder(folder)
  )
  if not model.template:
    model.template = "chat_template" if tokenizer.chat_template else "vicuna_v1"
  model.path = path
  config = ConfigDict(dict(model=model, seed=0))
  run, _ = loading.load_run_without_data(
    config, folder, note, has_separate_reward_model=False, mesh=mesh
  )
  return ChatSession(run, {folder.name: run.base}, None, max_prompt)


def _make_judge(run: Run, policies: dict[str, Params], last: str) -> ChatJudge | None:
  """Returns the reward model, or DPO's implicit reward, or None without either."""
  if role_params.has_reward_model(run):
    scores = scoring.make_reward_scorer(run, role_params.load_reward_model(run))
    return ChatJudge("the reward model", lambda batch, start: scores(batch))
  if not role_params.is_dpo_stage(last):
    return None
  reference = policies.get(role_params.get_start_stage(last), policies["sft"])

  def score(batch: Batch, start: int) -> Float[AnyArray, " batch"]:
    compute_logps = scoring.make_answer_logps(run.policy, start, run.stops)
    logps, ref_logps = (compute_logps(v, batch)[0] for v in (policies[last], reference))
    lengths = batch.loss_mask.sum(axis=1)
    return compute_self_rewards(logps, ref_logps, lengths, beta=run.config.dpo.beta)

  return ChatJudge(f"the implicit reward of {last}", score)
