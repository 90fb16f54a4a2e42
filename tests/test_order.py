"""Names in the order people count in, and short where all begin alike."""

from bsfa_cli.order import natural, ordered, shortened


def test_numbers_in_names_count():
    names = [f"model.layers.{i}.self_attn" for i in (28, 3, 29, 4, 10)] + ["model.visual.blocks.2.attn", "0", ""]
    assert sorted(names, key=natural) == [
        "", "0", *(f"model.layers.{i}.self_attn" for i in (3, 4, 10, 28, 29)), "model.visual.blocks.2.attn"
    ]  # fmt: skip


def test_objects_are_ordered_all_the_way_down():
    data = ordered({"b": [{"layer.10": 1, "layer.9": (2, 3)}], "a": None})
    assert list(data) == ["a", "b"] and list(data["b"][0]) == ["layer.9", "layer.10"]
    assert data == {"a": None, "b": [{"layer.9": [2, 3], "layer.10": 1}]}


def test_what_all_names_share_is_said_once():
    pattern, names = shortened(f"model.layers.{i}.self_attn" for i in (0, 11))
    assert pattern == "model.layers.*.self_attn" and list(names.values()) == ["0", "11"]
    assert shortened(["a.b"]) == ("", {"a.b": "a.b"})
    mixed = ["model.layers.0.attn", "visual.blocks.0.attn"]
    assert shortened(mixed) == ("*.0.attn", {mixed[0]: "model.layers", mixed[1]: "visual.blocks"})
    assert shortened(["a.a", "a.a.a"])[1] == {"a.a": "a", "a.a.a": "a.a"}
