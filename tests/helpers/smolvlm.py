"""Tiny random SmolVLM2 models: of transformers, and ours with its weights."""

import functools
import json

import tokenizers
import torch
import transformers

from tests.helpers.checkpoints import shake
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import smolvlm, vlm

IMAGE, START, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
CROPS = [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", START, IMAGE, GLOBAL,
           *CROPS]  # fmt: skip
# The template of the published checkpoints, which renders content parts only.
TEMPLATE = """\
<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}\
{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}\
{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
SIDE, LONGEST = 34, 128  # Of squares, whose margin of 2 pixels is no patch; of images.
PROCESSOR = {
  "do_convert_rgb": True,
  "do_image_splitting": True,
  "do_normalize": True,
  "do_pad": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.5] * 3,
  "image_std": [0.5] * 3,
  "image_processor_type": "SmolVLMImageProcessor",
  "processor_class": "SmolVLMProcessor",
  "max_image_size": {"longest_edge": SIDE},
  "resample": 1,
  "rescale_factor": 1 / 255,
  "size": {"longest_edge": LONGEST},
  "video_sampling": {
    "fps": 1,
    "max_frames": 64,
    "video_size": {"longest_edge": SIDE},
  },
}
TOKENS = 4  # Of a frame: 4 x 4 patches, of which 2 x 2 are merged.


@functools.cache
def make_tokenizer():
  """Bytes, a few words, single digits, and the special tokens of SmolVLM2."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, split])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=split.alphabet(), show_progress=False
  )
  said = [
    "You are provided the following series of forty-two frames from a 0:00:42 [H:MM:SS]"
    " video.\n\nFrame from 00:01: User: Assistant: What happens in the video? The red"
    " ring moves.\n\n"
  ]
  tokenizer.train_from_iterator(said, trainer)
  tokenizer.add_special_tokens(SPECIAL)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<end_of_utterance>",
    bos_token="<|im_start|>", pad_token="<|endoftext|>",
    additional_special_tokens=SPECIAL, chat_template=TEMPLATE,
  )  # fmt: skip


def their_config(**text):
  """The config of a tiny model of transformers."""
  tokenizer = make_tokenizer()
  return transformers.SmolVLMConfig(
    text_config=dict(
      model_type="llama", vocab_size=len(tokenizer), hidden_size=32,
      intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
      eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
      rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **text,
    ),
    vision_config=dict(
      hidden_size=24, intermediate_size=32, num_hidden_layers=2,
      num_attention_heads=2, image_size=SIDE, patch_size=8,
    ),
    scale_factor=2,
    image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    pad_token_id=tokenizer.pad_token_id,
  )  # fmt: skip


def write_checkpoint(folder):
  """A folder with the files of a published one; returns the model of transformers."""
  torch.manual_seed(1)
  hf = shake(transformers.SmolVLMForConditionalGeneration(their_config()))
  hf.generation_config.eos_token_id = make_tokenizer().eos_token_id
  hf.save_pretrained(folder)
  make_tokenizer().save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
  return hf


@functools.cache
def pair():
  """(the model of transformers, ours, our variables)."""
  torch.manual_seed(1)
  hf = shake(transformers.SmolVLMForConditionalGeneration(their_config()))
  model = smolvlm.make_model(hf.config.to_dict(), "float32")
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  shapes = vlm.get_param_shapes(model)
  return hf, model, {"params": convert_from_hf(smolvlm.HF, tensors, shapes)}
