"""What every program starts from: models and weights on the mesh, data, features."""

import hashlib
import importlib.resources
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vlmrlaif_jax import adapters, convert, hosts, layouts, sharding
from vlmrlaif_jax.data import features, pipeline, records, text
from vlmrlaif_jax.data.prompts import STYLES, Prompts
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.log import replace_text
from vlmrlaif_jax.models import projector, quant, vlm
from vlmrlaif_jax.phases import Phases, shares
from vlmrlaif_jax.types import Params
from vlmrlaif_jax.watch import NO_WATCH, Watch

BUILTIN = "builtin:"  # A checkpoint that the package ships: "builtin:tiny".


class Run(NamedTuple):
  """A run's models, weights, data and places; made once, used by all its stages."""

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  policy: vlm.VLM
  scorer: vlm.VLM  # With a scalar head: the reward model and the critic.
  base: Params  # {"params": ...} of the policy, frozen; "quant" too if quantised.
  scorer_base: Params  # Of the scorer; the same arrays if it is the same checkpoint.
  tokenizer: text.PreTrainedTokenizerBase
  template: text.Template
  eos: int  # The id that ends an answer.
  prompts: Prompts
  splits: pipeline.Splits
  features: features.Store
  watch: Watch = NO_WATCH  # Of the stage that is being run.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      path=BUILTIN + "tiny",  # A LLaVA checkpoint in Hugging Face's form.
      scorer_path="",  # That of the reward model and critic; "": the same.
      tower="",  # A CLIP or SigLIP folder, for a checkpoint that has no vision tower.
      template="brief",  # Of data/text.py.
      prompts="brief",  # Of data/prompts.py.
      frames=12,  # Of each video.
      clip_frames=4,  # Of each part that is captioned by itself.
      lora_rank=16,
      lora_alpha=32.0,
      dtype="float32",  # Of the computation.
      remat="none",  # Recompute "full" layers, or all but "dots": less memory, slower.
      attention="auto",  # Or a backend of attention.attend; see attention_of.
      quant="none",  # Of the frozen layers: "nf4", "nf4_double" (QLoRA) or "int8".
      quant_kernel="xla",  # Or "pallas": NF4 on TPUs, never written in 16 bits.
      # To plan with while nothing is at the paths: keys of plan_run.SIZES.
      size="",
      scorer_size="",
    )
  )


def resolve(path: str) -> pathlib.Path:
  """The folder of a checkpoint.

  Raises:
    FileNotFoundError: there is none, with what to put there.
  """
  if path.startswith(BUILTIN):
    name = path.removeprefix(BUILTIN)
    folder = pathlib.Path(str(importlib.resources.files("vlmrlaif_jax")))
    folder = folder / "assets" / name
  else:
    folder = pathlib.Path(path)
  # PEFT's adapters have no config.json.
  if not (folder / "config.json").exists() and adapters.find(folder) is None:
    raise FileNotFoundError(
      f"no checkpoint at {folder}: put there a LLaVA checkpoint in Hugging Face's form "
      "(config.json, *.safetensors, tokenizer files), or give another config.model.path"
    )
  return folder


def make(
  config: ConfigDict,
  workdir: pathlib.Path,
  note=hosts.tell,
  watch: Watch = NO_WATCH,
) -> Run:
  """Loads models and data, and encodes all videos that are not encoded yet.

  Writes checkpoints.json: which layout each model was found in.

  Args:
    note: takes a line of text that tells how far it is.
    watch: asked between batches of videos whether to end.
  """
  mesh = sharding.make_mesh(**config.mesh)
  policy_path = resolve(config.model.path)
  scorer_path = resolve(config.model.scorer_path or config.model.path)
  read: list[str] = []  # A line for each checkpoint.

  def tell(line):
    read.append(line)
    note(line)

  policy, base, _ = load(config.model, policy_path, mesh, tell, scalar_head=False)
  scorer, scorer_base = policy.clone(scalar_head=True), base
  if scorer_path != policy_path:
    scorer, scorer_base, _ = load(
      config.model, scorer_path, mesh, tell, scalar_head=True
    )
  _check_same_tower(base, scorer_base)
  lines = json.dumps({"policy": read[0], "scorer": read[-1]}, indent=2)
  workdir.mkdir(parents=True, exist_ok=True)
  hosts.once(lambda: replace_text(workdir / "checkpoints.json", lines))
  if config.model.prompts not in STYLES:
    raise ValueError(
      f"model.prompts must be one of {sorted(STYLES)}, not {config.model.prompts!r}"
    )
  splits = _load_splits(config, workdir / "world")
  store = _encode_videos(config, workdir, mesh, policy, base, splits, note, watch)
  splits = _without_failures(splits, store)
  if splits.problems:
    kept = {e["id"] for part in splits[:-1] for e in part}
    total = len(kept) + len(splits.problems)
    note(records.report_problems(splits.problems, total=total))
  tokenizer = text.load_tokenizer(layouts.tokenizer_folder(policy_path))
  template = text.template_named(config.model.template)
  return Run(
    config,
    workdir,
    mesh,
    policy,
    scorer,
    base,
    scorer_base,
    tokenizer,
    template,
    text.end_id(tokenizer, template),
    STYLES[config.model.prompts],
    splits,
    store,
  )


def load(
  model: ConfigDict, path: pathlib.Path, mesh: Mesh, note, *, scalar_head: bool
) -> tuple[vlm.VLM, Params, convert.Config]:
  """What convert.load_llava returns, by the section "model" of a config.

  Raises:
    ValueError: as load_llava; or model.quant_kernel does not do what it is to do.
  """
  _check_quant_kernel(model, mesh)
  made, variables, config = convert.load_llava(
    path,
    rank=model.lora_rank,
    alpha=model.lora_alpha,
    dtype=model.dtype,
    remat=model.remat,
    scalar_head=scalar_head,
    mesh=mesh,
    tower=model.tower,
    attention=attention_of(model, mesh),
    quant=model.quant,
    quant_kernel=model.quant_kernel,
    note=note,
  )
  llm = made.llm.clone(unstack=on_cpu(mesh))
  return made.clone(llm=llm), variables, config


def on_cpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == "cpu"


def attention_of(model: ConfigDict, mesh: Mesh) -> str:
  """The language model's attention of whole rows; "auto" is what suits the devices:
  "chunked" on CPUs, and elsewhere "xla", which needs no kernel."""
  if model.attention != "auto":
    return model.attention
  return "chunked" if on_cpu(mesh) else "xla"


def _check_quant_kernel(model: ConfigDict, mesh: Mesh) -> None:
  """Refuses a kernel that is not there, or not for this base or mesh."""
  kernel, tensor = model.quant_kernel, mesh.shape["tensor"]
  if kernel not in quant.BACKENDS:
    raise ValueError(
      f"model.quant_kernel must be one of {sorted(quant.BACKENDS)}, not {kernel!r}"
    )
  if kernel == "pallas" and model.quant not in ("nf4", "nf4_double"):
    raise ValueError(
      f'model.quant_kernel="pallas" is for NF4, not for model.quant={model.quant!r}: '
      "set model.quant=nf4 or nf4_double, or model.quant_kernel=xla"
    )
  if kernel == "pallas" and tensor > 1:
    raise ValueError(
      f'model.quant_kernel="pallas" cannot split matrices over mesh.tensor={tensor} '
      "devices: set mesh.tensor=1, or model.quant_kernel=xla"
    )


def _load_splits(config: ConfigDict, folder: pathlib.Path) -> pipeline.Splits:
  """The splits; the embedded world is rendered by process 0 before others read it."""
  load = lambda: pipeline.load(config.data, folder, seed=config.seed)
  if hosts.several():
    hosts.once(lambda: load() and None)
  return load()


def _encode_videos(
  config, workdir, mesh, policy, base, splits, note, watch
) -> features.Store:
  """The vision tower's features of every video of every split."""
  videos = [e["video"] for part in splits[:-1] for e in part]
  if config.rm.preferences:
    given, _ = records.read_preferences(
      config.rm.preferences, videos=videos_folder(config, workdir)
    )
    videos += [pair["video"] for pair in given]
  return _encode(config, workdir, mesh, policy, base, videos, note, watch)


def encode_videos(
  run: Run, videos: Sequence[VideoPath], note=hosts.tell
) -> features.Store:
  """The features of more videos than those of the splits."""
  return _encode(
    run.config, run.workdir, run.mesh, run.policy, run.base, videos, note, run.watch
  )


def _encode(config, workdir, mesh, policy, base, videos, note, watch) -> features.Store:
  jobs = {features.name_of(video): video for video in videos}
  digest, encode, shards = _encoder(policy, base, mesh)
  data, phases = config.data, Phases()
  folder = pathlib.Path(data.features) if data.features else workdir / "features"
  made_so_far = f"the features made so far are in {folder}"
  # Several processes have shares of their own, and agree on nothing while they work.
  check = lambda: hosts.several() or watch.check(made_so_far)

  def build(part) -> features.Store:
    return features.build(
      part,
      folder,
      encoder=digest,
      encode=encode,
      count=config.model.frames,
      size=policy.vision.image,
      batch=text.bucket(32, multiple=shards),
      workers=data.workers,
      timeout_s=data.timeout_s,
      limit_gb=data.features_limit_gb,
      memory_gb=data.features_memory_gb,
      note=note,
      check=check,
      phase=phases,
    )

  store = _encoded_by_all(build, list(jobs.values()))
  seconds = phases.taken()
  if "encode" in seconds:
    note(f"features: done in {sum(seconds.values()):.0f} s ({shares(seconds)})")
  return store


def _encoder(policy: vlm.VLM, base: Params, mesh: Mesh):
  """(name of the tower's weights, from pixels to features, how many rows at once are
  spread). Each of several processes encodes by itself, on its own devices."""
  tower = {"vision": hosts.fetch(base["params"]["vision"])}
  digest = _digest(tower)
  variables = base
  if hosts.several():
    mesh = mesh.local_mesh
    variables = {"params": sharding.replicate(tower, mesh)}
  run, rows = encoder(policy, mesh), NamedSharding(mesh, sharding.ROWS)
  encode = lambda pixels: np.asarray(run(variables, jax.device_put(pixels, rows)))
  return digest, encode, row_shards(mesh)


def _encoded_by_all(build, videos: Sequence[VideoPath]) -> features.Store:
  """The store of all videos, of which each process encodes its share."""
  if not hosts.several():
    return build(videos)
  store = build(hosts.part_of(videos))
  told = {
    "files": {name: str(path) for name, path in store.files.items()},
    "failures": store.failures,
  }
  files, failures = {}, {}
  for part in hosts.share(lambda: told):
    files |= {name: pathlib.Path(path) for name, path in part["files"].items()}
    failures |= part["failures"]
  return store._replace(files=files, failures=failures)


def encoder(policy: vlm.VLM, mesh: Mesh) -> Callable[[Params, Array], Array]:
  """The vision tower, compiled at its first call; whole on every device.

  Left to choose, a compiler splits its matrices as they are held and gives every
  device all images, of which there are more than weights.
  """
  whole = NamedSharding(mesh, PartitionSpec())

  def encode(base, pixels):
    tower = jax.lax.with_sharding_constraint(base["params"]["vision"], whole)
    variables = {"params": {**base["params"], "vision": tower}}
    return policy.apply(variables, pixels, method="encode")

  return jax.jit(encode)


def features_of(run: Run, video: VideoPath) -> str:
  """A video by its features' name: by what it shows, not by where it lies."""
  return run.features.files[features.name_of(video)].stem


def row_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are spread in."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def videos_folder(config: ConfigDict, workdir: pathlib.Path) -> str | pathlib.Path:
  """The folder that the records name their videos from."""
  return config.data.videos or workdir / "world" / "videos"


def _digest(tower: Params) -> str:
  """Names the weights of the vision tower."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tower):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def _check_same_tower(base: Params, scorer_base: Params) -> None:
  """Refuses a reward model that would be shown another tower's features."""
  if scorer_base is base:
    return
  # One of them may have been kept in float16 and the other in bfloat16.
  close = lambda a, b: a.shape == b.shape and jnp.allclose(a, b, rtol=0.02, atol=1e-3)
  towers = base["params"]["vision"], scorer_base["params"]["vision"]
  if not all(jax.tree.leaves(jax.tree.map(close, *towers))):
    raise ValueError(
      "model.path and model.scorer_path hold different vision towers; videos are "
      "encoded once, for both: give checkpoints that share a frozen tower"
    )


def _without_failures(splits, store: features.Store):
  """The splits without the samples whose video cannot be read, which are told of."""
  problems = list(splits.problems)
  parts = []
  for part in splits[:-1]:
    parts.append([e for e in part if store.has(e["video"])])
    problems += [
      records.Problem(e["id"], store.failures[features.name_of(e["video"])])
      for e in part
      if not store.has(e["video"])
    ]
  # A record may stand in two splits: that of the prompts is often that of SFT.
  return pipeline.Splits(*parts, problems=list(dict.fromkeys(problems)))


def video_tokens(run: Run, frames: int) -> int:
  """How many tokens a video of so many frames takes."""
  tower = run.policy.vision
  return projector.pooled_tokens(frames, (tower.image // tower.patch) ** 2)


def trainable(model: vlm.VLM, mesh: Mesh) -> Params:
  """Shapes and shardings of a model's LoRA factors, and of its head, if it has one."""
  shapes = convert.variable_shapes(model)
  trained = {"lora": shapes["lora"]}
  if model.scalar_head:
    trained["params"] = {"head": shapes["params"]["head"]}
  where = sharding.shard_by_rules(trained, vlm.SHARDING, mesh)
  return jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), trained, where
  )


def fresh(shapes: Params, key: jax.Array) -> Params:
  """Arrays for what `trainable` says: LoRA that changes nothing, a small random head.

  Computed from the shapes alone: compiling the model's own init would take longer than
  many a stage.
  """
  he = jax.nn.initializers.he_uniform(in_axis=-2, out_axis=-1, batch_axis=0)

  def make(path, leaf):
    name = sharding.path_of(path)
    if name.endswith("/a"):
      value = he(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape)
    elif name.endswith("head/kernel"):
      bound = leaf.shape[0] ** -0.5  # As the original: reward_model.py:165.
      value = jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
    else:
      value = jnp.zeros(leaf.shape)
    return sharding.place(value.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(make, shapes)


def stack_features(
  store: features.Store, videos: Iterable[str | Sequence[str]]
) -> Float[np.ndarray, "batch frames patches channels"]:
  """The features of a batch's videos, in float16, which the projector casts."""
  return np.stack([store.get(video) for video in videos])
