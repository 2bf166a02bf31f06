"""Talking to checkpoints: what is opened, which clips are taken, what is streamed."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import front
from tests.helpers import chats
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Batch
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.interface import lay_out
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.serving import chat_clip, chat_session, chat_stream
from vlmrlaif_jax.serving.chat_clip import ClipLimits
from vlmrlaif_jax.serving.chat_stream import ChatAnswers, ChatQuestion

QUESTION = "What happens?"


@pytest.fixture(scope="module")
def talk(one, tmp_path_factory):
  return chats.opened(one, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def clip(talk, tmp_path_factory):
  path = chats.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")
  return chat_clip.read_clips(talk, [path], ClipLimits())


def last(talk, name, clip, history, asked):
  *_, said = chat_stream.stream_answer(talk, name, clip, history, asked)
  return said


# Opening.


def test_sft_stands_beside_what_was_made_of_it(talk):
  assert list(talk.policies) == ["sft", "grpo"]
  assert talk.judge.name == "the reward model"


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path}"):
    chat_session.open_chat_workdir(
      str(tmp_path), chats.mesh(), max_prompt=9, note=print
    )


def test_a_run_without_a_policy_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model": {}}')
  with pytest.raises(FileNotFoundError, match="has no policy yet: its stage sft_long"):
    chat_session.open_chat_workdir(
      str(tmp_path), chats.mesh(), max_prompt=9, note=print
    )


def test_a_checkpoint_alone_answers_and_has_no_judge(tiny_checkpoint, clip):
  model = front.model_tiny()
  model.update(path=str(tiny_checkpoint), template="", lora_rank=0, frames=3)
  told = dict(max_prompt=256, note=lambda line: None)
  alone = chat_session.open_model(str(tiny_checkpoint), model, chats.mesh(), **told)
  said = last(
    alone, tiny_checkpoint.name, clip, (), ChatQuestion(QUESTION, max_tokens=8)
  )
  assert said.done and said.scores is None and said.texts[0]


@pytest.mark.parametrize(
  "settings, frames",
  [({"num_frames": 50}, 50), ({"patch_size": 14}, 12), ([], 12)],
)
def test_frames_are_those_that_an_export_states(tmp_path, settings, frames):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "processor_config.json").write_text(json.dumps(settings))
  assert chat_session.read_frame_count(str(tmp_path)) == frames


@pytest.mark.parametrize("frames", [0, "3", 1.5])
def test_number_of_frames_that_is_none_is_refused(tmp_path, frames):
  (tmp_path / "config.json").write_text("{}")
  settings = json.dumps({"num_frames": frames})
  (tmp_path / "processor_config.json").write_text(settings)
  with pytest.raises(ValueError, match="num_frames must be 1 or more, got"):
    chat_session.read_frame_count(str(tmp_path))


# Clips.


def test_a_clip_is_seen_as_the_frames_of_the_run(talk, clip):
  assert len(clip.features) == talk.run.config.model.frames == 3


@pytest.mark.parametrize(
  "name, limits, told",
  [
    ("clip.txt", ClipLimits(), "must end in one of .mp4 .* got clip.txt"),
    ("clip.mp4", ClipLimits(max_mb=0.001), r"has 0.* MB, more than --max_mb=0.001"),
    (
      "clip.mp4",
      ClipLimits(max_seconds=0.5),
      "is 1 seconds long, more than --max_seconds=0.5",
    ),
  ],
)
def test_a_clip_beyond_a_limit_is_refused_by_its_name(tmp_path, name, limits, told):
  path = chats.write_clip(tmp_path / "clip.mp4").rename(tmp_path / name)
  with pytest.raises(UserError, match=told):
    chat_clip.check_clip(path, limits)


def test_a_part_of_a_clip_is_within_a_limit_that_the_clip_exceeds(talk, tmp_path):
  part = f"{chats.write_clip(tmp_path / 'clip.mp4')}#t=0.2,0.5"
  clip = chat_clip.read_clips(talk, [part], ClipLimits(max_seconds=0.5))
  assert len(clip.features) == clip.layouts[0].grid.time == 3


def test_what_is_not_there_is_refused(tmp_path):
  with pytest.raises(UserError, match="no file at"):
    chat_clip.check_clip(tmp_path / "clip.mp4", ClipLimits())


def test_a_file_that_is_no_video_is_refused_without_its_place(tmp_path):
  path = tmp_path / "text.mp4"
  path.write_text("not a video")
  with pytest.raises(UserError, match="^text.mp4 cannot be read as a video") as error:
    chat_clip.check_clip(path, ClipLimits())
  assert str(tmp_path) not in str(error.value)


def test_sound_alone_is_refused(tmp_path):
  path = chats.write_sound(tmp_path / "sound.mp4")
  with pytest.raises(UserError, match="no video stream"):
    chat_clip.check_clip(path, ClipLimits())


def test_a_clip_whose_frames_are_broken_is_refused(talk, tmp_path):
  whole = chats.write_clip(tmp_path / "whole.avi").read_bytes()
  path = tmp_path / "cut.avi"
  path.write_bytes(whole[:2600])  # The header is there, and no frame.
  with pytest.raises(UserError, match="cut.avi cannot be read as a video"):
    chat_clip.read_clips(talk, [path], ClipLimits())


# Answers.


def generated(talk, name, clip, history, asked):
  """(text, whether it ended) of what `generate` samples."""
  run = talk.run
  video = lay_out(run.processor, *clip.layouts)
  row = answering.encode_prompt(run, [*history, (asked.question, None)], video)
  columns = tokenization.pad_rows(
    [row], prompt_len=128, response_len=0, pad=run.tokenizer.pad_token_id
  )
  prompts = Batch(clip.features[None], *map(jnp.asarray, columns))
  sample = jax.jit(
    lambda variables, prompts: generate(
      run.policy, variables, prompts, jax.random.key(asked.seed),
      max_new=asked.max_tokens, temperature=asked.temperature,
      **answering.get_token_ids(run),
    )
  )  # fmt: skip
  batch = sample(talk.policies[name], prompts).batch
  found = tokenization.decode_responses(
    run.tokenizer, np.asarray(batch.tokens), np.asarray(batch.loss_mask)
  )
  return found[0].rstrip("\ufffd")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("history", [(), (("Is it red?", "No."),)])
def test_what_is_streamed_is_what_generate_samples(talk, clip, temperature, history):
  asked = ChatQuestion(QUESTION, temperature, max_tokens=14, seed=3)
  said = last(talk, "grpo", clip, history, asked)
  assert said.texts == [generated(talk, "grpo", clip, history, asked)]
  assert said.texts[0]


def test_an_answer_grows_as_it_is_made(talk, clip):
  asked = ChatQuestion(QUESTION, max_tokens=20)
  texts = [s.texts[0] for s in chat_stream.stream_answer(talk, "sft", clip, (), asked)]
  assert len(set(texts)) > 3
  pairs = itertools.pairwise(texts)
  assert all(len(after) >= len(before) for before, after in pairs)


def test_policies_answer_side_by_side(talk, clip):
  asked = ChatQuestion(QUESTION, max_tokens=20)
  shown = list(chat_stream.stream_side_by_side(talk, clip, {}, asked))
  assert all(set(now) == {"sft", "grpo"} for now in shown)
  for name in talk.policies:
    assert shown[-1][name] == last(talk, name, clip, (), asked)


def test_no_request_compiles_what_another_of_its_size_has(talk, clip):
  last(talk, "sft", clip, (), ChatQuestion(QUESTION, 0.5, max_tokens=9))
  sizes = lambda: (chat_stream._advance._cache_size(), chat_stream._begin._cache_size())
  before = sizes()
  for asked in (
    ChatQuestion("Why?", 0.7, max_tokens=9, seed=1),
    ChatQuestion("Is the red object there?", 1.2, max_tokens=30),
  ):
    last(talk, "grpo", clip, (), asked)
  assert before == sizes()


def test_an_answer_is_cut_at_its_longest(talk, clip):
  short, long = (
    last(talk, "sft", clip, (), ChatQuestion(QUESTION, max_tokens=n)) for n in (6, 20)
  )
  assert long.texts[0].startswith(short.texts[0]) and long.texts != short.texts
  assert short.stopped == [False] and short.done


def test_each_of_several_answers_is_scored(talk, clip):
  said = last(
    talk, "sft", clip, (), ChatQuestion(QUESTION, 1.0, max_tokens=8, samples=2)
  )
  assert len(set(said.texts)) == len(set(said.scores)) == 2
  assert [row[1] for row in said.rank()] == sorted(said.scores, reverse=True)


def test_the_best_is_the_highest_of_those_that_ended():
  said = ChatAnswers(["a", "b", "c"], [True, True, False], True, [1.0, 2.0, 3.0])
  assert said.best == 1
  assert said.rank() == [(True, 2.0, "b"), (False, 3.0, "c"), (False, 1.0, "a")]
  assert said._replace(stopped=[False] * 3).best == 2


@pytest.mark.parametrize(
  "settings, told",
  [
    (dict(max_tokens=513), "from 1 to 512, got 513"),
    (dict(temperature=-1.0), "temperature must be 0 or more"),
    (dict(samples=4), "at temperature 0 all answers are the same"),
    (dict(question="no " * 300), "more than --max_prompt=256"),
  ],
)
def test_what_cannot_be_answered_is_refused(talk, clip, settings, told):
  with pytest.raises(UserError, match=told):
    last(talk, "sft", clip, (), ChatQuestion(**{"question": QUESTION, **settings}))


def test_the_best_of_several_needs_a_judge(talk, clip):
  asked = ChatQuestion(QUESTION, 1.0, samples=4)
  with pytest.raises(UserError, match="requires a judge"):
    last(talk._replace(judge=None), "sft", clip, (), asked)
