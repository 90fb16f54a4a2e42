"""Markdown of what `experiments.loss` stores: where what skipping costs comes from."""

from __future__ import annotations

from .versions import versions

MOST = 10  # layers that are shown


def loss_table(result: dict, source: str) -> str:
    """A section: the dearest layers, positions and kinds of token. `source` is a link to the JSON."""
    whole, floor = result["whole"], result["floor"]
    machine = result["environment"].get("gpu") or "a CPU"
    total = whole["kl_over_floor"]["value"]
    lines = [
        f"### Where the loss comes from ({result['model']['id']}, {result['length']:,} tokens) on {machine}",
        "",
        f"{versions(result['environment'])}. Raw samples: [`{source.removeprefix('../')}`]({source}). "
        f"{result['recipe']}, {whole['skip']:.1%} skipped, {result['evaluation']['texts']} texts: KL "
        f"{whole['kl']:.4f}, perplexity {whole['perplexity_increase']:+.2%}; with nothing skipped KL "
        f"{floor['kl']:.4f}. Below, KL is what lies above that, {total:.4f} in all; "
        f"with one layer at a time skipping, the layers' sum is {result['sum_of_layers']:.4f}.",
        "",
        "| layer | skipped in it | KL, only it skips | KL saved, only it dense |",
        "| ---: | ---: | ---: | ---: |",
    ]
    layers = sorted(result["layers"], key=lambda each: -each["only"]["kl_over_floor"]["value"])
    share = len(layers)  # a layer's tiles are this part of all
    for each in layers[:MOST]:
        alone, without = (each[side]["kl_over_floor"]["value"] for side in ("only", "without"))
        lines.append(
            f"| {each['layer']} | {share * each['only']['skip']:.0%} | {alone:.5f} | {total - without:.5f} |"
        )  # fmt: skip
    if len(layers) > MOST:
        rest = sum(each["only"]["kl_over_floor"]["value"] for each in layers[MOST:])
        lines.append(f"| the other {len(layers) - MOST} | | {rest:.5f} together | |")
    lines += ["", "| predicted token | share | KL | loss, dense | change |", "| --- | ---: | ---: | ---: | ---: |"]
    for kinds in result["by_kind"].values():
        count = sum(each["positions"] for each in kinds)
        for each in kinds:
            change = each["loss_sparse"] - each["loss_dense"]
            lines.append(
                f"| {each['kind']} | {each['positions'] / count:.0%} | {each['kl_over_floor']:.4f} | "
                f"{each['loss_dense']:.3f} | {change:+.4f} |"
            )
    lines += ["", "| positions | KL, floor included | loss, dense | change |", "| ---: | ---: | ---: | ---: |"]
    for octave in whole["by_position"]:
        change, where = octave["loss_sparse"] - octave["loss_dense"], f"{octave['from']:,} to {octave['to']:,}"
        lines.append(f"| {where} | {octave['kl']:.4f} | {octave['loss_dense']:.3f} | {change:+.4f} |")
    return "\n".join(lines)
