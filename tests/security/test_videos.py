"""Videos of others are read in worker processes, and only if they are regular files."""

import hashlib
import os
import signal
import threading

import av
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.feedback.chat_server import Chat
from tests.feedback.terms.samples import sample
from tests.helpers.made_run import write_run, write_video
from vlmrlaif_jax.data import video
from vlmrlaif_jax.data.decoding import files
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.report import compare, samples
from vlmrlaif_jax.serving import chat_clip

READING = video.Reading(video.ByCount(2), square=8)


@pytest.fixture
def clip(tmp_path, monkeypatch):
  """A video that no decoder of this process may open; workers import their own."""
  path = tmp_path / "clip.mp4"
  write_video(path, 0, size=256)
  for module in (av, Image):
    monkeypatch.setattr(module, "open", lambda *_, **__: pytest.fail("decoded here"))
  return str(path)


def test_the_report_decodes_in_a_worker(clip, tmp_path):
  assert samples.load_clip(tmp_path, clip)["frames"] == samples.MAX_STRIP_FRAMES


def test_the_chat_checks_a_clip_in_a_worker(clip):
  chat_clip.check_clip(clip, chat_clip.ClipLimits())


def test_reward_functions_receive_frames_of_a_worker(clip):
  [frames] = sample(video=clip).read_frames(count=3, side=32)
  assert frames.pixels.shape == (3, 32, 32, 3) and frames.size == (256, 256)


def test_judges_receive_frames_of_a_worker(clip, http_server, tmp_path, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  server, config = Chat(http_server), endpoint.default_config()
  config.update(url=server.url, model="m", key_env="", frames=2, retries=0)
  judge = endpoint.Endpoint(ConfigDict(config), None)
  assert judge.ask([JudgeQuery("id", clip, "Why?")]) == ["re: Why?"]
  assert len(server.requests[0][1]["messages"][0]["content"]) == 3


def test_a_comparison_hashes_videos_in_a_worker(tmp_path, monkeypatch):
  """Some regular files of /proc have no end, so a hash needs a time limit, too."""
  run = compare.open_report_workdir(write_run(tmp_path / "run"), "")
  row = {"id": "a", "video": "0.mp4"}
  (tmp_path / "run/world/videos/0.mp4").write_bytes(b"video")
  monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed here"))
  *_, first = compare.make_prompt_key(run, row, "Why?")
  *_, missing = compare.make_prompt_key(run, {**row, "video": "none.mp4"}, "Why?")
  assert len(first) == 32 and missing == b""


@pytest.mark.parametrize("name", ["pipe.mp4", "/dev/zero", "linked.mp4"])
def test_a_pipe_or_device_is_refused(tmp_path, name):
  os.mkfifo(tmp_path / "pipe.mp4")
  (tmp_path / "linked.mp4").symlink_to("/dev/zero")
  path = str(tmp_path / name)
  for read in (
    lambda: video.hash_video_in_worker(path),
    lambda: video.read_video_in_worker(path, READING),
    lambda: video.read_duration(path),
  ):
    with pytest.raises(video.VideoError, match="not a regular file"):
      read()


def test_a_file_that_becomes_a_pipe_is_not_read(tmp_path, monkeypatch):
  """After its check by name, and without a writer, for whom opening would wait."""
  os.mkfifo(tmp_path / "a.png")
  monkeypatch.setattr(files, "check_regular_file", lambda _: None)
  with pytest.raises(OSError, match="not a regular file"):
    files.open_regular_file(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["large.mp4", "large.png"])
def test_a_huge_file_is_refused(tmp_path, name):
  path = tmp_path / name
  path.touch()
  os.truncate(path, 33 * 10**9)  # It has holes.
  for read in (
    lambda: video.hash_video_in_worker(path),
    lambda: video.read_video_in_worker(path, READING),
  ):
    with pytest.raises(video.VideoError, match=r"33\.0 GB; at most 32 GB"):
      read()


def test_a_hash_has_a_time_limit(tmp_path):
  path = tmp_path / "large.mp4"
  path.touch()
  os.truncate(path, 31 * 10**9)
  for answers in (
    lambda: video.hash_videos([path], workers=1, timeout_s=0.3),
    lambda: [video._get_worker().ask((video._hash, path), 0.3)],
  ):
    assert list(answers()) == ["no answer within 0.3 s"]


def test_a_worker_that_dies_fails_one_video(tmp_path):
  path = tmp_path / "clip.mp4"
  write_video(path, 0)
  large = tmp_path / "large.mp4"
  large.touch()
  os.truncate(large, 31 * 10**9)
  assert len(video.read_video_in_worker(path, READING).pixels) == 2
  process = video._get_worker()._worker.process
  killer = threading.Timer(0.3, lambda: os.kill(process.pid, signal.SIGKILL))
  killer.start()
  with pytest.raises(video.VideoError, match="SIGKILL"):
    video.hash_video_in_worker(large)
  assert len(video.read_video_in_worker(path, READING).pixels) == 2
