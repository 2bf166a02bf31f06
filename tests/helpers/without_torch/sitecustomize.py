"""On the path of a program that starts, it leaves it without torch, as users are.

The garbage collector runs as rarely as in the tests; see tests/conftest.py.
"""

import gc
import sys

sys.modules["torch"] = None
gc.set_threshold(200_000, 50, 100)
