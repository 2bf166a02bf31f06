"""A vLLM server of a text model, in an environment of its own.

folder=$(python -c 'import sys; print(sys.prefix)')
tests/engine/setup.sh "$folder/vllm"

Without it, tests marked `engine` are deselected; `-m engine` in CI is an error.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

from vlmrlaif_jax.huggingface import peft_adapters

FOLDER = pathlib.Path(sys.prefix) / "vllm"
_START_S = 600  # Importing vLLM takes a minute on a busy core.
_ENVIRON = {
  "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
  "VLLM_CPU_KVCACHE_SPACE": "1",
  "VLLM_CPU_OMP_THREADS_BIND": "nobind",
  "VLLM_NO_USAGE_STATS": "1",
  "HF_HUB_OFFLINE": "1",
  "OMP_NUM_THREADS": "1",
}


def missing() -> list[str]:
  """Returns the folder if it is not there."""
  return [] if (FOLDER / "bin" / "python").exists() else [str(FOLDER)]


class Server:
  """A server on a free port of this machine, which can be killed and started again."""

  def __init__(self, model: pathlib.Path, log: pathlib.Path, rank: int):
    with contextlib.closing(socket.socket()) as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self.url = f"http://127.0.0.1:{port}/v1"
    self._log, self._process = log, None
    self._command = [
      *(str(FOLDER / "bin" / "python"), "-m", "vllm.entrypoints.cli.main", "serve"),
      *(str(model), "--served-model-name", "decoder", "--dtype", "float32"),
      *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"),
      *("--enable-lora", "--max-lora-rank", str(max(rank, 8)), "--enforce-eager"),
      *("--max-loras", "3"),
      *("--enable-prompt-embeds", "--lora-target-modules"),
      *peft_adapters.ADAPTED_MODULES,
    ]

  def start(self) -> None:
    """Starts the server and waits until it replies."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    with self._log.open("ab") as log:
      self._process = subprocess.Popen(
        self._command,
        env=environ | _ENVIRON,
        stdout=log,
        stderr=log,
        cwd=self._log.parent,
        start_new_session=True,
      )
    end = time.monotonic() + _START_S
    health = self.url.removesuffix("/v1") + "/health"
    while True:
      with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
        return
      if self._process.poll() is not None or time.monotonic() > end:
        self.kill()
        raise RuntimeError(f"vLLM does not start:\n{self._log.read_text()[-5000:]}")
      time.sleep(0.5)

  def kill(self) -> None:
    """Kills the server with all its processes."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, 9)
    self._process.wait()
