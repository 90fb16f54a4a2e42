"""These tests run Triton kernels on the CPU; Triton decides on that when it is imported, hence a run of their own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]
