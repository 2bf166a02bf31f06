"""A shared folder of features may contain files of the user."""

import os

import pytest

from vlmrlaif_jax.data import features


@pytest.mark.parametrize(
  ("name", "stays"),
  [
    (f"{'0a' * 16}.npy.{'b1' * 16}.tmp", False),
    (f"{'0a' * 16}.json.{'b1' * 16}.tmp", False),
    (f"{'0a' * 16}.npy", True),
    ("notes.tmp", True),
    ("embeddings_of_my_thesis.npy", True),
    (f"paper.{'b1' * 16}.tmp", True),
  ],
)
def test_only_unfinished_features_are_removed(tmp_path, name, stays):
  (tmp_path / name).touch()
  os.utime(tmp_path / name, (0, 0))
  features._remove_stale(tmp_path)
  assert (tmp_path / name).exists() is stays
