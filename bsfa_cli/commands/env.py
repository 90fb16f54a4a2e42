"""bsfa env: what this machine can run."""

from __future__ import annotations

from ..options import Config, Json


def env(json: Json = False, config: Config = None) -> None:
    """Show versions, the GPU, and what can run here.

    Which attention backends can run and which baselines are installed, and of the others why not.
    """
    from .. import environment
    from ..console import note, print_json

    facts = environment.describe() | {"backends": environment.backends(), "baselines": environment.baselines()}
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if key not in ("backends", "baselines"):
            note(f"{key:{width}}  {'-' if value is None else value}")
    for backend in facts["backends"]:
        said = f"yes; int8 scores: {backend['int8_scores']}" if backend["available"] else backend["reason"]
        note(f"{'backend':{width}}  {backend['name']}: {said}")
    for library in facts["baselines"]:
        note(f"{'baseline':{width}}  {library['name']}: {library['version'] or library['reason']}")
