"""bsfa env: what this machine can run."""

from __future__ import annotations

from ..options import Config, Json


def env(json: Json = False, config: Config = None) -> None:
    """Show versions, the GPU, and which attention backends can run here and why the others cannot."""
    from .. import environment
    from ..presentation.console import note, print_json

    facts = environment.describe() | {"backends": environment.backends()}
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if key != "backends":
            note(f"{key:{width}}  {'-' if value is None else value}")
    for backend in facts["backends"]:
        note(f"{'backend':{width}}  {backend['name']}: {'yes' if backend['available'] else backend['reason']}")
