"""P and V in 8 bits, emulated: against the specification with rounded weights, and the experiment at toy size."""

import json
import sys

import pytest
import torch
from bsfa_kernels import Gate, block_sparse_attention, reference
from gap_thresholds import thresholds

from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.experiments import eight_bits, emulation, texts
from bsfa_cli.experiments.emulation import TILE, Rounding, Values
from bsfa_cli.models.load import load_model
from bsfa_cli.presentation.eight_bits_table import eight_bits_table, planted_table
from bsfa_cli.timing.plan import Shape

SCALE = 0.125


def drawn(rows, seed=0):
    """Scores of standard deviation 3, V with a mean: bfloat16 values."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, rows, 64, generator=generator) for heads in (4, 2, 2))
    return [x.bfloat16().float() for x in (3 * q, k, v + 0.5)]


def expected(q, k, v, gate=Gate(), scores="exact"):  # noqa: B008 - frozen
    return block_sparse_attention(
        q.double(), k.double(), v.double(), gate, causal=True, scores=scores, scale=SCALE, tile=TILE,
        backend="reference", return_counts=True,
    )  # fmt: skip


def apart(got, wanted) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("scores", ("exact", "int8"))
@pytest.mark.parametrize("rows", (640, 716))
def test_with_nothing_in_8_bits_it_is_the_specification(scores, rows):
    """The same tiles dropped and counted, ragged ends kept; the output within what bfloat16 costs P and itself."""
    q, k, v = drawn(rows)
    for gate in (Gate(), Gate(gap=torch.tensor([2.0, 3.0, 4.0, -torch.inf]))):
        spec = expected(q, k, v, gate, scores)
        judged = None if gate.open else gate
        out, kept, candidates = emulation.attention(q, k, v, Rounding(scores), scale=SCALE, gate=judged)
        assert apart(out, spec.out) < 0.003
        if judged:
            assert (kept, candidates) == (int(spec.kept.sum()), int(spec.candidates.sum())) and kept < candidates


def rounded_weights(rounding):
    """`reference.weights` with P rounded as `rounding` says, in float64. Tiles are whole: [rows, keys], in order."""
    levels = {"u8": 255, "s8": 127, "e4m3": rounding.top}[rounding.p]

    def weights(s):
        tiles = s.unflatten(-1, (-1, TILE.keys))
        own = tiles.amax(-1, keepdim=True)
        running, final = own.cummax(1).values, s.amax(-1)[:, None, None]
        at = {"running": running, "tile": own, "final": final}[rounding.reference]
        p = (tiles - at).exp()
        scaled = (p * levels).to(emulation.E4M3).double() if rounding.p == "e4m3" else (p * levels).round()
        divided = scaled / levels if rounding.divisor == "rounded" else p
        factor = (at - final).exp()
        return ((scaled / levels * factor) / (divided * factor).sum((1, 2), keepdim=True)).flatten(1)

    return weights


@pytest.mark.parametrize(
    "rounding",
    [
        Rounding(p="u8"), Rounding(p="u8", reference="tile"), Rounding(p="u8", reference="final"), Rounding(p="s8"),
        Rounding(p="e4m3"), Rounding(p="e4m3", top=1.0, divisor="rounded"),
        Rounding(p="u8", v="int8", reference="tile", divisor="rounded"), Rounding(p="u8", v="int8", mean="tile"),
        Rounding(p="u8", v="int8", reference="tile", scale="tile", rotated=True, mean="head"),
        Rounding(p="e4m3", v="e4m3", scale="head"),
    ],
)  # fmt: skip
def test_rounded_weights_are_the_specifications(monkeypatch, rounding):
    """With V as it is after rounding; what is taken off V and put back is weighed by the sums of its kind."""
    q, k, v = drawn(384)
    out, *_ = emulation.attention(q, k, v, rounding, scale=SCALE)
    values = Values(v[0], rounding)
    monkeypatch.setattr(reference, "weights", rounded_weights(rounding))

    def attended(tiles):
        flat = values.restored(tiles).transpose(0, 1).flatten(1, 2)[None]
        return expected(q, k, flat).out

    wanted = attended(values.tiles * values.scale)
    if rounding.mean == "tile":
        wanted += attended(values.mean.expand_as(values.tiles))
    elif rounding.mean == "head":
        wanted += values.restored(values.mean).expand(1, 2, 1, 64).repeat_interleave(2, 1)
    assert apart(out, wanted) < 0.0025  # of which bfloat16's output is 0.0017
    exact = Rounding(rounding.scores)
    assert apart(emulation.attention(q, k, v, exact, scale=SCALE)[0], wanted) > 0.004


def test_values_are_rounded_by_half_a_step():
    v = drawn(300)[2][0]
    v[:, 130, 5] = 40
    for scale in ("head", "tile", "channel"):
        values = Values(v, Rounding(v="int8", scale=scale, mean="tile", rotated=True))
        whole = values.tiles * values.scale + values.mean
        off = (values.restored(whole) - emulation._tiles(v)).transpose(0, 1).flatten(1, 2)[:, :300]
        turned = off @ values.rotation
        half = (values.scale / 2).expand(3, 2, 128, 64).transpose(0, 1).flatten(1, 2)[:, :300]
        assert values.tiles.abs().amax() == 127 and (turned.abs() <= 1.001 * half + 1e-5).all()


def test_fp8_accumulators_keep_14_bits_and_integers_all():
    x = torch.tensor([1 + 2.0**-13, 1 + 2.0**-14, -(1 + 2.0**-13 + 2.0**-20), 0.0])
    assert emulation._cut(x).tolist() == [1 + 2.0**-13, 1.0, -(1 + 2.0**-13), 0.0]
    p, v = torch.zeros(1, 1, 32), torch.zeros(1, 32, 1)
    p[..., :3], v[0, :3, 0] = 1.0, torch.tensor([1.0, 2.0**-13, 2.0**-14])
    assert emulation._cut_products(torch.zeros(1, 1, 1), p, v).item() == 1 + 2.0**-13
    assert 128 * 255 * 127 < 2**22  # what the kernel's integers may be to become floats by one addition


def test_what_is_not_emulated_is_refused():
    q, k, v = drawn(128)
    with pytest.raises(ValueError, match="one whole prompt"):
        emulation.attention(q, k[:, :, :64], v, Rounding(), scale=SCALE)
    with pytest.raises(ValueError, match="gap gate"):
        emulation.attention(q, k, v, Rounding(), scale=SCALE, gate=Gate(absolute=0.0))
    with pytest.raises(ValueError, match="one scale"):
        Rounding(adds="always")
    with pytest.raises(ValueError, match="mean must be one of kept, head, tile"):
        Rounding(mean="channel")


def test_planted_outliers_reach_the_values_only():
    shape = Shape("text", 2, 1, 64)
    plain = eight_bits.planted(eight_bits.PLANTED[0], shape, 256, torch.device("cpu"))
    for data in eight_bits.PLANTED[1:]:
        q, k, v = eight_bits.planted(data, shape, 256, torch.device("cpu"))
        assert torch.equal(q, plain[0]) and torch.equal(k, plain[1]) and not torch.equal(v, plain[2]), data
    (row,) = eight_bits.errors(data, {"bfloat16": Rounding()}, shape, 256, torch.device("cpu"))
    assert 0 < row["error"] < 0.004


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for kind in texts.KINDS:
        lines = [json.dumps({"text": f"{kind} {i}. " * 120}) for i in range(2)]
        (folder / f"{kind}-judge.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def experiment(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eight_bits", *map(str, arguments)])
    return eight_bits.main()


def test_the_experiment_at_toy_size(monkeypatch, random_model, folder, tmp_path):
    out, artifact = tmp_path / "found.json", tmp_path / "thresholds.safetensors"
    point = thresholds(load_model(random_model, device="cpu"), {"some": 2.0}, tile=TILE)
    point.write(artifact)
    common = ["--model", random_model, "--texts", folder, "--length", 384, "--judge", 1, "--short", "--out", out]
    assert experiment(monkeypatch, *common, "--thresholds", artifact) == 0
    found = json.loads(out.read_text())["model"]
    rows = {row["name"]: row for row in found["rows"]}
    assert found["evaluation"]["texts"] == 2 and rows[eight_bits.FLOOR]["kl_over_floor"]["value"] == 0
    assert all(row["finite"] and row["positions"] == 2 * 384 for row in rows.values())
    assert all((row["skip"] > 0) == name.startswith("some: ") for name, row in rows.items())
    assert rows[eight_bits.FLOOR]["kl"] < rows[eight_bits.INT8]["kl"] < rows["FP8 scores, P and V"]["kl"]
    table = eight_bits_table(json.loads(out.read_text()), "../x.json")
    assert all(f"| {name} |" in table for name in rows)
    with pytest.raises(InputError, match=r"config\.json"):
        experiment(monkeypatch, *common, "--thresholds", f"{random_model}/config.json")


def test_what_measures_nothing_fails():
    rows = [{"name": name, "finite": name != "b", "skip": skip} for name, skip in (("a", 0.0), ("b", 0.5), ("c", 0.0))]
    assert eight_bits.failures(rows, {"b", "c"}) == ["b is not finite", "c: nothing was skipped"]


def test_planted_data_become_a_table(monkeypatch, tmp_path):
    out, few = tmp_path / "planted.json", {name: eight_bits.VALUES[name] for name in eight_bits.SHORT}
    monkeypatch.setattr(eight_bits, "VALUES", few)
    monkeypatch.setattr(eight_bits, "Shape", lambda name, *_: Shape(name, 2, 1, 32))
    monkeypatch.setattr(eight_bits, "LENGTHS", (256, 128))
    assert experiment(monkeypatch, "--out", out) == 0
    found = json.loads(out.read_text())
    assert len(found["planted"]["rows"]) == len(eight_bits.PLANTED) * (1 + len(few))
    assert planted_table(found, "../x.json").count("\n") == 3 + len(few) + 1


def test_arguments_that_make_no_sense(monkeypatch, tmp_path):
    for arguments in (["--model", "x"], ["--short"], ["--thresholds", "x"]):
        with pytest.raises(UsageError, match="--model"):
            experiment(monkeypatch, "--out", tmp_path / "x.json", *arguments)
    with pytest.raises(UsageError, match="--judge must be at least 1"):
        experiment(monkeypatch, "--out", tmp_path / "x.json", "--judge", 0)
    for option in ("--length", "--minutes"):
        with pytest.raises(UsageError, match="must be above 0"):
            experiment(monkeypatch, "--out", tmp_path / "x.json", option, 0)
