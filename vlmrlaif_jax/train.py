"""PROGRAM: the stages that train: SFT, reward model, PPO."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build, checkpoint, loop, sharding
from vlmrlaif_jax import update as updates
from vlmrlaif_jax.data import pipeline, records, text
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.losses.advantages import adapt_kl_coef
from vlmrlaif_jax.methods import ppo as ppo_method
from vlmrlaif_jax.methods import rm as rm_method
from vlmrlaif_jax.methods import sft as sft_method
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.types import Batch, Method, Pairs, Params, Parts, TrainState, join

SFT = ("sft_short", "sft_long")  # The curriculum, in order.


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


# SFT.


def sft(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """One stage of the curriculum; trains LoRA and projector on the base."""
  config = run.config.sft
  easy, hard = pipeline.curriculum(
    run.splits.sft, short_share=config.short_share, threshold=config.threshold
  )
  examples = easy if stage == SFT[0] else hard
  kept, rows, problems = pipeline.encode_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=True,
    video_tokens=build.video_tokens(run, run.config.model.frames),
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len,
  )
  _report(problems, len(examples), log)
  start = policy_of(run, SFT[0]) if stage == SFT[1] else initial_policy(run)
  method = sft_method.make(config.method, Parts(policy=run.policy))
  data = lambda step: _batch(run, kept, rows, config.batch_size, step)
  _train(
    run,
    stage,
    folder,
    log,
    config,
    method,
    steps=sft_steps(config, stage),
    params={"policy": start},
    frozen={"policy": run.base},
    data=data,
  )
  return {
    "examples": len(kept),
    "left_out": len(problems),
    "longest_answer": int(rows.loss_mask.sum(1).max()),
  }


def sft_steps(config: ConfigDict, stage: str) -> int:
  return config.short_steps if stage == SFT[0] else config.long_steps


def initial_policy(run: build.Run) -> Params:
  """What SFT trains, as it starts: LoRA that changes nothing, the base's projector."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
  lora = build.fresh(build.trainable(run.policy, run.mesh), key)["lora"]
  return {"lora": lora, "params": _projector(run)}


def _projector(run) -> Params:
  return {"projector": run.base["params"]["projector"]}


def policy_of(run: build.Run, stage: str) -> Params:
  """The trained part of the policy, as a stage left it.

  Raises:
    FileNotFoundError: the stage has not been run in this workdir.
  """
  lora = build.trainable(run.policy, run.mesh)
  like = {"policy": {**lora, "params": _projector(run)}}
  if stage == "ppo":
    like = {"policy": lora, "critic": build.trainable(run.scorer, run.mesh)}
  saved = checkpoint.restore_params(str(run.workdir / stage / "checkpoints"), like)
  return saved["policy"]


def policies(run: build.Run) -> dict[str, Params]:
  """Whole variables of the SFT policy and, if it is there, of the PPO policy."""
  reference = join(run.base, policy_of(run, SFT[1]))
  found = {"sft": reference}
  if checkpoint.latest_step(str(run.workdir / "ppo" / "checkpoints")) is not None:
    found["ppo"] = join(reference, policy_of(run, "ppo"))
  return found


# Reward model.


def initial_scorer(run: build.Run) -> Params:
  """What the reward model trains, as it starts: the SFT policy's LoRA where both have
  the same base, and a head of small random weights."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 2)
  start = build.fresh(build.trainable(run.scorer, run.mesh), key)
  if run.scorer_base is run.base:
    start["lora"] = policy_of(run, SFT[1])["lora"]
  return start


def scorer_base(run: build.Run) -> Params:
  """The frozen part of reward model and critic; SFT's projector, if it is theirs."""
  if run.scorer_base is not run.base:
    return run.scorer_base
  projector = policy_of(run, SFT[1])["params"]
  return join(run.base, {"params": projector})


def rm(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains the reward model on the preferences of the label stage."""
  config = run.config.rm
  source = config.preferences or str(run.workdir / "label" / "preferences.jsonl")
  pairs, problems = records.read_preferences(
    source, videos=run.config.data.videos or run.workdir / "world" / "videos"
  )
  total = len(pairs) + len(problems)
  pairs, more = _scorable(run, pairs)
  _report(problems + more, total, log)
  if len(pairs) < config.batch_size:
    raise ValueError(
      f"{source} holds {len(pairs)} usable preferences, fewer than a batch of "
      f"{config.batch_size}: label more prompts, or lower rm.batch_size"
    )
  train, held = pipeline.hold_out(pairs, config.holdout, run.config.seed)
  start = initial_scorer(run)
  method = rm_method.make(config.method, Parts(reward_model=run.scorer))
  frozen = {"reward": scorer_base(run)}
  data = lambda step: _pairs(run, train, config.batch_size, step)
  state = _train(
    run,
    stage,
    folder,
    log,
    config,
    method,
    steps=config.steps,
    params={"reward": start},
    frozen=frozen,
    data=data,
  )
  variables = join(frozen["reward"], state.params["reward"])
  flat = [(p, out) for p in held for out in records.chosen_and_rejected(p)]
  scores = score_texts(run, variables, [p for p, _ in flat], [out for _, out in flat])
  gap = scores[0::2] - scores[1::2]
  accuracy = float(np.mean(gap > 0))
  log.note(
    f"rm: {accuracy:.1%} of {len(held)} held-out pairs are ranked as the judge did"
  )
  return {"pairs": len(train), "held_out": len(held), "held_out_accuracy": accuracy}


def reward_variables(run: build.Run) -> Params:
  """Whole variables of the trained reward model."""
  like = {"reward": build.trainable(run.scorer, run.mesh)}
  saved = checkpoint.restore_params(str(run.workdir / "rm" / "checkpoints"), like)
  return join(scorer_base(run), saved["reward"])


def score_texts(
  run: build.Run,
  variables: Params,
  examples: Sequence[Any],
  texts: Sequence[str],
  batch_size: int = 64,
) -> np.ndarray:
  """The reward model's score of each text as the answer to each example."""
  suffix = tuple(text.suffix_ids(run.tokenizer, run.prompts.reward))
  batch_size = text.bucket(batch_size, multiple=build.row_shards(run.mesh))
  scores = []
  for block in answer.blocks(len(texts), batch_size):
    rows = [min(i, block[-1]) for i in range(block[0], block[0] + batch_size)]
    batch = _scored_batch(run, [examples[i] for i in rows], [texts[i] for i in rows])
    out = _scores(run.scorer, variables, sharding.put(batch, run.mesh), suffix)
    scores.append(np.asarray(out)[: len(block)])
  return np.concatenate(scores)


_scores = jax.jit(rewards.scalar_scores, static_argnums=(0, 3))


def _scorable(run, pairs) -> tuple[list[Any], list[records.Problem]]:
  """(pairs whose answers can be scored, problems of the others)."""
  longest, kept, problems = run.config.data.prompt_len, [], []
  for pair in pairs:
    row = _scored_row(run, pair, pair["output_1"])
    if not run.features.has(pair["video"]):
      problems.append(
        records.Problem(
          pair["id"], "its video cannot be read, or is of no record of the data section"
        )
      )
    elif not text.fits(row, prompt_len=longest, response_len=len(row.ids)):
      problems.append(
        records.Problem(
          pair["id"], f"its prompt is longer than data.prompt_len={longest} tokens"
        )
      )
    else:
      kept.append(pair)
  return kept, problems


def _scored_row(run, example, answered: str) -> text.Encoded:
  """A text as the answer to an example's question, cut where sampling would stop."""
  turns = [*example.get("history", []), (example["question"], answered)]
  row = text.encode(
    run.tokenizer,
    run.template,
    turns,
    video_tokens=build.video_tokens(run, run.config.model.frames),
  )
  return _only_last_answer(row, run.config.data.response_len)


def _scored_batch(run, examples, texts) -> Batch:
  """Rows as PPO's rollouts lay them out: prompt, answer and its end."""
  encoded = [_scored_row(run, e, t) for e, t in zip(examples, texts, strict=True)]
  rows = text.pad_rows(
    encoded,
    prompt_len=run.config.data.prompt_len,
    response_len=run.config.data.response_len,
    pad=run.tokenizer.pad_token_id,
  )
  video = build.stack_features(run.features, [e["video"] for e in examples])
  return Batch(video, *rows)


def _only_last_answer(row: text.Encoded, longest: int) -> text.Encoded:
  """Earlier turns made part of the prompt, and an answer cut as sampling would."""
  starts = [i for i, on in enumerate(row.learn) if on and not row.learn[i - 1]]
  learn = [on and i >= starts[-1] for i, on in enumerate(row.learn)]
  stop = starts[-1] + longest
  return text.Encoded(row.ids[:stop], learn[:stop])


def _pairs(run, pairs, size, step) -> Pairs:
  rows = pipeline.rows_of_step(len(pairs), size, seed=run.config.seed, step=step)
  chosen = [pairs[i] for i in rows]
  sides = zip(*(records.chosen_and_rejected(p) for p in chosen), strict=True)
  suffix = tuple(text.suffix_ids(run.tokenizer, run.prompts.reward))
  both = [
    rewards.with_suffix(_scored_batch(run, chosen, side), suffix) for side in sides
  ]
  return sharding.put(Pairs(*both), run.mesh)


# PPO.


def ppo(run: build.Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains policy and critic against the reward model."""
  config, method_config = run.config.ppo, run.config.ppo.method
  examples, rows, problems = pipeline.encode_examples(
    run.splits.prompts,
    run.tokenizer,
    run.template,
    answered=False,
    video_tokens=build.video_tokens(run, run.config.model.frames),
    prompt_len=run.config.data.prompt_len,
    response_len=0,
  )
  _report(problems, len(run.splits.prompts), log)
  method = _ppo_method(run, method_config)
  params, frozen = _ppo_roles(run, config)
  seen = {"kl_coef": method_config.kl_coef}
  frozen["kl_coef"] = jnp.float32(seen["kl_coef"])

  def data(step):
    return _batch(run, examples, rows, config.batch_size, step)

  def on_step(step, batch, info):
    told = _told(run, config, examples, step, info, log)
    frozen = {}
    if method_config.kl_target:
      seen["kl_coef"] = float(
        adapt_kl_coef(
          jnp.float32(seen["kl_coef"]),
          info["kl"],
          target=method_config.kl_target,
          horizon=method_config.kl_horizon,
          rows=len(info["scores"]),
        )
      )
      frozen = {"kl_coef": jnp.float32(seen["kl_coef"])}
    return loop.Told(frozen, {**told, "kl_coef": seen["kl_coef"]})

  def restored(extra):
    seen["kl_coef"] = extra["kl_coef"]
    frozen["kl_coef"] = jnp.float32(seen["kl_coef"])

  _train(
    run,
    stage,
    folder,
    log,
    config,
    method,
    steps=config.steps,
    params=params,
    frozen=frozen,
    data=data,
    on_step=on_step,
    extra=lambda: dict(seen),
    restored=restored,
    epochs=config.epochs,
    minibatches=config.minibatches,
  )
  return {"prompts": len(examples), "left_out": len(problems)}


def _ppo_method(run, config: ConfigDict) -> Method:
  tok = run.tokenizer
  longest = run.config.data.response_len
  score = rewards.reward(
    run.scorer,
    suffix=tuple(text.suffix_ids(tok, run.prompts.reward)),
    eos=tok.eos_token_id,
    penalty=config.stop_penalty,
    length_coef=config.length_coef,
    longest=longest,
  )
  parts = Parts(policy=run.policy, critic=run.scorer, score=score)
  return ppo_method.make(
    config,
    parts,
    max_new=longest,
    eos=tok.eos_token_id,
    pad=tok.pad_token_id,
    vocab=answer.plain_vocab(tok),
  )


def _ppo_roles(run, config) -> tuple[Params, Params]:
  """(what is trained, what is frozen); the roles share the arrays of their base."""
  start = policy_of(run, SFT[1])
  policy_base = join(run.base, {"params": start["params"]})
  reward = reward_variables(run)
  critic = {"lora": reward["lora"], "params": {"head": reward["params"]["head"]}}
  if config.critic_head == "zero":
    critic["params"] = jax.tree.map(jnp.zeros_like, critic["params"])
  elif config.critic_head != "reward":
    raise ValueError(
      f'ppo.critic_head must be "zero" or "reward", not {config.critic_head!r}'
    )
  params = {"policy": {"lora": start["lora"]}, "critic": critic}
  frozen = {
    "policy": policy_base,
    "ref": join(policy_base, {"lora": start["lora"]}),
    "reward": reward,
    "critic": scorer_base(run),
  }
  return params, frozen


def _told(run, config, examples, step, info, log) -> dict[str, float]:
  """Writes samples, and says how right the sampled answers are, if that is known."""
  keep = ("tokens", "loss_mask", "scores", "valid", "has_stop", "row_advantages")
  rows = jax.device_get({name: info[name] for name in keep})
  texts = text.responses_text(run.tokenizer, rows["tokens"], rows["loss_mask"])
  order = pipeline.rows_of_step(
    len(examples), config.batch_size, seed=run.config.seed, step=step
  )
  asked = [examples[i] for i in np.repeat(order, config.method.samples)]
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
  on_step=None,
  extra=dict,
  restored=None,
  epochs: int = 1,
  minibatches: int = 1,
) -> TrainState:
  """Builds the state, or restores it, and runs the loop over the stage's steps."""
  optimizer = ConfigDict({**config.optimizer, "steps": steps * epochs * minibatches})
  tx = updates.make_optimizer(optimizer)
  # A copy, for updates donate it, and what it starts from may stay in use.
  make = lambda params: updates.init_state(jax.tree.map(jnp.copy, params), tx)
  # Rules also speak of the optimiser's copies of the parameters, by their paths.
  where = sharding.shard_by_rules(jax.eval_shape(make, params), vlm.SHARDING, run.mesh)
  state = jax.jit(make, out_shardings=where)(params)
  at = str(folder / "checkpoints")
  if checkpoint.latest_step(at) is not None:
    state, kept = checkpoint.restore(at, state)
    if restored is not None:
      restored(kept)
  one = jax.jit(
    updates.make_update(method.loss, tx, microbatches=config.microbatches),
    donate_argnums=0,
    out_shardings=(where, None),
  )
  plan = loop.Plan(
    steps, config.save_every, config.log_every, config.keep, epochs, minibatches
  )
  key = jax.random.fold_in(jax.random.key(run.config.seed), hash_of(stage))
  given = {} if on_step is None else {"on_step": on_step}
  return loop.train(
    method=method,
    update=one,
    state=state,
    frozen=frozen,
    data=data,
    key=key,
    plan=plan,
    folder=str(folder),
    log=log,
    extra=extra,
    **given,
  )


def resume_step(folder: pathlib.Path) -> int | None:
  """The step that a stage goes on from; None if it has not begun."""
  return checkpoint.latest_step(str(folder / "checkpoints"))


def hash_of(name: str) -> int:
  """A number for a stage's name, the same in every process."""
  return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


def _batch(run, examples: Sequence[Example], rows: text.Rows, size, step) -> Batch:
  order = pipeline.rows_of_step(len(examples), size, seed=run.config.seed, step=step)
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
