"""What the tests of all cluster scripts have in common."""

from vlmrlaif_jax.core import interrupts
from vlmrlaif_jax.training import alarms

RECIPE = ["--config=configs/ppo.py:7b", "--workdir=/runs/a b"]
# Of launch/run.py: what would be met again, and what is worth another start.
FINAL = [1, 2, alarms.ALARMED]
AGAIN = [interrupts.EXIT_RESUMABLE, 128 + 9]
NOT_OURS = [126, 127]  # Of a shell that finds no interpreter.
# Each writes a line of its arguments to $SAID, one after another in brackets.
WRITES = 'line=$(printf "[%s]" "${0##*/}" "$@"); echo "$line" >> "$SAID"\n'
