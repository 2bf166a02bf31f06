"""What bench.py measures, in PyTorch: transformers' Llama and PEFT's LoRA.

The usual settings: SDPA attention, gradient checkpointing, autocast to bfloat16 for the
float32 factors (as the Trainer's bf16=True), no torch.compile.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Int
from transformers import LlamaConfig, LlavaForConditionalGeneration

from vlmrlaif_jax import layouts
from vlmrlaif_jax.models import llama


def device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
  """As JAX names it."""
  return torch.cuda.get_device_name() if device() == "cuda" else "cpu"


def software() -> str:
  return f"torch {torch.__version__}, transformers {transformers.__version__}"


def wait() -> None:
  """Until the device is done."""
  if device() == "cuda":
    torch.cuda.synchronize()


def make(llm: llama.Model) -> transformers.PreTrainedModel:
  """Random weights in bfloat16, of a model's shape."""
  config = LlamaConfig(
    **layouts.give({name: llama.CONFIG[name] for name in _SHAPE}, llm),
    bos_token_id=None,
    eos_token_id=None,  # Answers are all of the same length.
    pad_token_id=0,
  )
  with torch.device(device()):
    return transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )


_SHAPE = ("vocab", "embed", "mlp", "layers", "heads", "kv_heads")


def load(folder: Path) -> None:
  """A LLaVA checkpoint onto the device; needs accelerate, which PEFT brings."""
  LlavaForConditionalGeneration.from_pretrained(
    folder, dtype=torch.bfloat16, device_map=device()
  )
  wait()


def sft_step(
  llm: llama.Model,
  tokens: Int[np.ndarray, "batch time"],
  loss_mask: Bool[np.ndarray, "batch time"],
) -> Callable[[], None]:
  """A step of LoRA fine-tuning on the same batch, without its video."""
  import peft  # Of the extra "bench".

  settings = peft.LoraConfig(
    r=llm.rank, lora_alpha=llm.alpha, target_modules="all-linear"
  )
  model = peft.get_peft_model(make(llm), settings)
  model.gradient_checkpointing_enable({"use_reentrant": False})
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=3e-5, weight_decay=0.0)
  ids = torch.tensor(tokens, dtype=torch.long, device=device())
  labels = ids.masked_fill(~torch.tensor(loss_mask, device=device()), -100)

  def step():
    with torch.autocast(device(), dtype=torch.bfloat16):
      loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    wait()

  return step


def answers_of(llm: llama.Model) -> Callable[..., Callable[[], None]]:
  """(prompts, new) -> a run that adds so many tokens to each prompt, greedily."""
  model = make(llm).eval()

  def answers(prompts: Int[np.ndarray, "batch time"], new: int):
    ids = torch.tensor(prompts, dtype=torch.long, device=device())
    length = dict(max_new_tokens=new, min_new_tokens=new)

    def run():
      mask = torch.ones_like(ids)
      out = model.generate(ids, attention_mask=mask, do_sample=False, **length)
      if out.shape[1] != ids.shape[1] + new:
        raise ValueError(f"{new} new tokens were asked for; there are {out.shape}")
      wait()

    return run

  return answers
