"""PROGRAM: what there is to talk to about a clip: policies of a run, or a checkpoint.

chat_clip.py reads clips, chat_stream.py answers; launch/chat.py shows both.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import AnyArray, Batch, Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.evals.summary import select_comparable
from vlmrlaif_jax.feedback.claims import compute_self_rewards
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.runtime import loading, role_params, scoring
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.arrays import has_checkpoint
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import load_workdir_policies


class ChatJudge(NamedTuple):
  """Who scores answers."""

  name: str
  # (prompts and answers, the answers' first index) -> scores.
  score: Callable[[Batch, int], Float[AnyArray, " batch"]]


class ChatSession(NamedTuple):
  """What there is to talk to."""

  run: Run  # Without data.
  policies: dict[str, Params]  # Whole variables by name, that of SFT first.
  judge: ChatJudge | None
  longest: int  # Tokens of a conversation, clip included.


def open_chat_workdir(
  workdir: str, mesh: Mesh, *, longest: int, note: Callable[[str], None]
) -> ChatSession:
  """The policy of SFT and the one that was made of it last, or PPO's, of a run.

  Raises:
    FileNotFoundError: there is no run, or it has no policy yet.
  """
  root = pathlib.Path(workdir)
  config = read_config(root)
  if not has_checkpoint(root / role_params.SFT_STAGES[1]):
    raise FileNotFoundError(
      f"{root} has no policy yet: its stage {role_params.SFT_STAGES[1]} has not been run"
    )
  has_separate_reward_model = has_checkpoint(root / "rm")
  run, _ = loading.load_run_without_data(
    config, root, note, has_separate_reward_model=has_separate_reward_model, mesh=mesh
  )
  found = load_workdir_policies(run)
  names = dict.fromkeys(select_comparable(found))
  policies = {name: found[name] for name in names}
  return ChatSession(run, policies, _judge(run, found, list(names)[-1]), longest)


def read_config(root: pathlib.Path) -> ConfigDict:
  """Reads the config of a run, with the settings of the model for inference.

  Raises:
    FileNotFoundError: there is no run in the folder.
  """
  if not (root / "config.json").exists():
    raise FileNotFoundError(f"no run in {root}: give the workdir of a launch/run.py")
  config = ConfigDict(read_json(root / "config.json"))
  config.model.update(attention="auto", remat="none")
  return config


def open_model(
  path: str, model: ConfigDict, mesh: Mesh, *, longest: int, note: Callable[[str], None]
) -> ChatSession:
  """A checkpoint in Hugging Face's form, without a judge.

  Args:
    model: the section of a config; the template "" is the checkpoint's own.
  """
  folder = run_lib.resolve_checkpoint(path)
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
  return ChatSession(run, {folder.name: run.base}, None, longest)


def _judge(run: Run, policies: dict[str, Params], last: str) -> ChatJudge | None:
  """The reward model, or else what DPO has left in the last policy, if either is."""
  if role_params.has_reward_model(run):
    scores = scoring.make_reward_scorer(run, role_params.load_reward_model(run))
    return ChatJudge("the reward model", lambda batch, start: scores(batch))
  if not role_params.is_dpo_stage(last):
    return None
  before = policies.get(role_params.get_start_stage(last), policies["sft"])

  def self_score(batch: Batch, start: int) -> Float[AnyArray, " batch"]:
    logps_of = scoring.make_answer_logps(run.policy, start, run.eos)
    logps, ref_logps = (logps_of(v, batch)[0] for v in (policies[last], before))
    lengths = batch.loss_mask.sum(axis=1)
    return compute_self_rewards(logps, ref_logps, lengths, beta=run.config.dpo.beta)

  return ChatJudge(f"the reward that {last} has in itself", self_score)
