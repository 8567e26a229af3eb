"""Distil a language model into an ensemble of small students, and show when it pays.

Import kdlib before torch: the OpenMP library that torch brings reads its settings from the environment once, as it is loaded.
"""

import os

# A thread that waits spins for some microseconds and then sleeps. If it spun on, as it does by default, it would take the core
# from those that it waits for wherever the machine does anything else; if it never spun, small steps would drag.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
