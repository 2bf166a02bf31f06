"""Files of tensors: read in part, written in parts, refused when damaged."""

import builtins
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlmrlaif_jax.huggingface import tensor_files as files

A = torch.arange(24.0).reshape(4, 6)
TENSORS = {
  "a": A,
  "half": A.half(),
  "brain": A.bfloat16(),
  "count": torch.arange(5),
  "one": torch.tensor(3.0),
}


def whole(tensor):
  """All of a tensor that is read in parts."""
  return np.asarray(tensor[(slice(None),) * len(tensor.shape)])


def write_safetensors(folder):
  save_file(TENSORS, folder / "model.safetensors")


def write_torch(folder):
  torch.save(TENSORS, folder / "pytorch_model.bin")


def write_old_torch(folder):
  path = folder / "pytorch_model.bin"
  torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


@pytest.fixture(params=[write_safetensors, write_torch, write_old_torch])
def folder(request, tmp_path):
  request.param(tmp_path)
  return tmp_path


def test_tensors_are_what_was_written(folder):
  held = files.open_folder(folder)
  assert set(held) == set(TENSORS)
  for name, want in TENSORS.items():
    got = whole(held[name])
    assert (got.shape, got.dtype) == (held[name].shape, held[name].dtype)
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())
  assert held["brain"].dtype.name == "bfloat16"


def test_part_of_a_tensor_is_read(folder):
  held = files.open_folder(folder)
  for name in ("a", "brain"):
    got = held[name][slice(1, 3), slice(2, None)]
    np.testing.assert_array_equal(got.astype(np.float32), A[1:3, 2:].numpy())


def test_bytes_of_a_tensor_are_those_of_the_array(folder):
  for tensor in files.open_folder(folder).values():
    assert tensor.nbytes == whole(tensor).nbytes


# What is refused.


def test_empty_folder_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no model\*.safetensors or"):
    files.open_folder(tmp_path)


def test_missing_shard_is_named_by_the_index(tmp_path):
  save_file({"a": A}, tmp_path / "model-1.safetensors")
  index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match=r"1 of its 2 .*model-2.safetensors"):
    files.open_folder(tmp_path)


def test_missing_shard_is_named_by_the_others(tmp_path):
  torch.save({"a": A}, tmp_path / "pytorch_model-00002-of-00003.bin")
  with pytest.raises(FileNotFoundError, match="lacks 2 of its 3 .*00001-of-00003"):
    files.open_folder(tmp_path)


def test_index_that_names_more_than_there_is_is_refused(tmp_path):
  save_file({"a": A}, tmp_path / "model-1.safetensors")
  index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"1 tensors that the files do not contain.*'b'"):
    files.open_folder(tmp_path)


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
@pytest.mark.parametrize("keep", [0.7, 0.02])
def test_file_that_is_cut_short_is_refused(tmp_path, write, keep):
  write(tmp_path)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole))])
  with pytest.raises(ValueError, match="is truncated.*Download it again"):
    files.open_folder(tmp_path)


class Evil:
  """What runs code when it is unpickled by one who does not look."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return builtins.exec, (f"open({str(self.path)!r}, 'w')",)


def test_pickle_that_would_run_code_is_not_run(tmp_path):
  evil = {"a": Evil(tmp_path / "ran")}
  (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
  torch.save(evil, tmp_path / "other.bin")
  for name in ("pytorch_model.bin", "other.bin"):
    with pytest.raises(ValueError, match="may run code"):
      files.open_file(tmp_path / name)
  assert not (tmp_path / "ran").exists()


def test_bin_without_torch_tells_what_to_install(tmp_path, monkeypatch):
  write_torch(tmp_path)
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match="pip install torch"):
    files.open_folder(tmp_path)


# Writing.


def test_what_is_beyond_the_limit_goes_into_more_files(tmp_path):
  arrays = {name: np.full((10,), i, np.float32) for i, name in enumerate("abcde")}
  files.write_folder(tmp_path, arrays.items(), limit=85)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [
    "model.safetensors.index.json"
  ]
  held = files.open_folder(tmp_path)
  assert {name: whole(x)[0] for name, x in held.items()} == {
    name: i for i, name in enumerate("abcde")
  }


def test_small_set_takes_one_file_and_removes_an_earlier_one(tmp_path):
  files.write_folder(tmp_path, {"a": np.ones(9), "b": np.ones(9)}.items(), limit=80)
  files.write_folder(tmp_path, {"c": np.array(2.0)}.items())
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
  assert set(files.open_folder(tmp_path)) == {"c"}


def test_files_of_the_user_stay(tmp_path):
  mine = ["model.safetensors.bak", "model-1-of-2.safetensors.old", "0.part", "x.json"]
  for name in mine:
    (tmp_path / name).write_text("mine")
  for limit in (80, 10**9):
    pairs = {"a": np.ones(9), "b": np.ones(9)}.items()
    files.write_folder(tmp_path, pairs, limit=limit)
  assert {name: (tmp_path / name).read_text() for name in mine} == dict.fromkeys(
    mine, "mine"
  )


def test_part_is_not_written_through_a_link(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "other").write_text("mine")
  (tmp_path / "out" / "0.part").symlink_to(tmp_path / "other")
  files.write_folder(tmp_path / "out", {"a": np.ones(9)}.items())
  assert (tmp_path / "other").read_text() == "mine"
