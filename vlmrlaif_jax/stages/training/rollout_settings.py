"""Settings of rollouts: how far ahead and by which engine they are sampled."""

import urllib.parse

from ml_collections import ConfigDict

from vlmrlaif_jax.core.distributed import is_loopback
from vlmrlaif_jax.core.errors import check_at_least, check_choices

ENGINES = ("jax", "vllm")


def default_config() -> ConfigDict:
  """Returns the settings of a section `rollout`."""
  return ConfigDict(
    dict(
      # Steps that a rollout is sampled ahead; 0 samples before each update.
      max_staleness=0,
      # "jax" samples with the devices that train; "vllm" with servers.
      engine="jax",
      # URLs up to the version, as in "http://127.0.0.1:8000/v1".
      urls=("http://127.0.0.1:8000/v1",),
      concurrency=64,  # Concurrent requests to each server, each for one prompt.
      timeout_s=300.0,  # Time limit of a request.
      patience_s=600.0,  # Time without any response after which the run stops.
      # True permits addresses other than this machine's. Servers have no password, and
      # receive embeddings of the videos.
      allow_remote=False,
    )
  )


def check(config: ConfigDict) -> None:
  """Checks a section `rollout`.

  Raises:
    ValueError: A value is invalid. The message starts with the setting's name.
  """
  check_choices(config, {"engine": ENGINES})
  minima = {"max_staleness": 0, "concurrency": 1, "timeout_s": 0, "patience_s": 0}
  check_at_least(config, minima)
  if not config.urls:
    raise ValueError("urls is empty: give the URL of each server")
  for url in config.urls:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ValueError(f'urls must be like "http://127.0.0.1:8000/v1", not {url!r}')
    if not is_loopback(parts.hostname) and not config.allow_remote:
      raise ValueError(
        f"urls has {url!r}, which is not on this machine: set allow_remote=True to "
        "send it the adapters and the embeddings of prompts and videos"
      )
