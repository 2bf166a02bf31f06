"""No other user can put a compiled program into the cache of a run."""

import jax
import pytest

from vlmrlaif_jax.recipes import compilation_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The folder of caches of a user who has set no cache of JAX."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = jax.config.values["jax_compilation_cache_dir"]
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path
  jax.config.update("jax_compilation_cache_dir", before)


def used_folder():
  compilation_cache.use_private_cache()
  return jax.config.values["jax_compilation_cache_dir"]


def test_the_cache_is_a_private_folder_of_the_user(home):
  folder = home / "vlmrlaif_jax" / "jax"
  assert used_folder() == str(folder)
  for path in (folder, folder.parent):
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["vlmrlaif_jax", "vlmrlaif_jax/jax"])
def test_a_folder_that_others_may_write_is_not_used(home, name, capsys):
  (home / name).mkdir(parents=True)
  (home / name).chmod(0o777)
  assert used_folder() is None
  assert "JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().out


def test_a_folder_of_another_user_is_not_used(tmp_path):
  (tmp_path / "vlmrlaif_jax").mkdir()
  another = (tmp_path / "vlmrlaif_jax").stat().st_uid + 1
  with pytest.raises(OSError, match=str(another)):
    compilation_cache.make_private_folder(tmp_path / "vlmrlaif_jax" / "jax", another)
