"""Which dense kernels a result was measured against, by name and version, and whether FlashAttention-3 was one."""

from __future__ import annotations

from ..timing.plan import FA3


def named(row: dict) -> str:
    """A contender's name, with what brought it and its version where it is no part of PyTorch or bsfa."""
    return f"{row['name']} ({row['library']})" if row.get("library") else row["name"]


def without_flash_attention_3(result: dict) -> str:
    """A sentence for the head of a result of a Hopper GPU, profile or comparison, that lacks FlashAttention-3, else "".

    Results stored before it was timed lack it without a word in `unavailable`; what was not timed is no contender.
    """
    capability = result["environment"].get("capability") or ""
    measured = result.get("cells") or result.get("prefill") or []
    lacking = [part for part in measured if FA3 not in _dense(part)]
    if not lacking or not capability.startswith("9."):
        return ""
    where = (
        "was not timed"
        if len(lacking) == len(measured)
        else f"was not timed in {len(lacking)} of {len(measured)} measurements"
    )
    return f"{FA3}, often the fastest dense kernel on this GPU, {where}: speedups are over the fastest that was."


def fastest(part: dict) -> str:
    """A cell's fastest dense kernel by name and version, and whether FlashAttention-3 failed or is missing."""
    rows = {row["name"]: row for row in part.get("contenders", part.get("dense", []))}
    missing = any(absent["name"] == FA3 for absent in part["unavailable"])
    return named(rows.get(part["fastest_dense"], {"name": part["fastest_dense"]})) + (
        f" ({FA3} was not timed)" if missing else ""
    )


def _dense(part: dict) -> set[str]:
    return {row["name"] for row in part.get("contenders", part.get("dense", []))}
