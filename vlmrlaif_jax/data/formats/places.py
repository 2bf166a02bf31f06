"""Places of videos and images in the questions of a conversation.

A record with one video, which may be a list of frames, has at most one place, and the
default is the start of the first question. In a record with several videos and images,
each placeholder stands for one of them. templates.MEDIA_MARK marks the places.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vlmrlaif_jax.data.formats import placeholders
from vlmrlaif_jax.data.formats.media import Medium
from vlmrlaif_jax.data.formats.placeholders import Placeholder
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.data.video import MediaList

_HEAD = re.compile(rf"\A(?:\s*{MEDIA_MARK})+\s*")  # Marks that start a question.


class PlacedMedia(NamedTuple):
  """Questions, and the videos and images at their marks."""

  # MEDIA_MARK at each place; none if all videos and images precede the first question.
  questions: list[str]
  video: str | list[str] | MediaList


def place_media(
  texts: Sequence[str], media: Sequence[Medium], *, has_tags: bool, first: int
) -> PlacedMedia:
  """Returns questions with marks for their placeholders, and the media in order.

  Args:
    texts: Questions with placeholders.
    media: Videos and images of the record.
    has_tags: Whether placeholders within sentences may stand for one video. If a record
      marks the video nowhere else, such a placeholder is an error.
    first: Number of the first question among the turns.

  Raises:
    ValueError: The placeholders are not those of the media.
  """
  if len(media) == 1:
    path = media[0].path
    count = len(path) if isinstance(path, list) else 1
  elif _are_frames(texts, media, has_tags=has_tags):
    path, count = [str(each.path) for each in media], len(media)
  else:
    return _place_several(texts, media, first=first)
  questions = _place_one(texts, count, has_tags=has_tags, first=first)
  return PlacedMedia(questions, path)


def _are_frames(
  texts: Sequence[str], media: Sequence[Medium], *, has_tags: bool
) -> bool:
  """Returns whether images are the frames of one video: they have at most one place."""
  if not all(each.is_image for each in media):
    return False
  places = sum(map(placeholders.count_places, texts))
  matches = [each for text in texts for each in placeholders.find_placeholders(text)]
  is_each_in_a_sentence = has_tags and len(matches) == len(media)
  return places == 1 or (places == 0 and not is_each_in_a_sentence)


def _place_one(
  texts: Sequence[str], frames: int, *, has_tags: bool, first: int
) -> list[str]:
  """Returns questions, of which one has a mark if the video is in a later turn.

  Args:
    texts: Questions with placeholders.
    frames: Frames of the video that may have placeholders of their own.
    has_tags: See place_media.
    first: See place_media.
  """
  plain = []
  for number, text in enumerate(texts):
    try:
      plain.append(placeholders.remove_placeholders(text))
    except ValueError as error:
      raise ValueError(f"turn {first + 2 * number}: {error}") from None
  removed = [text.removed for text in plain]
  count = sum(removed)
  if plain[0].inline and has_tags and not count:
    raise ValueError(
      f"turn {first}: {plain[0].inline} is within a sentence: put it on a line of its "
      "own, or remove it"
    )
  if count > 1 and (count != frames or max(removed) < count):
    raise ValueError(
      f"its texts have {count} placeholders, but it has {frames} video(s) or frame(s): "
      "keep one placeholder"
    )
  questions = [text.text.strip() for text in plain]
  if any(removed[1:]):
    turn = removed.index(count)
    questions[turn] = MEDIA_MARK + questions[turn]
  return questions


def _place_several(
  texts: Sequence[str], media: Sequence[Medium], *, first: int
) -> PlacedMedia:
  """Returns questions with a mark for each of several videos and images."""
  matches: list[list[Placeholder]] = []
  for number, text in enumerate(texts):
    try:
      placeholders.check_text(text)
    except ValueError as error:
      raise ValueError(f"turn {first + 2 * number}: {error}") from None
    matches.append(placeholders.find_placeholders(text))
  own = [[each for each in part if not each.is_inline] for part in matches]
  is_each_marked = sum(map(len, own)) != len(media) == sum(map(len, matches))
  chosen = matches if is_each_marked else own
  paths = _sort_by_place([each for part in chosen for each in part], media)
  questions = list(map(_mark_places, texts, chosen))
  after = questions[0].lstrip(MEDIA_MARK)
  if MEDIA_MARK not in "".join([after, *questions[1:]]):
    questions[0] = after.strip()  # The default place.
  return PlacedMedia(questions, MediaList(tuple(paths)))


def _sort_by_place(
  matches: Sequence[Placeholder], media: Sequence[Medium]
) -> list[str | list[str]]:
  """Returns the path of each placeholder's video or image.

  Without placeholders, the order is that of the record. The first "<image>" stands for
  the first image of a record with videos and images.
  """
  if matches and len(matches) != len(media):
    raise ValueError(
      f"its questions have {len(matches)} placeholder(s), but it has {len(media)} "
      "videos and images: give one for each"
    )
  kinds = [each.kind for each in media]
  if not matches or len(set(kinds)) == 1:
    return [each.path for each in media]
  if sorted(kinds) != sorted(each.kind for each in matches):
    raise ValueError(
      "its placeholders are not those of its videos and images: write <video> for each "
      "video and <image> for each image"
    )
  by_kind = {
    kind: iter([each.path for each in media if each.kind == kind]) for kind in kinds
  }
  return [next(by_kind[each.kind]) for each in matches]


def _mark_places(text: str, matches: list[Placeholder]) -> str:
  """Returns a question with marks.

  White space after the placeholders that start a text is removed. The text around parts
  of a message is unchanged, as by chat templates.
  """
  question = placeholders.replace_placeholders(text, matches, MEDIA_MARK).strip()
  if not any(each.is_part for each in matches):
    question = _HEAD.sub(
      lambda head: MEDIA_MARK * head[0].count(MEDIA_MARK), question, 1
    )
  return question
