"""What a stored result was measured on, in one line."""

from __future__ import annotations

VERSIONS = (
    ("driver", "driver"),
    ("PyTorch", "torch"),
    ("CUDA", "cuda"),
    ("cuDNN", "cudnn"),
    ("Triton", "triton"),
)
COMMIT_DIGITS = 10


def versions(environment: dict) -> str:
    """Driver, libraries and the commit of a result's `environment`, those that are there."""
    found = [f"{name} {environment[key]}" for name, key in VERSIONS if environment.get(key)]
    commit = environment.get("commit")
    if commit:
        changed = " with uncommitted changes" if commit.endswith("+") else ""
        found.append(f"commit {commit[:COMMIT_DIGITS]}{changed}")
    return ", ".join(found)
