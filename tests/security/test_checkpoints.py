"""Checkpoints of others run no code, and links in workdirs lead to no deletion."""

import json

import pytest

from vlmrlaif_jax.core.stage_log import truncate_log
from vlmrlaif_jax.data.tokenization import load_tokenizer
from vlmrlaif_jax.huggingface.tensor_files import check_torch


def test_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
  """Nor does transformers ask at the terminal whether to run it."""
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
  auto = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": "llava_custom", "auto_map": auto})
  )
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "Evil", "auto_map": auto})
  )
  questions = []
  monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
  with pytest.raises((ValueError, OSError)):
    load_tokenizer(tmp_path)
  assert not questions and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0"])
def test_a_torch_whose_pickles_run_code_is_rejected(version):
  with pytest.raises(ImportError, match=r"torch .*2\.6"):
    check_torch(version)


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0.0a0"])
def test_a_later_torch_is_accepted(version):
  check_torch(version)


def test_samples_of_a_linked_folder_are_not_removed(tmp_path):
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "step_9.jsonl").touch()
  (tmp_path / "stage").mkdir()
  (tmp_path / "stage" / "samples").symlink_to(tmp_path / "own")
  truncate_log(tmp_path / "stage", 3)
  assert (tmp_path / "own" / "step_9.jsonl").exists()
