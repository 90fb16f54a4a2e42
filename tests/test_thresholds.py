"""The artifact: canonical bytes, interpolation, and a refusal in one sentence for every malformed file."""

import dataclasses
import io
import json
import re
import struct

import pytest
import safetensors.torch
import torch
from bsfa_kernels import TileShape, container
from bsfa_kernels.thresholds import (
    MODEL_KEYS,
    Point,
    Reached,
    Thresholds,
    ThresholdsError,
    interpolate,
)

MODEL = dict.fromkeys(MODEL_KEYS) | {
    "id": "some/llama",
    "query_heads": 4,
    "head_dim": 64,
    "scale": 0.125,
    "rope": {"theta": 1e4},
    "config_hash": "abc",
}


def make(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.self_attn": torch.randn(2, 4, 5, generator=generator) for i in range(3)}
    tensors["model.layers.1.self_attn"][1, 2, 0] = -torch.inf
    points = (
        Point("skip-50", "gap", "target-skip", 0.5, None, Reached(0.5, 0.01, 0.1), Reached(0.49, 0.011, 0.12)),
        Point("topk-64", "absolute", "top-k", 64),
    )
    values = dict(
        model=MODEL, tile=TileShape(64, 128), keep_sink=True, knots=(96, 192, 384, 768, 1536), points=points,
        tensors=tensors, provenance={"seed": 0, "data": "builtin:mixed"},
    )  # fmt: skip
    return Thresholds(**values | changes)


def test_same_content_same_bytes_and_round_trip(tmp_path):
    path = tmp_path / "thresholds.safetensors"
    make().write(path)
    reversed_order = dict(reversed(make().tensors.items()))
    assert path.read_bytes() == make(tensors=reversed_order).to_bytes()
    back = Thresholds.read(path)
    assert back.to_bytes() == path.read_bytes()
    assert back.points == make().points and back.knots == make().knots and back.tile == TileShape(64, 128)
    for name, tensor in make().tensors.items():
        assert torch.equal(back.tensors[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_other_safetensors_readers_open_it(tmp_path):
    make().write(tmp_path / "t.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in make().tensors.items())


def test_three_points_of_an_8b_model_to_128k_stay_under_a_megabyte():
    knots = tuple(round(64 * 2 ** (i / 4)) for i in range(45))
    tensors = {f"model.layers.{i}.self_attn": torch.zeros(3, 32, len(knots)) for i in range(32)}
    points = tuple(Point(f"skip-{n}", "gap", "target-skip", n / 100) for n in (25, 50, 75))
    assert len(make(knots=knots, tensors=tensors, points=points).to_bytes()) < 1_000_000


def test_interpolation_is_linear_in_position_flat_outside_and_never_softens_minus_infinity():
    inf = torch.inf
    values = torch.tensor([[1.0, 3.0, -inf, -inf, 5.0]])
    positions = torch.tensor([0, 10, 15, 20, 21, 30, 35, 40, 49, 50, 99])
    result = interpolate(values, (10, 20, 30, 40, 50), positions)
    assert result.tolist() == [[1.0, 1.0, 2.0, 3.0, -inf, -inf, -inf, -inf, -inf, 5.0, 5.0]]
    assert interpolate(torch.tensor([7.0]), (64,), torch.tensor([0, 64, 1000])).tolist() == [7.0, 7.0, 7.0]


def test_gate_reads_each_tile_at_its_centre():
    knots = tuple(range(32, 32 + 64 * 8, 64))
    exact = torch.randn(1, 4, 8)
    thresholds = make(knots=knots, tensors={"a": exact}, points=(Point("p", "absolute", "official", 64),))
    gate = thresholds.gate("a", None, query_tiles=10)
    assert gate.gap is None and torch.equal(gate.absolute[:, :8], exact[0])
    assert torch.equal(gate.absolute[:, 9], exact[0, :, 7])
    assert make().gate("model.layers.1.self_attn", "skip-50", 3).absolute is None


@pytest.mark.parametrize("arguments, said", [(("a", "skip-50"), "no module 'a'"), (("x", None), "skip-50, topk-64")])
def test_gate_names_what_is_missing(arguments, said):
    with pytest.raises(ThresholdsError, match=said):
        make().gate(*arguments, query_tiles=4)


def test_check_model_names_the_field():
    make().check_model(MODEL | {"id": "elsewhere", "revision": "main", "layers": 99})
    for key, value in {"query_heads": 8, "scale": 0.25, "config_hash": "xyz"}.items():
        with pytest.raises(ThresholdsError, match=f"{key} is"):
            make().check_model(MODEL | {key: value})
    with pytest.raises(ThresholdsError, match=r"rope\.theta is 10000\.0 there and 1000000\.0 here"):
        make().check_model(MODEL | {"rope": {"theta": 1e6}})
    made_for = MODEL | {"config": {"eps": 1e-6, "rope": {"factor": 8, "kind": "yarn"}, "same": [1, 2]}}
    thresholds = make(model=made_for)
    thresholds.check_model(MODEL | {"config": None})
    for changes, said in (
        ({"eps": 1e-5, "rope": {"factor": 4, "kind": "yarn"}}, "config.eps is 1e-06 there and 1e-05 here"),
        ({"rope": {"factor": 4, "kind": "yarn"}}, "config.rope.factor is 8 there and 4 here"),
        ({"rope": {"factor": 8}}, "config.rope.kind is yarn there and absent here"),
        ({"added": None}, "config.added is absent there and null here"),
    ):
        with pytest.raises(ThresholdsError, match=f": {re.escape(said)}$"):
            thresholds.check_model(MODEL | {"config": made_for["config"] | changes, "config_hash": "other"})
    paths = {path: 4 for path in make().tensors}
    make().check_model(MODEL, paths)
    with pytest.raises(ThresholdsError, match=r"layers\.2.*query_heads is 4 in the thresholds and 8"):
        make().check_model(MODEL, paths | {"model.layers.2.self_attn": 8})
    with pytest.raises(ThresholdsError, match="does not have"):
        make().check_model(MODEL, {})
    with pytest.raises(ThresholdsError, match="64x128.*128x64"):
        make().check_tile(TileShape(128, 64))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"knots": (1, 2, 2, 3, 4)}, "increase"),
        ({"knots": (1, 2, 3, 4, 5.5)}, "whole numbers"),
        ({"points": ()}, "1 to 64 points"),
        ({"tensors": {}}, "no module"),
        ({"tensors": {"a": torch.zeros(2, 4, 5).double()}}, "float32"),
        ({"tensors": {"a": torch.zeros(2, 4, 6)}}, "5 knots"),
        ({"tensors": {"a": torch.full((2, 4, 5), torch.nan)}}, "NaN"),
        ({"tensors": {"a": torch.full((2, 4, 5), torch.inf)}}, r"\+inf"),
        ({"model": {"id": "x"}}, "lacks"),
        ({"keep_sink": 1}, "true or false"),
    ],
)
def test_a_thresholds_object_cannot_be_wrong(changes, said):
    with pytest.raises(ThresholdsError, match=said):
        make(**changes)


def rebuilt(edit_header=None, edit_metadata=None, body=None) -> bytes:
    """The valid file with its header or metadata changed by hand; either may come back as raw JSON text."""
    content = make().to_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, tail = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = json.loads(header["__metadata__"]["bsfa"])
    if edit_metadata:
        text = edit_metadata(metadata)
        header["__metadata__"]["bsfa"] = text if isinstance(text, str) else json.dumps(metadata)
    text = edit_header(header) if edit_header else None
    head = (text if isinstance(text, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(head)) + head + (tail if body is None else body)


def repeated(pairs: dict, name: str) -> str:
    return json.dumps(pairs)[:-1] + f", {json.dumps(name)}: {json.dumps(pairs[name])}}}"


def pickled(legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"thresholds": torch.zeros(4)}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def earlier(metadata: dict) -> None:
    """As schema 1 was written: its model has no `config`, its points no scores."""
    second(metadata)
    metadata["schema"] = 1
    del metadata["model"]["config"]


def second(metadata: dict) -> None:
    """As schema 2 was written: its points have no scores, and nothing is by modality."""
    metadata["schema"] = 2
    del metadata["modalities"]
    for point in metadata["points"]:
        del point["scores"], point["exact_heads"]


def test_files_of_schema_2_are_exact():
    thresholds = Thresholds.from_bytes(rebuilt(edit_metadata=second))
    assert [point.scores for point in thresholds.points] == ["exact", "exact"]
    assert thresholds.points == make().points


def test_int8_scores_and_the_heads_that_stay_exact_come_back():
    heads = {"model.layers.1.self_attn": [0, 3]}
    point = Point("skip-50", "gap", "target-skip", 0.5, scores="int8", exact_heads=heads)
    other = Point("exact", "gap", "target-skip", 0.5)
    back = Thresholds.from_bytes(make(points=(point, other)).to_bytes())
    assert back.points == (point, other)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(scores="fp8"), "scores must be one of exact, int8, got .?fp8"),
        (dict(exact_heads={"model.layers.1.self_attn": [0]}), "exact_heads belong to int8 scores"),
        (dict(scores="int8", exact_heads={"elsewhere": [0]}), "exact_heads name .?elsewhere.?, which is no module"),
        (dict(scores="int8", exact_heads={"model.layers.1.self_attn": [4]}), "name a head past its 4"),
        (dict(scores="int8", exact_heads={"model.layers.1.self_attn": [1, 1]}), "must increase"),
        (dict(scores="int8", exact_heads={"model.layers.1.self_attn": "01"}), "must be a list"),
        (dict(scores="int8", exact_heads={"model.layers.1.self_attn": []}), "exact_heads of"),
        (dict(scores="int8", exact_heads=[]), "must be a JSON object"),
    ],
)
def test_wrong_scores_are_refused(fields, said):
    with pytest.raises(ThresholdsError, match=said):
        make(points=(Point("a", "gap", "target-skip", 0.5, **fields), Point("b", "gap", "target-skip", 0.5)))


def test_files_of_schema_1_are_read_and_checked_by_their_hash():
    thresholds = Thresholds.from_bytes(rebuilt(edit_metadata=earlier))
    assert thresholds.model == MODEL and thresholds.points == make().points
    here = MODEL | {"config": {"eps": 1e-5}}
    thresholds.check_model(here)
    with pytest.raises(ThresholdsError, match="config_hash is abc there and xyz here"):
        thresholds.check_model(here | {"config_hash": "xyz"})
    assert Thresholds.from_bytes(thresholds.to_bytes()).model == MODEL


def test_thresholds_by_modality_survive_a_file_and_are_the_lowest_where_it_is_not_known(tmp_path):
    modal = {path: torch.randn(2, 3, 4, 5) for path in make().tensors}
    modal[FIRST][0, 2, 1] = -torch.inf
    rest = {name: value for name, value in vars(make()).items() if name not in ("tensors", "modal")}
    made = Thresholds.by_modality(modal=modal, **rest)
    made.write(tmp_path / "t.safetensors")
    read = Thresholds.read(tmp_path / "t.safetensors")
    assert read.to_bytes() == made.to_bytes() and torch.equal(read.modal[FIRST], modal[FIRST])
    each = read.modal_values(FIRST, read.points[0].name, 40)
    lowest = read.gate(FIRST, read.points[0].name, 40)
    lowest = lowest.gap if lowest.absolute is None else lowest.absolute
    assert each.shape == (3, 4, 40) and (lowest <= each.amin(0)).all() and lowest[1].isinf().all()
    assert make().modal_values(FIRST, make().points[0].name, 40) is None
    for changed, said in (
        ({FIRST: modal[FIRST]}, "every module or for none"),
        ({path: tensor + 1 for path, tensor in modal.items()}, "other thresholds by modality"),
        ({path: tensor[:, :2] for path, tensor in modal.items()}, "by modality"),
    ):
        with pytest.raises(ThresholdsError, match=said):
            Thresholds(modal=changed, tensors=made.tensors, **rest)


def test_a_header_that_nobody_could_read_is_not_written(tmp_path):
    with pytest.raises(container.Malformed, match="the header would take"):
        make(provenance={"text": "x" * (5 << 20)}).write(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


def nan_body() -> bytes:
    return struct.pack("<f", float("nan")) + make().to_bytes()[-4 * (3 * 40 - 1) :]


FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def entry(path, **fields):
    return lambda header: header[path].update(fields) or header


def meta(**fields):
    return lambda metadata: metadata.update(fields)


MALFORMED = {
    "empty": (b"", "truncated"),
    "text": (b"thresholds: 1\nmore text here\n", "header of"),
    "header cut": (make().to_bytes()[:100], "truncated"),
    "body cut": (make().to_bytes()[:-4], "truncated"),
    "bytes after": (make().to_bytes() + b"1234", "4 bytes follow"),
    "huge header": (struct.pack("<Q", 1 << 40) + b"{}", "header of 1,099,511,627,776 bytes"),
    "zip pickle": (pickled(False), "pickle.*--from-official"),
    "legacy pickle": (pickled(True), "pickle.*--from-official"),
    "header not JSON": (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
    "header deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
    "header not UTF-8": (struct.pack("<Q", 4) + b"{\xff\xff}", "not JSON"),
    "header a list": (struct.pack("<Q", 2) + b"[]", "must be a JSON object"),
    "no metadata": (rebuilt(lambda h: h.pop("__metadata__") and None), "one key 'bsfa'"),
    "more metadata": (rebuilt(lambda h: h["__metadata__"].update(format="pt")), "one key 'bsfa'"),
    "tensor twice": (rebuilt(lambda h: repeated(h, FIRST)), "layers.0.self_attn' twice"),
    "metadata key twice": (rebuilt(edit_metadata=lambda m: repeated(m, "keep_sink")), "keep_sink' twice"),
    "metadata NaN": (rebuilt(edit_metadata=lambda m: json.dumps(m | {"schema": float("nan")})), "NaN"),
    "overlap": (rebuilt(entry(SECOND, data_offsets=[0, 160])), "starts at byte 0"),
    "gap": (rebuilt(lambda h: h.pop(SECOND) and None), "starts at byte 320"),
    "negative offset": (rebuilt(entry(FIRST, data_offsets=[-160, 0])), "whole numbers"),
    "offset past the end": (rebuilt(body=b""), "truncated"),
    "wrong size": (rebuilt(entry(FIRST, shape=[2, 4, 6])), "but 160 bytes"),
    "wrong rank": (rebuilt(entry(FIRST, shape=[8, 5])), r"\[points, heads, knots\]"),
    "other dtype": (rebuilt(entry(FIRST, dtype="BF16")), "dtype"),
    "wide dtype": (rebuilt(entry(FIRST, dtype="I64", shape=[1, 4, 5])), "float32"),
    "unknown entry field": (rebuilt(entry(FIRST, extra=1)), "unknown extra"),
    "other heads": (rebuilt(entry(FIRST, shape=[4, 2, 5])), "2 points"),
    "NaN": (rebuilt(body=nan_body()), "NaN"),
    "shape of nothing": (rebuilt(entry(FIRST, shape=[1 << 31] * 3 + [0], data_offsets=[0, 0])), "no tensor can have"),
    "name of two lines": (rebuilt(lambda h: h.update({"a\nb\x1b[2J\ud800": h.pop(FIRST) | {"dtype": "BF16"}})),
                          r"a\\nb\\x1b\[2J\\ud800 must have dtype"),
    "module of two lines": (rebuilt(lambda h: h.update({"a\nb": h.pop(FIRST) | {"shape": [8, 5]}})), r"a\\nb must be"),
    "key of two lines": (rebuilt(lambda h: repeated(h | {"a\nb": {}}, "a\nb")), r"the key 'a\\nb' twice"),
    "field of two lines": (rebuilt(entry(FIRST, **{"a\nb": 1})), r"unknown a\\nb"),
    "id of two lines": (rebuilt(edit_metadata=lambda m: m["points"][0].update(name="a\nb")), r"name must be .* a\\nb"),
    "schema newer": (rebuilt(edit_metadata=meta(schema=5, future=1)), "schema 5.*upgrade"),
    "config in schema 1": (
        rebuilt(edit_metadata=lambda m: second(m) or m.update(schema=1)), "model has unknown config"
    ),
    "scores in schema 2": (rebuilt(edit_metadata=lambda m: m.update(schema=2) or m.pop("modalities")),
                           "a point has unknown exact_heads, scores"),
    "modalities in schema 3": (rebuilt(edit_metadata=meta(schema=3)), "unknown modalities"),
    "other modalities": (rebuilt(edit_metadata=meta(modalities=["text", "sound"])), "modalities must be null or text"),
    "modalities of three axes": (rebuilt(edit_metadata=meta(modalities=["text", "image", "mixed"])), "3 modalities"),
    "config missing": (rebuilt(edit_metadata=lambda m: m["model"].pop("config")), "model lacks config"),
    "schema text": (rebuilt(edit_metadata=meta(schema="1")), "schema must be"),
    "unknown key": (rebuilt(edit_metadata=meta(colour="red")), "unknown colour"),
    "missing key": (rebuilt(edit_metadata=lambda m: m.pop("tile") and None), "lacks tile"),
    "tile of one": (rebuilt(edit_metadata=meta(tile=[64])), "2 entries"),
    "tile zero": (rebuilt(edit_metadata=meta(tile=[0, 64])), "whole numbers"),
    "knots text": (rebuilt(edit_metadata=meta(knots="abcde")), "knots must be a list"),
    "knots fall": (rebuilt(edit_metadata=meta(knots=[5, 4, 3, 2, 1])), "increase"),
    "gate unknown": (rebuilt(edit_metadata=lambda m: m["points"][0].update(gate="both")), "gap, absolute"),
    "gate a list": (rebuilt(edit_metadata=lambda m: m["points"][0].update(gate=[])), "gap, absolute"),
    "points same": (rebuilt(edit_metadata=lambda m: m["points"][1].update(name="skip-50")), "different names"),
    "point field": (rebuilt(edit_metadata=lambda m: m["points"][0].pop("recipe") and None), "lacks recipe"),
    "skip infinite": (rebuilt(edit_metadata=lambda m: json.dumps(m).replace("0.49", "1e999")), "skip must be"),
    "model id": (rebuilt(edit_metadata=lambda m: m["model"].update(id=5)), "id must be text"),
    "model a list": (rebuilt(edit_metadata=meta(model=[])), "model must be"),
    "provenance a list": (rebuilt(edit_metadata=meta(provenance=[])), "provenance"),
    "sink a number": (rebuilt(edit_metadata=meta(keep_sink=1)), "keep_sink"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_sentence(case, tmp_path):
    content, said = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ThresholdsError, match=said) as caught:
        Thresholds.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rebuilt_helper_leaves_a_valid_file():
    assert Thresholds.from_bytes(rebuilt()).points == make().points


def test_oversized_and_unreadable_files(tmp_path, monkeypatch):
    make().write(tmp_path / "t")
    monkeypatch.setattr("bsfa_kernels.thresholds.MAX_FILE_BYTES", 1000)
    with pytest.raises(ThresholdsError, match="larger than"):
        Thresholds.read(tmp_path / "t")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ThresholdsError, match="cannot read"):
            Thresholds.read(path)


def test_parts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().knots = ()
