"""Placeholders of all models are removed where they stand for the video."""

import pytest

from vlmrlaif_jax.data.formats.placeholders import is_placeholder, remove_placeholders

MARKS = [
  "<video>", "<image>", "<Video>", "<IMAGE>", "<video></video>", "<image> </image>",
  "<|vision_start|><|video_pad|><|vision_end|>",
  "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "<|image_pad|>",
  "<|video_pad|><|video_pad|>", "<|vision_start|><|vision_end|>", "<image_placeholder>",
  "<ImageHere>", "<VideoHere>", "<|image|>", "<|video|>", "<|image_1|>", "<image_1>",
  "<image1>", "[VIDEO]", "[IMG]", "<vid_start><vid_patch><vid_patch><vid_end>",
  "<im_start><im_patch><im_end>", "<img></img>", "<Img></Img>",
  "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<start_of_image>",
  "<|begin_of_video|><|video|><|end_of_video|>", "(<image>./</image>)", "<__media__>",
  "<|media_start|>video<|media_content|><|media_pad|><|media_end|>",
  "<|vision_bos|><|VIDEO|><|vision_eos|>",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(
  ("form", "left"),
  [
    ("{}\nWhat?", "What?"),
    ("{}What?", "What?"),
    ("What? {}", "What?"),
    ("Look.\n {} \nWhat?", "Look.\nWhat?"),
  ],
)
def test_placeholder_is_removed(mark, form, left):
  found = remove_placeholders(form.format(mark))
  assert (found.text.strip(), found.removed, found.inline) == (left, 1, "")


@pytest.mark.parametrize("mark", MARKS)
def test_placeholder_within_a_sentence_is_text(mark):
  text = f"Is {mark} a tag of HTML?"
  assert remove_placeholders(text) == (text, 0, mark)
  assert remove_placeholders(f"<video>\n{text}") == (text, 1, mark)


@pytest.mark.parametrize(
  "text",
  ["What is in the image?", "a < b", "<video2text>", "[1] video", "<images>", "<im>"],
)
def test_other_texts_are_unchanged(text):
  assert remove_placeholders(text) == (text, 0, "")


@pytest.mark.parametrize(
  ("text", "count"), [("<image><image>\nA?", 2), ("<image>\n<image>\n<image> A?", 3)]
)
def test_placeholders_are_counted(text, count):
  assert remove_placeholders(text)[:2] == ("A?", count)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("<img>a/b.jpg</img>\nWhat?", "names a file"),
    ("Picture 1: <img>b.jpg</img> What?", "names a file"),
    ("<|im_start|>user\nWhat?<|im_end|>", "another model's template"),
    ("<|begin_of_text|>What?", "another model's template"),
    ("<image>\nThe first.\n<image>\nThe second.", "several places"),
    ("<image> What? <image>", "several places"),
  ],
)
def test_text_whose_meaning_would_change_is_an_error(text, reason):
  with pytest.raises(ValueError, match=reason):
    remove_placeholders(text)


def test_long_texts_take_no_long_time():
  for text in (" " * 10**6 + "x", "<img>" + "." * 10**6, "<image> " * 10**5 + "x"):
    assert remove_placeholders(text).text.endswith(("x", "."))


def test_only_placeholders_are_placeholders():
  assert is_placeholder(" <image>\n<video>") and not is_placeholder("")
  assert not is_placeholder("<image> is a tag")
