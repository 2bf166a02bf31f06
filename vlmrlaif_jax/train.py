"""PROGRAM: the stages that train: SFT, reward model, PPO, GRPO."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax import (
  answer,
  build,
  checkpoint,
  loop,
  oracles,
  roles,
  scoring,
  sharding,
)
from vlmrlaif_jax import update as updates
from vlmrlaif_jax.data import pipeline, records, text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.losses.advantages import adapt_kl_coef
from vlmrlaif_jax.methods import grpo as grpo_method
from vlmrlaif_jax.methods import ppo as ppo_method
from vlmrlaif_jax.methods import rm as rm_method
from vlmrlaif_jax.methods import sft as sft_method
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.types import Batch, Method, Params, Parts, TrainState, join


def default_stage(**given) -> ConfigDict:
  """Settings that every training stage has."""
  optimizer = updates.default_config()
  del optimizer.steps  # Follows from how long the stage is.
  return ConfigDict(
    {
      "batch_size": 32,
      "microbatches": 1,  # Parts of a batch that are worked on in turn, for memory.
      "optimizer": optimizer,
      "save_every": 50,
      "log_every": 1,
      "keep": 1,  # Checkpoints.
      **given,
    }
  )


def sft(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """One stage of the curriculum; trains LoRA and projector on the base."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  short, long = roles.SFT
  examples = easy if stage == short else hard
  kept, rows, problems = _encoded(
    run, examples, log, answered=True, response_len=run.config.data.response_len
  )
  start = roles.policy_of(run, short) if stage == long else roles.initial_policy(run)
  _train(
    run,
    stage,
    folder,
    log,
    config,
    sft_method.make(config, Parts(policy=run.policy)),
    steps=config.short_steps if stage == short else config.long_steps,
    params={"policy": start},
    frozen={"policy": run.base},
    data=lambda step: _batch(run, kept, rows, config.batch_size, step),
  )
  return {
    "examples": len(kept),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def rm(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the reward model on preferences: those given, or of the label stage."""
  config = run.config.rm
  source = config.preferences or str(run.workdir / "label" / "preferences.jsonl")
  pairs, problems = records.read_preferences(source, videos=build.videos_of(run))
  total = len(pairs) + len(problems)
  pairs, more = scoring.scorable(run, pairs)
  _report(problems + more, total, log)
  if len(pairs) < config.batch_size:
    raise ValueError(
      f"{source} holds {len(pairs)} usable preferences, fewer than a batch of "
      f"{config.batch_size}: label more prompts, or lower rm.batch_size"
    )
  train, held = pipeline.hold_out(pairs, config.holdout, run.config.seed)
  base = roles.scorer_base(run)
  state = _train(
    run,
    stage,
    folder,
    log,
    config,
    rm_method.make(config, Parts(reward_model=run.scorer)),
    steps=config.steps,
    params={"reward": roles.initial_scorer(run)},
    frozen={"reward": base},
    data=lambda step: scoring.pairs_of_step(run, train, config.batch_size, step),
  )
  accuracy = scoring.pair_accuracy(run, join(base, state.params["reward"]), held)
  log.note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(train), "held_out": len(held), "held_out_accuracy": accuracy}


def ppo(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains policy and critic against the reward model."""
  config = run.config.ppo
  examples, rows, problems = _encoded(
    run, run.splits.prompts, log, answered=False, response_len=0
  )
  params, frozen = roles.ppo_roles(run, config.critic_head)
  _train(
    run,
    stage,
    folder,
    log,
    config,
    _ppo_method(run, config),
    steps=config.steps,
    params=params,
    frozen=frozen | {"kl_coef": jnp.float32(config.kl_coef)},
    data=lambda step: _batch(run, examples, rows, config.batch_size, step),
    hooks=_ppo_hooks(run, config, examples, log),
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def grpo(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the policy against an oracle that compares its responses to each prompt."""
  config = run.config.grpo
  examples, rows, problems = _encoded(
    run, run.splits.prompts, log, answered=False, response_len=0
  )
  params, frozen = roles.grpo_roles(run)
  if config.oracle.kind == "reward":
    frozen["reward"] = roles.reward_variables(run)
  score = oracles.make(run, config.oracle, examples, folder)
  method = grpo_method.make(
    config, Parts(policy=run.policy, score=score), **_sampling(run)
  )

  def data(step):
    order = _order(run, len(examples), config.batch_size, step)
    return _rows(run, examples, rows, order), sharding.put(order, run.mesh)

  def collect(key, params, frozen, asked):
    batch, numbers = asked
    return method.collect(key, params, {**frozen, "asked": numbers}, batch)

  hooks = loop.Hooks(
    on_step=lambda step, batch, info: loop.Told(
      {}, _told(run, config, examples, step, info, log)
    )
  )
  if config.kl_anchor == "epoch_start":
    every = max(len(examples) // config.batch_size, 1)
    hooks = hooks._replace(before=_anchor(frozen["policy"], params, folder, every))
  _train(
    run,
    stage,
    folder,
    log,
    config,
    method._replace(collect=collect),
    steps=config.steps,
    params=params,
    frozen=frozen,
    data=data,
    hooks=hooks,
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def _anchor(base: Params, like: Params, folder: pathlib.Path, every: int):
  """A hook that makes the policy its own reference, anew every so many steps.

  What was taken is kept on disk, for a run that is killed before the next time.
  """
  at, seen = str(folder / "anchor"), set()

  def before(step, params):
    if step % every == 0:
      taken = jax.tree.map(jnp.copy, params)  # Updates donate what they are given.
      state = TrainState(jnp.int32(step), taken, ())
      checkpoint.save(at, state, step, extra={}, keep=1)
    elif seen:
      return {}
    else:
      taken = checkpoint.restore_params(at, like)
    seen.add(step)
    return {"ref": join(base, taken["policy"])}

  return before


def _sampling(run) -> dict[str, int]:
  """What a method that samples is told of lengths and ids."""
  tok = run.tokenizer
  return dict(
    max_new=run.config.data.response_len,
    eos=run.eos,
    pad=tok.pad_token_id,
    vocab=answer.plain_vocab(tok, run.eos),
  )


def _ppo_method(run, config: ConfigDict) -> Method:
  score = oracles.reward(run, config.stop_penalty, config.length_coef)
  parts = Parts(policy=run.policy, critic=run.scorer, score=score)
  return ppo_method.make(config, parts, **_sampling(run))


def _ppo_hooks(
  run: build.Run, config: ConfigDict, examples: Sequence[Example], log: Log
) -> loop.Hooks:
  """Samples, how right they are, and a KL coefficient that adapts if it is to."""
  now = {"kl_coef": config.kl_coef}
  laid = lambda: {"kl_coef": jnp.float32(now["kl_coef"])}

  def on_step(step, batch, info):
    told = _told(run, config, examples, step, info, log)
    if config.kl_target:
      adapted = adapt_kl_coef(
        jnp.float32(now["kl_coef"]),
        info["kl"],
        target=config.kl_target,
        horizon=config.kl_horizon,
        rows=len(info["scores"]),
      )
      now["kl_coef"] = float(adapted)
    return loop.Told(laid(), {**told, **now})

  def restored(extra):
    now.update(extra)
    return laid()

  return loop.Hooks(on_step=on_step, extra=lambda: dict(now), restored=restored)


def _told(run, config, examples, step, info, log) -> dict[str, float]:
  """Writes samples, and says how right the sampled answers are, if that is known."""
  keep = ("tokens", "loss_mask", "scores", "valid", "has_stop", "row_advantages")
  rows = jax.device_get({name: info[name] for name in keep})
  texts = text.responses_text(run.tokenizer, rows["tokens"], rows["loss_mask"])
  order = _order(run, len(examples), config.batch_size, step)
  asked = [examples[i] for i in np.repeat(order, config.samples)]
  wrong = [truth.mistakes(e, t) for e, t in zip(asked, texts, strict=True)]
  if (step + 1) % config.samples_every == 0 or step == 0:
    log.samples(
      step + 1,
      [
        {
          "id": e["id"],
          "video": e["video"],
          "prompt": e["question"],
          "response": t,
          "score": float(s),
          "valid": bool(v),
          "advantage": float(a),
          "has_stop": bool(h),
          "truth": None if w is None else w == 0,
        }
        for e, t, s, v, a, h, w in zip(
          asked,
          texts,
          rows["scores"],
          rows["valid"],
          rows["row_advantages"],
          rows["has_stop"],
          wrong,
          strict=True,
        )
      ],
    )
  known = [w == 0 for w in wrong if w is not None]
  return {"truth": float(np.mean(known))} if known else {}


# Common.


def _train(
  run: build.Run,
  stage: str,
  folder: pathlib.Path,
  log: Log,
  config: ConfigDict,
  method: Method,
  *,
  steps: int,
  params: Params,
  frozen: Params,
  data: Callable[[int], Any],
  hooks: loop.Hooks = loop.NO_HOOKS,
  epochs: int = 1,
  minibatches: int = 1,
) -> TrainState:
  """A stage's training as its section of the config says; see loop.fit."""
  return loop.fit(
    method=method,
    params=params,
    frozen=frozen,
    data=data,
    key=jax.random.fold_in(jax.random.key(run.config.seed), hash_of(stage)),
    plan=loop.Plan(
      steps, config.save_every, config.log_every, config.keep, epochs, minibatches
    ),
    optimizer=config.optimizer,
    microbatches=config.microbatches,
    place=lambda tree: sharding.shard_by_rules(tree, vlm.SHARDING, run.mesh),
    folder=str(folder),
    log=log,
    hooks=hooks,
  )


def hash_of(name: str) -> int:
  """A number for a stage's name, the same in every process."""
  return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


def _encoded(run, examples, log, *, answered: bool, response_len: int):
  """(examples that fit, their rows, problems of the others, which are told of)."""
  made = pipeline.encode_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    video_tokens=build.video_tokens(run, run.config.model.frames),
    prompt_len=run.config.data.prompt_len,
    response_len=response_len,
  )
  _report(made[2], len(examples), log)
  return made


def _order(run, count: int, size: int, step: int) -> np.ndarray:
  """The numbers of a step's examples."""
  order = pipeline.rows_of_step(count, size, seed=run.config.seed, step=step)
  return np.asarray(order)


def _batch(run, examples: Sequence[Example], rows: text.Rows, size, step) -> Batch:
  return _rows(run, examples, rows, _order(run, len(examples), size, step))


def _rows(run, examples: Sequence[Example], rows: text.Rows, order) -> Batch:
  video = build.stack_features(run.features, [examples[i]["video"] for i in order])
  batch = Batch(video, *(column[order] for column in rows))
  return sharding.put(batch, run.mesh)


def _report(problems, total: int, log: Log) -> None:
  if problems:
    log.note(records.report_problems(problems, total=total))
  if len(problems) == total:
    raise ValueError(
      f"{log.stage} has no record to learn from: what is wrong with "
      f"each of the {total} stands above"
    )
