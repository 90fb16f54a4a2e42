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
from architectures import CALLS, CASES, DATA, build, inputs, with_another_last_token

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
    found, why = outcome(case)
    expected, reason = listed(case)
    record_property("architecture", [case, found, reason])
    assert found == expected, f"{found} ({why}), listed: {expected} {reason}"
    assert re.search(reason, why), f"{found}, but not for the reason listed: {why}"


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
    """(one of EXCEPTIONS or "agrees", the words for it). Fails for logits that differ."""
    try:
        dense = build(case, DATA["dense"].get(case, "eager"))
        calls = {call: inputs(case, dense, call) for call in CALLS}
        calls["another last token"] = with_another_last_token(calls["whole"][0]), calls["whole"][1]
        expected = {call: logits(dense, arguments) for call, (arguments, _) in calls.items()}
    except Exception as error:  # whatever keeps transformers itself from running the model
        return "not built", words(error)
    try:
        model = build(case, "bsfa")
    except Exception as error:
        return "refused", words(error)
    refusal, actual = None, {}
    for call, (arguments, valid) in calls.items():
        try:
            actual[call] = logits(model, arguments)
        except Exception as error:
            refusal = words(error)
        else:
            error = distance(actual[call][valid], expected[call][valid])
            assert error <= TOLERANCE, f"{call}: {error:.3g} of the logits' scale"
    if refusal:
        return "refused", refusal
    if reason := untouched(model):
        return "untouched", reason
    assert_attention_matters(dense, *calls["left"], expected["left"])
    moved, moved_dense = (distance(x["another last token"][:, :-1], x["whole"][:, :-1]) for x in (actual, expected))
    assert moved <= TOLERANCE or moved_dense > TOLERANCE, f"the last token moves earlier logits by {moved:.3g}"
    return "agrees", ""


def logits(model: torch.nn.Module, arguments: dict) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(**arguments).logits


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def assert_attention_matters(model, arguments: dict, valid: torch.Tensor, expected: torch.Tensor) -> None:
    """Masks can only be tested where the padding, once it is seen, moves the logits."""
    seen = logits(model, arguments | {"attention_mask": torch.ones_like(arguments["attention_mask"])})
    assert distance(seen[valid], expected[valid]) > 100 * TOLERANCE, "attention hardly matters in this model"


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def untouched(model: torch.nn.Module) -> str | None:
    """Why asking for bsfa changes nothing in this model, or None where some module runs it."""
    modules = [model.get_submodule(path) for path in bsfa.attention_modules(model)]
    if not modules:
        return "no attention through transformers' AttentionInterface"
    kept = {module.config._attn_implementation for module in modules}
    return None if "bsfa" in kept else f"its attention modules run {' and '.join(sorted(kept))}"
