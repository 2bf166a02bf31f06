import torch
import transformers

from tests.helpers.checkpoints import shake
from tools.pretraining import convert_clip


def test_transformers_loads_what_save_writes(tmp_path):
  side = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
  config = transformers.CLIPConfig(
    text_config=dict(
      **side,
      num_hidden_layers=2,
      vocab_size=50,
      max_position_embeddings=8,
      bos_token_id=1,
      eos_token_id=49,
    ),
    vision_config=dict(**side, num_hidden_layers=3, image_size=8, patch_size=4),
    projection_dim=12,
  )
  hf = shake(transformers.CLIPModel(config))
  hf.save_pretrained(tmp_path / "theirs")
  model, params, config = convert_clip.load(tmp_path / "theirs")
  assert (model.features, model.text.context, model.vision.layers) == (12, 8, 3)
  convert_clip.save(tmp_path / "ours", params, config, dtype="float32")
  again = transformers.CLIPModel.from_pretrained(tmp_path / "ours")
  for name, tensor in hf.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
