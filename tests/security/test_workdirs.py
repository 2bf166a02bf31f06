"""Links in a workdir of others lead to no write or deletion."""

import re
import types
import uuid

import pytest

from tests.recipes.test_runner import config
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import open_replacing
from vlmrlaif_jax.recipes import runner

STAGES = ("sft_short", "rm")


@pytest.fixture
def own(tmp_path):
  """A folder of the user, with a file."""
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "step_9.jsonl").write_text("text of the user")
  return tmp_path / "own"


@pytest.mark.parametrize(
  ("place", "target"),
  [
    ("run.lock", "step_9.jsonl"),
    ("endpoint.jsonl", "step_9.jsonl"),
    ("config.json", "new.json"),
    ("rm", "."),
    ("rm/samples", "."),
    ("rm/rollout", "."),
    ("rm/metrics.jsonl", "step_9.jsonl"),
    ("sft_short/checkpoints/3/_METADATA", "step_9.jsonl"),
  ],
)
def test_a_run_refuses_links_through_which_it_would_write(tmp_path, own, place, target):
  link = tmp_path / "run" / place
  link.parent.mkdir(parents=True)
  link.symlink_to(own / target)
  with pytest.raises(UserError, match=re.escape(f"{link} is a link to {own}")):
    runner.run_recipe(config(STAGES), str(tmp_path / "run"))
  assert [path.read_text() for path in own.iterdir()] == ["text of the user"]


def test_a_run_may_share_finished_stages_and_the_world(tmp_path, own):
  (own / "done.json").write_text("{}")
  (tmp_path / "run").mkdir()
  for name in ("world", "features", "rm"):
    (tmp_path / "run" / name).symlink_to(own)
  runner.validation.check_no_links(tmp_path / "run", STAGES)


def test_a_temporary_file_is_not_written_through_a_link(tmp_path, own, monkeypatch):
  fixed = types.SimpleNamespace(hex="0" * 32)
  monkeypatch.setattr(uuid, "uuid4", lambda: fixed)
  (tmp_path / f"a.json.{fixed.hex}.tmp").symlink_to(own / "step_9.jsonl")
  with pytest.raises(FileExistsError), open_replacing(tmp_path / "a.json") as file:
    file.write(b"{}")
  assert (own / "step_9.jsonl").read_text() == "text of the user"
