"""On the path of a program that starts, it leaves it without torch, as users are."""

import sys

sys.modules["torch"] = None
