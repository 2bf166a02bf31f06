"""Prompts of an export: token ids, images and stops are those of its policy."""

import json
import os
import shutil

import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import transformers
from PIL import Image

from tests.helpers import exports
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.models import clip
from vlmrlaif_jax.serving import chat_template, export_files

IMAGE = Image.fromarray(np.zeros((20, 24, 3), np.uint8))
TALKS = [
  [(" What is the small red ring doing?\n", None)],
  [("1 or 2 dogs?\n\nSay <no> more.", None)],
  [("\tnaïve café", "It moves left. "), ("猫が二匹。", None)],
  [("What?", "A dog."), ("Why?", "It barks."), ("Sure?", None)],
]


@pytest.fixture(scope="module", params=exports.PAIRS, ids=".".join)
def exported(request, tmp_path_factory):
  """A pair of tokenizer and template: the base, the template, the export."""
  name, template = request.param
  root = tmp_path_factory.mktemp("export")
  base = exports.write_tokenizer(root / "base", name)
  return base, template, exports.write_files(root / "out", base, template)


# Token ids.


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_ids_of_the_processor_are_those_of_the_policy(exported, image):
  base, template, folder = exported
  for turns in TALKS:
    messages = exports.make_messages(turns, image)
    found = exports.their_inputs(folder, messages)["input_ids"][0].tolist()
    mark = exports.read_tokenizer(folder).convert_tokens_to_ids("<image>")
    patches = 16 if image else 0
    want = exports.our_ids(base, template, turns, mark, patches=patches)
    assert found == want


def test_ids_of_the_tokenizer_are_those_of_the_processor(exported):
  *_, folder = exported
  tokenizer = exports.read_tokenizer(folder)
  messages = exports.make_messages(TALKS[3])
  own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
  assert own == exports.their_inputs(folder, messages)["input_ids"][0].tolist()


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_export_that_is_loaded_here_has_the_ids_of_its_policy(exported, image):
  base, template, folder = exported
  for turns in TALKS:
    found, want = (
      exports.our_ids(where, name, turns, -1, patches=16 * image)
      for where, name in ((folder, "chat_template"), (base, template))
    )
    assert found == want


@pytest.mark.parametrize("system", ["Answer in one word.", " You are a cat.\n", ""])
def test_system_prompt_takes_the_place_of_the_template_s_own(exported, system):
  base, template, folder = exported
  messages = exports.make_messages(TALKS[3], system=system)
  found = exports.their_inputs(folder, messages)["input_ids"][0].tolist()
  want = exports.our_ids(base, template, TALKS[3], -1, system=system)
  assert found == want


# What an answer ends with, and what cannot be in it.


def test_generation_stops_where_the_policy_does_and_nowhere_else(exported):
  base, template, folder = exported
  tokenizer = exports.read_tokenizer(base)
  eos = tokenization.find_eos_id(tokenizer, tokenization.get_template(template))
  assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [eos]


@pytest.fixture
def base(tmp_path):
  """A base with files that would change the answers of its export."""
  folder = exports.write_tokenizer(tmp_path / "base", "qwen")
  for name, content in {
    "generation_config.json": {
      "do_sample": True,
      "temperature": 0.6,
      "eos_token_id": 0,
    },
    "processor_config.json": {"patch_size": 7, "chat_template": "{{ 'no' }}"},
    "preprocessor_config.json": {"image_processor_type": "ViTImageProcessor"},
    "chat_template.json": {"chat_template": "{{ 'no' }}"},
  }.items():
    (folder / name).write_text(json.dumps(content))
  return folder


def test_settings_of_the_base_do_not_come_along(base, tmp_path):
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  generation = transformers.GenerationConfig.from_pretrained(folder)
  assert generation.do_sample is False and generation.temperature is None
  processor = exports.read_processor(folder)
  assert processor.patch_size == 4
  assert "Answer" in processor.apply_chat_template(
    exports.make_messages([("Answer.", None)])
  )
  assert not (folder / "chat_template.json").exists()


def test_template_in_the_tokenizer_s_config_does_not_come_along(base, tmp_path):
  path = base / "tokenizer_config.json"
  settings = json.loads(path.read_text()) | {"chat_template": "{{ 'no' }}"}
  path.write_text(json.dumps(settings))
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  assert "chat_template" not in json.loads((folder / path.name).read_text())


def test_ids_that_the_policy_cannot_sample_are_suppressed(base, tmp_path):
  """<|im_end|> is 401 here; special tokens above it, and rows of no token, are out."""
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  tokenizer = exports.read_tokenizer(base)
  settings = json.loads((folder / "generation_config.json").read_text())
  first = tokenizer.convert_tokens_to_ids("<|im_end|>") + 1
  assert settings["suppress_tokens"] == list(range(first, 512))


# Images.


@pytest.mark.parametrize("height, width", [(20, 20), (48, 64), (64, 48), (31, 18)])
def test_image_is_padded_resized_and_scaled_as_a_frame_of_a_video(
  base, tmp_path, height, width
):
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
  image.save(tmp_path / "0.png")
  (frame,) = video.load_frames(tmp_path / "0.png", count=1, size=16)
  want = np.asarray(
    clip.VisionTower(**clip.VARIANTS["tiny"]).normalize(jnp.array(frame))
  )
  got = exports.read_processor(folder).image_processor(image, return_tensors="np")
  pixels = got["pixel_values"][0].transpose(1, 2, 0)
  # A level of 255 is 0.015: both round to whole levels.
  np.testing.assert_allclose(pixels, want, atol=0.016)


def test_scale_of_pixels_is_that_of_the_config(base, tmp_path):
  config = exports.make_config() | {"image_mean": [0.1] * 3, "image_std": [0.9] * 3}
  (tmp_path / "out").mkdir()
  export_files.write_files(tmp_path / "out", base, config, template="qwen", frames=3)
  settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
  assert (settings["image_mean"], settings["image_std"]) == ([0.1] * 3, [0.9] * 3)


@pytest.mark.parametrize("vision, darkest", [("clip", -1.7922626), ("siglip", -1)])
def test_image_has_as_many_tokens_and_the_scale_of_its_tower(
  base, tmp_path, vision, darkest
):
  folder = exports.write_files(tmp_path / "out", base, "qwen", vision)
  messages = exports.make_messages([("What?", None)], Image.new("RGB", (20, 20)))
  inputs = exports.their_inputs(folder, messages)
  image = exports.read_processor(folder).image_token_id
  assert (inputs["input_ids"] == image).sum() == 16
  assert inputs["pixel_values"].shape == (1, 3, 16, 16)
  np.testing.assert_allclose(inputs["pixel_values"][0, 0, 0, 0], darkest, rtol=1e-5)


# Messages that no policy was trained on.


@pytest.mark.parametrize(
  "messages, told",
  [
    ([exports.text_of("tool", "x")], "roles must alternate"),
    ([exports.text_of("user", "x")] * 2, "roles must alternate"),
    ([{"role": "user", "content": [{"type": "video"}]}], "not video"),
  ],
)
def test_message_without_a_place_in_the_template_is_an_error(
  base, tmp_path, messages, told
):
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  with pytest.raises(jinja2.TemplateError, match=told):
    exports.read_tokenizer(folder).apply_chat_template(messages, tokenize=False)


def test_tokenizer_whose_ids_no_template_has_is_refused(base, tmp_path, monkeypatch):
  monkeypatch.setattr(chat_template, "_encode_messages", lambda *given: None)
  with pytest.raises(UserError, match="no chat template of the export has the token"):
    exports.write_files(tmp_path / "out", base, "qwen")


# Files of strangers.


@pytest.mark.parametrize("name", export_files.READ_FILES)
def test_link_out_of_the_checkpoint_is_refused_by_its_name(base, tmp_path, name):
  (tmp_path / "secret").write_text('{"key": "sk-1"}')
  (base / name).unlink(missing_ok=True)
  (base / name).symlink_to(tmp_path / "secret")
  with pytest.raises(UserError, match=f"{name} is a link to .*secret, outside"):
    export_files.check_links(base)


def test_link_through_a_folder_out_of_the_checkpoint_is_refused(base, tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "id").write_text("{}")
  (base / "sub").symlink_to(tmp_path / "home")
  (base / "added_tokens.json").symlink_to("sub/id")
  with pytest.raises(UserError, match="added_tokens.json is a link"):
    export_files.check_links(base)


def test_link_to_nothing_is_refused(base):
  (base / "vocab.json").unlink(missing_ok=True)
  (base / "vocab.json").symlink_to("/nowhere/at/all")
  with pytest.raises(UserError, match="vocab.json is a link"):
    export_files.check_links(base)


def test_fifo_is_refused(base):
  os.mkfifo(base / "added_tokens.json")
  with pytest.raises(UserError, match="added_tokens.json is no regular file"):
    export_files.check_links(base)


def test_links_inside_the_checkpoint_and_the_hub_s_cache_are_followed(base, tmp_path):
  (base / "config.real").write_text("{}")
  (base / "added_tokens.json").symlink_to("config.real")
  snapshot = tmp_path / "models--x" / "snapshots" / "abc"
  blobs = tmp_path / "models--x" / "blobs"
  snapshot.mkdir(parents=True), blobs.mkdir()
  for path in base.iterdir():
    shutil.copyfile(path, blobs / path.name)
    (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
  export_files.check_links(base)
  exports.write_files(tmp_path / "out", snapshot, "qwen")
  assert not (tmp_path / "out" / "tokenizer_config.json").is_symlink()


def test_keys_of_a_stranger_s_tokenizer_do_not_come_along(base, tmp_path):
  path = base / "tokenizer_config.json"
  settings = json.loads(path.read_text()) | {"auto_map": {"x": "y"}, "key": "sk-1"}
  path.write_text(json.dumps(settings))
  folder = exports.write_files(tmp_path / "out", base, "qwen")
  assert {"auto_map", "key"}.isdisjoint(json.loads((folder / path.name).read_text()))


# Tokenizers.


@pytest.mark.parametrize("name", [*exports.LLAMAS, *exports.QWENS])
def test_ids_of_texts_do_not_depend_on_the_config_beside_the_tokenizer(tmp_path, name):
  base = exports.write_tokenizer(tmp_path / "base", name)
  (base / "config.json").write_text('{"model_type": "llava"}')
  template = "qwen" if name in exports.QWENS else "brief"
  folder = exports.write_files(tmp_path / "out", base, template)
  bare = shutil.copytree(folder, tmp_path / "bare")
  (bare / "config.json").unlink()
  for text in ("A </s> b", " x\n\ny", "naïve <|im_end|>"):
    want = tokenization.load_tokenizer(base)(text, add_special_tokens=False).input_ids
    for place in (folder, bare):
      own = tokenization.load_tokenizer(place)
      assert own(text, add_special_tokens=False).input_ids == want


def test_bytes_that_are_marked_as_special_are_part_of_decoded_texts(tmp_path):
  base = exports.write_tokenizer(tmp_path / "base", "llama")
  tokenizer = tokenization.load_tokenizer(base)
  tokenizer.add_tokens(["<0xE2>", "<0x9C>", "<0x93>"], special_tokens=True)
  tokenizer.save_pretrained(base)
  folder = exports.write_files(tmp_path / "out", base, "brief")
  own = exports.read_tokenizer(folder)
  ids = own("A ✓", add_special_tokens=False).input_ids
  assert own.decode(ids, skip_special_tokens=True) == "A ✓"
