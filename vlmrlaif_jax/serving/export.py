"""PROGRAM: exports a trained stage as a folder that transformers and PEFT load.

`export_stage` is the main function.
"""

import pathlib
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.huggingface import (
  checkpoint_folders,
  checkpoint_layouts,
  convert,
  families,
  param_mapping,
  peft_adapters,
)
from vlmrlaif_jax.huggingface.checkpoint_layouts import HfConfig
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.serving import export_files, model_card
from vlmrlaif_jax.stages.training import server_sampler

# "merged": whole weights of a stage; "adapter": LoRA and projector in PEFT's format;
# "decoder": the base's language model alone, for servers that sample responses.
EXPORT_KINDS = ("merged", "adapter", "decoder")


def export_stage(
  workdir: str,
  stage: str,
  out: str,
  *,
  kind: str = "merged",
  dtype: str = "float32",
  base_model: str | None = None,
  note: Callable[[str], None] = print,
) -> None:
  """Exports a stage of a workdir.

  Args:
    workdir: Workdir of the run.
    stage: Stage that trains the policy, or "rm". A decoder does not depend on it.
    out: Output folder, which must be empty or not exist.
    kind: One of EXPORT_KINDS.
    dtype: Dtype of merged weights. LoRA and heads are always float32.
    base_model: Hub id of the base, for the model card. None omits it.
    note: Receives progress lines.

  Raises:
    UserError: The stage has not run, or files of the base cannot be exported.
    ValueError: `kind` is not valid, `out` is not empty, or `base_model` is no Hub id.
  """
  if kind not in EXPORT_KINDS:
    raise ValueError(f"--kind must be one of {', '.join(EXPORT_KINDS)}, got {kind!r}")
  root, folder = pathlib.Path(workdir), pathlib.Path(out)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty. Remove it, or set another --out.")
  config = ConfigDict(read_json(root / "config.json"))
  part = config.model.reward_model_path if stage == "rm" else ""
  source = run_lib.resolve_checkpoint(part or config.model.path)
  export_files.check_links(source)
  if kind == "decoder":
    write_decoder(folder, source, dtype)
    note(f"{folder}: the language model of {source}, for rollout.engine=vllm")
    return
  run, hf_config = loading.load_run_without_data(
    config, root, note, has_separate_reward_model=stage == "rm"
  )
  if stage == "rm":
    variables = role_params.load_reward_model(run)
  else:
    variables = role_params.load_policy_variables(run, stage)
  folder.mkdir(parents=True, exist_ok=True)
  if kind == "merged":
    write_merged(folder, variables, hf_config, source, config.model, dtype)
  else:
    write_adapter(folder, variables, hf_config, source, config.model, note)
  if "head" in variables["params"]:
    head = param_mapping.convert_to_hf(convert.HEAD_TABLE, variables["params"]["head"])
    save_file(dict(head), folder / "reward_head.safetensors")
  card = model_card.make_model_card(root, stage, kind, base_model=base_model)
  card.save(folder / "README.md")
  size = sum(path.stat().st_size for path in folder.iterdir())
  note(
    f"{folder}: {stage}, {kind}, {size / 1e9:.2f} GB. See its README.md for its use."
  )


def write_decoder(folder: pathlib.Path, source: pathlib.Path, dtype: str) -> None:
  """Writes the language model of a checkpoint as a text model of transformers.

  Args:
    folder: Output folder.
    source: Folder of the checkpoint.
    dtype: Dtype of the written tensors.

  Raises:
    UserError: Servers do not decode the model from embeddings; see check_servable.
  """
  model, variables, config = convert.load_checkpoint(source, dtype=dtype)
  server_sampler.check_servable(model)
  text = config["text_config"]
  kind = text["model_type"]
  table = checkpoint_layouts.DECODER_FAMILIES[kind].HF
  text = {**text, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}
  folder.mkdir(parents=True, exist_ok=True)
  convert.save_tensors(folder, table, variables["params"]["llm"], text, dtype)
  tokens = checkpoint_folders.find_tokenizer_folder(source)
  tokenization.load_tokenizer(tokens).save_pretrained(str(folder))


def write_merged(
  folder: pathlib.Path,
  variables: Params,
  config: HfConfig,
  source: pathlib.Path,
  model: ConfigDict,
  dtype: str,
) -> None:
  """Writes a model of transformers with merged LoRA updates.

  Args:
    folder: Output folder.
    variables: Variables with LoRA updates. A scalar head is omitted.
    config: Config of the base from convert.load_checkpoint.
    source: Folder of the base.
    model: Model section of the run's config.
    dtype: Dtype of the written tensors.
  """
  params = lora.merge_lora(variables, model.lora_alpha)["params"]
  params = {name: tree for name, tree in params.items() if name != "head"}
  if config["model_type"] in families.FAMILIES:
    _copy_files(folder, source, config, model)
  else:
    config = _write_files(folder, source, config, model)
    params, config = add_image_token(params, config)
  convert.save_checkpoint(
    folder, params, config, dtype, train_merger=model.train_merger
  )


def add_image_token(params: Params, config: HfConfig) -> tuple[Params, HfConfig]:
  """Extends the vocabulary to the id that marks an image in transformers.

  The original LLaVA has no such id. The new rows are copies of id 0, <unk>, so an added
  token is never more likely than <unk>.
  """
  text = config["text_config"]
  more = config["image_token_index"] + 1 - text["vocab_size"]
  if more <= 0:
    return params, config
  llm = params["llm"]
  rows = llm["embed"]["embedding"]
  wide = {**llm, "embed": {"embedding": jnp.concatenate([rows, *[rows[:1]] * more])}}
  if "lm_head" in llm:  # Otherwise, the embedding is the output matrix.
    head = llm["lm_head"]["kernel"]
    wide["lm_head"] = {"kernel": jnp.concatenate([head, *[head[:, :1]] * more], axis=1)}
  text = {**text, "vocab_size": text["vocab_size"] + more}
  return {**params, "llm": wide}, {**config, "text_config": text}


def write_adapter(
  folder: pathlib.Path,
  variables: Params,
  config: HfConfig,
  source: pathlib.Path,
  model: ConfigDict,
  note: Callable[[str], None],
) -> None:
  """Writes a PEFT adapter for transformers: LoRA, and the whole projector if trained.

  Args:
    folder: Output folder.
    variables: Variables with LoRA updates. A scalar head is omitted.
    config: Config of the base from convert.load_checkpoint.
    source: Folder of the base.
    model: Model section of the run's config.
    note: Receives a line if transformers cannot load the adapter's base.

  Raises:
    UserError: A trained parameter is not in a module, which an adapter requires.
  """
  table = convert.make_table(config, train_merger=model.train_merger)
  projector = {"projector": variables["params"].get("projector", {})}
  whole = dict(param_mapping.convert_to_hf(table, projector))
  modules = _list_whole_modules(config, whole)
  if config["model_type"] in families.FAMILIES:
    _copy_files(folder, source, config, model)
  else:
    image = _write_files(folder, source, config, model)["image_token_index"]
    base = read_json(source / "config.json", default={})
    if base.get("model_type") != "llava" or config["image_token_index"] != image:
      note(
        f"{source} is no LLaVA of transformers with the image token {image}, so only "
        "launch/chat.py loads the adapter. Export --kind=merged for transformers."
      )
  layers = _name_in_memory(table["llm/blocks/q/kernel"][0].split("{}")[0])
  joined = jax.device_get(lora.join_lora(variables, model.lora_alpha)["llm"])
  factors = peft_adapters.convert_to_peft(joined)
  tensors = {name.replace("model.layers.", layers): x for name, x in factors.items()}
  for name, x in whole.items():
    tensors[f"base_model.model.{_name_in_memory(name)}"] = x
  matrices = "|".join(peft_adapters.ADAPTED_MODULES)
  peft_adapters.save_adapter(
    folder,
    tensors,
    base=str(source),
    # The vision tower may have matrices of the same names.
    target_modules=rf"{re.escape(layers)}\d+\..*\.({matrices})",
    modules_to_save=modules,
  )


def _name_in_memory(name: str) -> str:
  """Maps the name of a tensor in a table to its name in transformers 5."""
  name = name.replace("language_model.model.", "model.language_model.")
  return name.replace("multi_modal_projector.", "model.multi_modal_projector.")


def _list_whole_modules(config: HfConfig, names: Iterable[str]) -> list[str] | None:
  """Lists the modules that an adapter contains whole; None for none.

  PEFT does not wrap lists of modules, so each module of a list counts by itself.

  Args:
    config: Config of the base.
    names: Names of the tensors of the projector.

  Raises:
    UserError: A tensor is not in a module.
  """
  if config["model_type"] not in families.FAMILIES:
    return ["multi_modal_projector"]
  mergers = families.FAMILIES[config["model_type"]].models.MERGERS
  whole = re.compile(rf"(?:^|\.)((?:{'|'.join(mergers.values())})(?:\.\d+)?)\.")
  modules = set()
  for name in names:
    if (match := whole.search(name)) is None:
      raise UserError(
        f"SFT trains {name} with model.train_merger, but an adapter of PEFT contains "
        f"only whole modules and LoRA of matrices, and {name} is neither. Set "
        "--kind=merged."
      )
    modules.add(match[1])
  return sorted(modules) or None


def _copy_files(
  folder: pathlib.Path, source: pathlib.Path, config: HfConfig, model: ConfigDict
) -> None:
  """Copies the tokenizer and the processor of a base, with the limits of the run."""
  export_files.copy_files(folder, source, model.template)
  limits = model.fps, model.max_frames, model.max_pixels
  if any(limits):
    place = checkpoint_folders.find_processor_folder(source)
    processor = families.read_processor(place, config).limit(*limits)
    export_files.write_limits(folder, source, processor)


def _write_files(
  folder: pathlib.Path, source: pathlib.Path, config: HfConfig, model: ConfigDict
) -> HfConfig:
  return export_files.write_files(
    folder, source, config, template=model.template, frames=model.frames
  )
