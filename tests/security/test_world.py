"""A rendered world of another workdir is read without importing what it names."""

import json
import shutil

from vlmrlaif_jax.data.world import builder


def test_classes_that_the_files_name_are_not_imported(
  tiny_world, tmp_path, monkeypatch
):
  folder = tmp_path / "world"
  shutil.copytree(tiny_world, folder)
  [path] = folder.rglob("features.json")
  features = json.loads(path.read_text()) | {"pythonClassName": "named_by_a_file.X"}
  path.write_text(json.dumps(features))
  ran = tmp_path / "ran"
  (tmp_path / "named_by_a_file.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: ...")
  monkeypatch.syspath_prepend(tmp_path)
  expected = builder.read_split(tiny_world, "benchmark")
  assert builder.read_split(folder, "benchmark") == expected
  assert not ran.exists()
