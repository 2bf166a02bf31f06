"""Process 0 of a run listens at the given address only."""

import socket
import subprocess
import sys

import pytest

from tests.helpers import several
from vlmrlaif_jax.core.distributed import find_bind_address

LISTEN = """
from vlmrlaif_jax.core import distributed
distributed.connect_processes("127.0.0.1:{port}", 1, 0, heartbeat_s=10, start_s=20)
rows = [line.split() for line in open("/proc/net/tcp").readlines()[1:]]
rows += [line.split() for line in open("/proc/net/tcp6").readlines()[1:]]
places = [row[1].split(":") for row in rows if row[3] == "0A"]
print([address[-8:] for address, port in places if int(port, 16) == {port}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of sockets")
def test_the_coordinator_listens_at_its_address_alone():
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  done = subprocess.run(
    [sys.executable, "-c", LISTEN.format(port=port)],
    cwd=several.ROOT, env=several.environment(), capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout.strip() == "['0100007F']", done.stderr  # 127.0.0.1


@pytest.mark.parametrize(
  ("coordinator", "expected"),
  [
    ("127.0.0.1:1234", "127.0.0.1:1234"),
    ("localhost:1234", "127.0.0.1:1234"),
    ("203.0.113.7:1234", None),  # Of another host, or before its NAT.
    (None, None),
  ],
)
def test_only_an_own_address_is_bound(coordinator, expected):
  assert find_bind_address(coordinator) == expected
