"""Wraps a policy of a run as a model of lmms-eval, which evaluates it on its tasks.

  python -m lmms_eval --model vlmrlaif_jax --model_args workdir=runs/demo,stage=ppo \
    --tasks videomme --batch_size 16

A document has one video, or images, which are the frames of a video. The policy reads
`model.frames` evenly spaced frames, as in training. One image is repeated.
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

BASE_POLICY = "base"  # Stage name of the weights that a run started from.
MAX_NEW = 1024  # Largest response length if the task sets no max_new_tokens.
PROMPT_BUCKET = 32  # Lengths are multiples of this, so that few shapes are compiled.
# The template inserts the video itself, so placeholders are removed.
_PLACEHOLDER = re.compile(r"<(?:image|video)>\s*")


class LmmsRequest(NamedTuple):
  """A request of lmms-eval."""

  id: str  # Unique; seeds the sampling.
  video: VideoPath
  question: str
  argument: Any  # generation_kwargs, or the continuation to score.


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
    """Loads the weights of a stage.

    Args:
      workdir: Workdir of the run.
      stage: Stage that trained the policy, such as "ppo" or "sft_long"; "base" for the
        weights that the run started from.
      batch_size: Requests per batch. It does not change the responses.
      max_batch_size: Ignored; lmms-eval passes it to every model.
      device: Ignored; JAX uses all its devices.

    Raises:
      FileNotFoundError: The workdir has no run.
      UserError: The stage has not run.
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
    run, items = self._read_requests([request.args for request in requests])
    groups: dict[SamplingSettings, list[LmmsRequest]] = {}
    for item in items:
      if run.features.has(item.video):
        sampling = read_decoding(item.argument)._replace(batch=self.batch)
        groups.setdefault(sampling, []).append(item)
    texts = {}
    for sampling, group in groups.items():
      for item, reply in zip(group, self._generate(run, group, sampling), strict=True):
        texts[item.id] = cut_at_stop(reply, item.argument.get("until") or [])
    return [texts.get(item.id, "") for item in items]

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Scores each continuation as the response to its context.

    Returns:
      (loss, whether the greedy response begins with the continuation). The loss is the
      mean negative log-probability of the continuation's tokens, in nats. lmms-eval
      chooses the option with the lowest loss. The loss is infinite if the video cannot
      be read.
    """
    run, items = self._read_requests([request.args for request in requests])
    valid = [item for item in items if run.features.has(item.video)]
    ids = [item.id for item in valid]
    losses = dict(zip(ids, self._compute_losses(run, valid), strict=True))
    contexts = {item[1:3]: item for item in valid}  # Options share a greedy response.
    max_len = max((self._count_tokens(run, item)[1] for item in valid), default=1)
    greedy = SamplingSettings(
      0, tokenization.round_up_length(max_len, multiple=PROMPT_BUCKET), self.batch
    )
    texts = self._generate(run, list(contexts.values()), greedy)
    replies = dict(zip(contexts, texts, strict=True))
    return [
      (losses[item.id], replies[item[1:3]].startswith(item.argument))
      if item.id in losses
      else (math.inf, False)
      for item in items
    ]

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """Raises NotImplementedError, because policies train on single-round tasks."""
    raise NotImplementedError(
      "vlmrlaif_jax supports tasks of one round only. Choose other --tasks."
    )

  def _read_requests(self, requests: Sequence[tuple]) -> tuple[Run, list[LmmsRequest]]:
    """Returns the run with the features of all videos, and the requests."""
    counts: Counter = Counter()
    items = []
    for context, argument, doc_to_visual, doc_id, task, split in requests:
      doc = self.task_dict[task][split][doc_id]
      if callable(argument):  # The target of a task of the type "loglikelihood".
        argument = argument(doc)
      if isinstance(argument, str):
        argument = argument.strip()  # The template adds the space before it.
      video = self._find_video(doc_to_visual(doc), f"{task} {doc_id}")
      document = f"{task}/{split}/{doc_id}"
      counts[document] += 1  # A repeated request is sampled again.
      id = f"{document}/{counts[document]}"
      items.append(LmmsRequest(id, video, _PLACEHOLDER.sub("", context), argument))
    videos = list(dict.fromkeys(item.video for item in items))
    run = encode_videos(self.run, videos, distributed.print_once)
    for name, reason in run.features.failures.items():
      distributed.print_once(f"{name}: {reason}; its responses are empty")
    return run, items

  def _find_video(self, visuals: Any, document: str) -> VideoPath:
    """Returns the path of a document's video, or the paths of its images.

    Raises:
      ValueError: The document has neither one video nor images.
    """
    visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
    if visuals and all(isinstance(each, Image.Image) for each in visuals):
      folder = self.run.workdir / "lmms" / "images"
      return tuple(save_image(image, folder) for image in visuals)
    if len(visuals) == 1 and isinstance(visuals[0], str | os.PathLike):
      return str(visuals[0])
    kinds = [type(each).__name__ for each in visuals]
    raise ValueError(f"{document} must have one video, or images, got {kinds}")

  def _generate(
    self, run: Run, items: Sequence[LmmsRequest], sampling: SamplingSettings
  ) -> list[str]:
    """Generates a response to each request; pads prompts to the longest one."""
    max_len = max((self._count_tokens(run, item)[0] for item in items), default=1)
    sampling = sampling._replace(
      prompt_len=tokenization.round_up_length(max_len, multiple=PROMPT_BUCKET)
    )
    queries = [JudgeQuery(item.id, item.video, item.question) for item in items]
    answerer = answering.Answerer(run, self.variables, sampling)
    return [first.text for first, *_ in answerer.generate_replies(queries)]

  def _compute_losses(self, run: Run, items: Sequence[LmmsRequest]) -> list[float]:
    """Computes the mean loss of each continuation, without EOS."""
    if not items:
      return []
    config = run.config.copy_and_resolve_references()
    lengths = [self._count_tokens(run, item) for item in items]
    config.data.prompt_len, config.data.response_len = (
      tokenization.round_up_length(max(side), multiple=PROMPT_BUCKET)
      for side in zip(*lengths, strict=True)
    )
    examples = [{"video": item.video, "question": item.question} for item in items]
    texts = [item.argument for item in items]
    run = run._replace(config=config)
    logps = option_logps.compute_option_logps(
      run, self.variables, examples, texts, batch_size=self.batch
    )
    counts = [max(length - 1, 1) for _, length in lengths]  # Without EOS.
    return [-logp / count for logp, count in zip(logps.tolist(), counts, strict=True)]

  def _count_tokens(self, run: Run, item: LmmsRequest) -> tuple[int, int]:
    """Returns the numbers of tokens of the prompt and of the continuation with EOS."""
    video = run.lay_out_video(item.video)
    response = item.argument if isinstance(item.argument, str) else None
    row = tokenization.encode_conversation(
      run.tokenizer, run.template, [(item.question, response)], video=video
    )
    return len(row.ids) - sum(row.learn), sum(row.learn)


def read_decoding(kwargs: Mapping[str, Any]) -> SamplingSettings:
  """Reads a task's generation_kwargs, with the defaults of transformers.

  Raises:
    ValueError: The task requires beam search.
  """
  if (kwargs.get("num_beams") or 1) > 1:
    raise ValueError(
      f"num_beams must be 1, got {kwargs['num_beams']}. Change the task's "
      "generation_kwargs."
    )
  temperature = kwargs.get("temperature")
  samples = kwargs.get("do_sample", bool(temperature))
  return SamplingSettings(
    prompt_len=0,
    max_new=kwargs.get("max_new_tokens") or MAX_NEW,
    batch=0,
    temperature=float(1.0 if temperature is None else temperature) if samples else 0.0,
    top_p=float(kwargs.get("top_p") or 1.0),
    top_k=int(kwargs.get("top_k") or 0),
  )


def cut_at_stop(text: str, until: str | Sequence[str]) -> str:
  """Returns the text before the first stop string.

  >>> cut_at_stop("a cat. It runs", ["It", "."])
  'a cat'
  """
  for stop in [until] if isinstance(until, str) else until:
    text = text.split(stop, 1)[0] if stop else text
  return text


def save_image(image: Image.Image, folder: pathlib.Path) -> str:
  """Writes an image as a PNG file named by a hash of its pixels; returns the path."""
  image = image.convert("RGB")
  digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
  path = folder / f"{digest[:32]}.png"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with open_replacing(path) as file:
      image.save(file, "PNG")
  return str(path)
