"""Shared by all tests. Tests marked `gpu` are deselected unless asked for (`-m gpu`, make gpu-test)."""

from __future__ import annotations

import os

# Two pytest workers share two cores; more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
