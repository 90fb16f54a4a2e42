"""attn_implementation="bsfa" against dense attention in every language model that transformers builds.

Without SWEEP the part named in architectures.yaml; SWEEP=all (`make sweep`) is all of them, SWEEP=2/5 their second
fifth. A model that does not agree is listed there with what happens instead and why; a list that no longer holds fails.
"""

import os
import re
import warnings

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from architectures import CASES, DATA, PADDING, build, inputs, with_another_last_token

pytestmark = pytest.mark.timeout(120)
EXCEPTIONS = ("refused", "untouched", "not built")
TOLERANCE = 256 * torch.finfo(torch.float32).eps  # of the logits' scale; a wrong mask moves them by more than 1%


def selected() -> list[str]:
    sweep = os.environ.get("SWEEP")
    if not sweep:
        return DATA["part"]
    part, parts = (1, 1) if sweep == "all" else map(int, sweep.split("/"))
    return sorted(CASES)[part - 1 :: parts]


@pytest.mark.parametrize("case", selected())
def test_bsfa_agrees_or_does_what_is_listed(case, record_property):
    found, words = outcome(case)
    record_property("architecture", [case, found, words])
    expected, reason = listed(case)
    assert found == expected, f"{found} ({words}), listed: {expected} {reason}"
    assert re.search(reason, words), f"{found}, but not for the reason listed: {words}"


def test_the_lists_name_architectures_that_exist_and_each_once():
    cases = [case for kind in EXCEPTIONS for names in DATA[kind].values() for case in names]
    assert len(cases) == len(set(cases))
    assert {*cases, *DATA["part"], *DATA["arguments"], *DATA["dense"]} <= CASES.keys()
    assert DATA["overrides"].keys() <= {kind for kind, _ in CASES.values()}


def listed(case: str) -> tuple[str, str]:
    """(what the case is listed to do instead of agreeing, a pattern of the words for it)."""
    lists = ((kind, reason) for kind in EXCEPTIONS for reason, cases in DATA[kind].items() if case in cases)
    return next(lists, ("agrees", ""))


def outcome(case: str) -> tuple[str, str]:
    """(one of EXCEPTIONS or "agrees", the words for it).

    Fails for logits that differ and for any error of bsfa that does not call itself by its name.
    """
    dense = DATA["dense"].get(case, "eager")
    try:
        model = build(case)
        calls = {padding: inputs(case, model, padding) for padding in PADDING}
        calls["another last token"] = with_another_last_token(calls["whole"][0]), calls["whole"][1]
        expected = {name: logits(model, dense, arguments) for name, (arguments, _) in calls.items()}
        blind = logits(model, dense, {**calls["left"][0], "attention_mask": torch.ones_like(calls["left"][0]["input_ids"])})
    except Exception as error:  # noqa: BLE001 whatever keeps transformers itself from running the model
        return "not built", f"{type(error).__name__}: {error}"
    reason, refusal, actual = untouched(model), None, {}
    for name, (arguments, valid) in calls.items():
        try:
            actual[name] = logits(model, "bsfa", arguments)
        except (ValueError, NotImplementedError) as error:
            if "attn_implementation='bsfa'" not in str(error):
                raise
            refusal = str(error)
        else:
            error = distance(actual[name][valid], expected[name][valid])
            assert error <= TOLERANCE, f"{name}: {error:.3g} of the logits' scale"
    if refusal or reason:
        return ("refused", refusal) if refusal else ("untouched", reason)
    valid = calls["left"][1]
    assert distance(blind[valid], expected["left"][valid]) > 100 * TOLERANCE, "attention hardly matters in this model"
    moved, moved_dense = (distance(x["another last token"][:, :-1], x["whole"][:, :-1]) for x in (actual, expected))
    assert moved <= TOLERANCE or moved_dense > TOLERANCE, f"logits see later tokens: {moved:.3g} of their scale"
    return "agrees", ""


def logits(model: torch.nn.Module, implementation: str, arguments: dict) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    torch.manual_seed(5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(**arguments).logits


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def untouched(model: torch.nn.Module) -> str | None:
    """Why asking for bsfa changes nothing in this model, or None where some module then runs it."""
    model.set_attn_implementation("bsfa")
    modules = [model.get_submodule(path) for path in bsfa.attention_modules(model)]
    kept = sorted({module.config._attn_implementation for module in modules})
    if "bsfa" in kept:
        return None
    if kept:
        return f"its attention modules keep {' and '.join(kept)}"
    if model.config._attn_implementation == "bsfa":
        return "no attention at all"
    return "no attention through transformers' AttentionInterface"
