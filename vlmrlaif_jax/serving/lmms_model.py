"""A policy of a run as a model of lmms-eval, which then runs its benchmarks on it.

  python -m lmms_eval --model vlmrlaif_jax --model_args workdir=runs/demo,stage=ppo \
    --tasks videomme --batch_size 16

A document shows one video, or images. Images are the frames of a video. Of either the
policy reads `model.frames` evenly spaced frames, as in training: one image is repeated.
"""

import hashlib
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.files import open_replacing
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, loading, role_params
from vlmrlaif_jax.runtime.answering import SamplingSettings
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import encode_videos
from vlmrlaif_jax.serving import chat_session
from vlmrlaif_jax.stages.evaluation import option_logps

BASE_POLICY = "base"  # The stage name of the weights that a run started from.
MAX_NEW = 1024  # Tokens of a response unless the task sets max_new_tokens.
PROMPT_BUCKET = (
  32  # Tokens that lengths are multiples of, so that few shapes are compiled.
)
# The template puts the video in its own place.
_PLACEHOLDER = re.compile(r"<(?:image|video)>\s*")


class LmmsRequest(NamedTuple):
  """A request of lmms-eval."""

  id: str  # Unique; what is sampled depends on it.
  video: VideoPath
  question: str
  given: Any  # generation_kwargs, or the continuation to score.


class VlmRlaif(lmms):
  """A trained policy that answers the requests of lmms-eval's tasks."""

  def __init__(
    self,
    workdir: str,
    stage: str,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """Loads the weights that a stage left in a workdir.

    Args:
      workdir: of a run.
      stage: that trained the policy, such as "ppo" or "sft_long"; "base" for the
        weights that the run started from.
      batch_size: requests at a time. It does not change the responses.
      max_batch_size: ignored; lmms-eval passes it to every model.
      device: ignored; JAX uses all its devices.

    Raises:
      FileNotFoundError: no run in the workdir.
      UserError: the stage has not been run.
    """
    super().__init__()
    root = pathlib.Path(workdir)
    config = chat_session.read_config(root)
    self.run, _ = loading.load_run_without_data(
      config, root, distributed.print_once, has_separate_reward_model=False
    )
    self.variables = (
      self.run.base
      if stage == BASE_POLICY
      else role_params.load_policy_variables(self.run, stage)
    )
    shards = sharding.num_batch_shards(self.run.mesh)
    self.batch = tokenization.round_up_length(int(batch_size), multiple=shards)

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Returns a response to each request, cut before the first stop string.

    The response is empty if the video cannot be read; the reason is logged.
    """
    run, asked = self._encoded([request.args for request in requests])
    groups: dict[SamplingSettings, list[LmmsRequest]] = {}
    for each in asked:
      if run.features.has(each.video):
        sampling = read_decoding(each.given)._replace(batch=self.batch)
        groups.setdefault(sampling, []).append(each)
    texts = {}
    for sampling, part in groups.items():
      for each, reply in zip(part, self._answers(run, part, sampling), strict=True):
        texts[each.id] = cut_at_stop(reply, each.given.get("until") or [])
    return [texts.get(each.id, "") for each in asked]

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Scores each continuation as the response to its context.

    Returns:
      (loss, whether the greedy response begins with the continuation). The loss is the
      mean negative log-probability of the continuation's tokens, in nats: lmms-eval
      chooses the option with the lowest. It is infinite if the video cannot be read.
    """
    run, asked = self._encoded([request.args for request in requests])
    seen = [each for each in asked if run.features.has(each.video)]
    losses = dict(zip((s.id for s in seen), self._losses(run, seen), strict=True))
    contexts = {each[1:3]: each for each in seen}  # Options share a greedy response.
    longest = max((self._lengths(run, each)[1] for each in seen), default=1)
    greedy = SamplingSettings(
      0, tokenization.round_up_length(longest, multiple=PROMPT_BUCKET), self.batch
    )
    replies = self._answers(run, list(contexts.values()), greedy)
    said = dict(zip(contexts, replies, strict=True))
    return [
      (losses[each.id], said[each[1:3]].startswith(each.given))
      if each.id in losses
      else (math.inf, False)
      for each in asked
    ]

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """Raises: the policies are not trained on tasks of several rounds."""
    raise NotImplementedError("vlmrlaif_jax answers tasks of one round only")

  def _encoded(self, requests: Sequence[tuple]) -> tuple[Run, list[LmmsRequest]]:
    """Returns the requests, and the run with the features of their videos."""
    counts: Counter = Counter()
    asked = []
    for context, given, doc_to_visual, doc_id, task, split in requests:
      doc = self.task_dict[task][split][doc_id]
      if callable(given):  # The target of a task of the type "loglikelihood".
        given = given(doc)
      if isinstance(given, str):
        given = given.strip()  # The template has a space of its own.
      video = self._video(doc_to_visual(doc), f"{task} {doc_id}")
      place = f"{task}/{split}/{doc_id}"
      counts[place] += 1  # A request may be repeated, to be sampled again.
      id = f"{place}/{counts[place]}"
      asked.append(LmmsRequest(id, video, _PLACEHOLDER.sub("", context), given))
    videos = list(dict.fromkeys(each.video for each in asked))
    run = encode_videos(self.run, videos, distributed.print_once)
    for name, reason in run.features.failures.items():
      distributed.print_once(f"{name}: {reason}: its responses are empty")
    return run, asked

  def _video(self, visuals: Any, place: str) -> VideoPath:
    """Returns the path of the document's video, or those of its images.

    Raises:
      ValueError: neither one video nor images.
    """
    visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
    if visuals and all(isinstance(each, Image.Image) for each in visuals):
      folder = self.run.workdir / "lmms" / "images"
      return tuple(save_image(image, folder) for image in visuals)
    if len(visuals) == 1 and isinstance(visuals[0], str | os.PathLike):
      return str(visuals[0])
    kinds = [type(each).__name__ for each in visuals]
    raise ValueError(f"{place} must have one video, or images, not {kinds}")

  def _answers(
    self, run: Run, asked: Sequence[LmmsRequest], sampling: SamplingSettings
  ) -> list[str]:
    """Returns a response to each; prompts have room for the longest of them."""
    longest = max((self._lengths(run, each)[0] for each in asked), default=1)
    sampling = sampling._replace(
      prompt_len=tokenization.round_up_length(longest, multiple=PROMPT_BUCKET)
    )
    queries = [JudgeQuery(each.id, each.video, each.question) for each in asked]
    answerer = answering.Answerer(run, self.variables, sampling)
    return [first.text for first, *_ in answerer.generate_replies(queries)]

  def _losses(self, run: Run, asked: Sequence[LmmsRequest]) -> list[float]:
    """Returns the mean loss of each continuation, without the end token."""
    if not asked:
      return []
    config = run.config.copy_and_resolve_references()
    lengths = [self._lengths(run, each) for each in asked]
    config.data.prompt_len, config.data.response_len = (
      tokenization.round_up_length(max(side), multiple=PROMPT_BUCKET)
      for side in zip(*lengths, strict=True)
    )
    examples = [{"video": each.video, "question": each.question} for each in asked]
    texts = [each.given for each in asked]
    run = run._replace(config=config)
    logps = option_logps.compute_option_logps(
      run, self.variables, examples, texts, batch_size=self.batch
    )
    counts = [max(length - 1, 1) for _, length in lengths]  # Less the end token.
    return [-logp / count for logp, count in zip(logps.tolist(), counts, strict=True)]

  def _lengths(self, run: Run, asked: LmmsRequest) -> tuple[int, int]:
    """Returns the tokens of the prompt, and of a continuation with its end."""
    count = run.policy.count_video_tokens(run.config.model.frames)
    said = asked.given if isinstance(asked.given, str) else None
    row = tokenization.encode_conversation(
      run.tokenizer, run.template, [(asked.question, said)], video_tokens=count
    )
    return len(row.ids) - sum(row.learn), sum(row.learn)


def read_decoding(given: Mapping[str, Any]) -> SamplingSettings:
  """Reads a task's generation_kwargs, with the defaults of transformers.

  Raises:
    ValueError: the task requires beam search.
  """
  if (given.get("num_beams") or 1) > 1:
    raise ValueError(f"num_beams must be 1, not {given['num_beams']}")
  temperature = given.get("temperature")
  samples = given.get("do_sample", bool(temperature))
  return SamplingSettings(
    prompt_len=0,
    max_new=given.get("max_new_tokens") or MAX_NEW,
    batch=0,
    temperature=float(1.0 if temperature is None else temperature) if samples else 0.0,
    top_p=float(given.get("top_p") or 1.0),
    top_k=int(given.get("top_k") or 0),
  )


def cut_at_stop(text: str, until: str | Sequence[str]) -> str:
  """Returns the text before the first of the stop strings.

  >>> cut_at_stop("a cat. It runs", ["It", "."])
  'a cat'
  """
  for stop in [until] if isinstance(until, str) else until:
    text = text.split(stop, 1)[0] if stop else text
  return text


def save_image(image: Image.Image, folder: pathlib.Path) -> str:
  """Writes an image as a PNG file named for its pixels; returns the path."""
  image = image.convert("RGB")
  digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
  path = folder / f"{digest[:32]}.png"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with open_replacing(path) as file:
      image.save(file, "PNG")
  return str(path)
