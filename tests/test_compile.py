"""Every kernel variant as machine code for its GPU, compiled without one: no serialized wgmma, few spills, it fits."""

from __future__ import annotations

import re

import pytest
import sass
import torch
from bsfa_kernels import hopper, hopper_pipeline

pytestmark = pytest.mark.long

BF16, FP16 = torch.bfloat16, torch.float16
KB = 1024
HOPPER_SHARED = 227 * KB
SMALLEST_SHARED = 99 * KB  # what any GPU since sm_80 gives one program (sm_86, sm_89, sm_120)
A100_SHARED = 163 * KB
MLA = (192, 128)

RESERVED = {0, 1, 2, 3}  # Triton's hardware barriers; those after them are the kernel's

# (dtype, head dim, causal, gates, spans, block lists). Every pair of values of any two columns occurs, dtype with gate,
# causal with lists and so on, where head dims 96 and 128 count as one, since they are equally wide; those above 128
# have a few of them only. Those not causal, with both gates and spans, spill most.
HOPPER = [
    (BF16, 128, True, "g", False, False),
    (BF16, 128, True, "ag", False, False),
    (BF16, 128, True, "a", True, False),
    (FP16, 128, False, "g", True, False),
    (BF16, 128, False, "ag", True, False),
    (BF16, 128, True, "g", True, True),
    (FP16, 128, False, "ag", True, True),
    (FP16, 128, True, "", False, True),
    (FP16, 64, True, "ag", True, False),
    (FP16, 64, False, "a", False, False),
    (BF16, 64, False, "", True, False),
    (BF16, 64, False, "g", True, True),
    (FP16, 96, False, "ag", False, False),
    (FP16, 96, True, "a", False, True),
    (BF16, 192, True, "g", False, False),
    (BF16, 256, True, "g", False, False),
    (FP16, 256, False, "ag", True, False),
    (BF16, 256, True, "ag", True, True),
    (BF16, MLA, True, "", False, False),
    (BF16, MLA, True, "g", False, False),
    (FP16, MLA, False, "ag", True, False),
    (BF16, MLA, True, "g", True, True),
    (FP16, (128, 64), True, "a", False, False),
]


def limits(head_dim: int | tuple[int, int], causal: bool, lists: bool) -> tuple[int, int]:
    """Bytes of spill stores a Hopper variant may have, and accesses to spilled values in its loops over key tiles, of
    2,048 cycles of products a tile; from Triton 3.6 and 3.7. At 64 and 192 there are registers to spare; at 128, and
    with V of 128, consumers hold 128 accumulators in 160 registers, at 256 192 in 240 (kernels/NOTES.md).
    """
    if head_dim in (64, 192):
        return 0, 0
    if head_dim == 256:
        return 220, 28
    if head_dim == MLA and not causal:
        return 268, 73
    if head_dim == MLA and lists:
        return 92, 4
    # 20 bytes in the loop cost 4 % at 0 % skipped (kernels/NOTES.md); not causal, one value is read.
    return 56, 0 if causal else 2


def label(value) -> str:
    names = {True: "causal", False: "full", "g": "gap", "a": "absolute", "ag": "both", "": "open"}
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return sass.NAMES[value] if isinstance(value, torch.dtype) else str(names.get(value, value))


# A window, softcap and sinks, as the models that have them do (gpt-oss, Mistral, Gemma 2), and all at once: bytes
# spilled and accesses in the loops, without a gate and with the gap gate. More than 0 is a debt (kernels/NOTES.md).
SCORING = [
    ("ws", BF16, 64, (0, 0), (0, 0)),
    ("w", BF16, 128, (36, 1), (36, 5)),
    ("wcs", BF16, 96, (60, 10), (220, 100)),
]


def hopper_label(variant) -> str:
    dtype, head_dim, causal, gate, spans, lists = variant
    return "-".join([label(dtype), label(head_dim), label(causal), label(gate), *["spans"] * spans, *["lists"] * lists])


@pytest.mark.parametrize("variant", HOPPER, ids=hopper_label)
def test_hopper_runs_wgmma_asynchronously_within_its_registers(variant, tmp_path):
    code = sass.hopper(tmp_path, *variant)
    assert not code.serialized, code.notes
    # Per consumer: a product is one to eight wgmmas and a single wait.
    assert code.count("HGMMA") >= 36
    assert code.count("WARPGROUP.DEPBAR") * 4 <= code.count("HGMMA")
    _, head_dim, causal, _, _, lists = variant
    spilled, in_loops = limits(head_dim, causal, lists)
    assert code.spilled <= spilled and code.spilled_in_loops <= in_loops
    # The output by 16 bytes, whatever its strides; narrow stores are of lse and counts, 4 a consumer.
    wide = code.count("STG.E.128")
    assert wide >= 12 and code.count("STG") <= wide + 12
    assert len(code.product_loops) == sass.hopper_shape(head_dim).consumers
    assert code.shared <= HOPPER_SHARED
    assert triton_barriers(code) <= RESERVED


@pytest.mark.parametrize("head_dim, gate, spans", [(128, "g", True), (128, "a", False), (64, "g", True)])
def test_hopper_on_pages_costs_no_registers(head_dim, gate, spans, tmp_path):
    code = sass.hopper(tmp_path, BF16, head_dim, True, gate, spans, paged=True, packed=spans)
    assert not code.serialized, code.notes
    assert code.spilled <= limits(head_dim, True, False)[0] and code.spilled_in_loops == 0
    assert triton_barriers(code) <= RESERVED


def triton_barriers(code) -> set[int]:
    """Hardware barriers in the machine code by number, but for the kernel's own."""
    own = range(hopper_pipeline.RETURNED.value, 16)
    return {int(number, 16) for number in re.findall(r"BAR\.\S+ (0x[0-9a-f]+)", code.sass)}.difference(own)


@pytest.mark.parametrize(
    "head_dim, gate, spans, lists, scoring",
    [
        (128, "", False, False, ""),
        (128, "g", False, False, ""),
        (128, "ag", True, True, "s"),
        (64, "ag", True, True, "s"),
        (64, "g", False, False, "w"),
        (128, "g", True, False, "w"),
        (256, "", False, False, ""),
        (256, "ag", True, True, "s"),
    ],
)
def test_hopper_with_int8_scores(head_dim, gate, spans, lists, scoring, tmp_path):
    code = sass.hopper(tmp_path, BF16, head_dim, True, gate, spans, lists, scoring, int8=True)
    assert not code.serialized, code.notes
    shape = sass.hopper_shape(head_dim, True)
    assert code.count("IGMMA") == shape.consumers * shape.slabs * shape.columns // 32
    assert code.count("HGMMA") >= 24
    assert code.count("I2F") <= 40  # integers become floats by an addition
    assert code.spilled <= 56 and code.spilled_in_loops <= 6
    assert code.shared <= HOPPER_SHARED
    assert triton_barriers(code) <= RESERVED


@pytest.mark.parametrize("gate", ["", "g"], ids=label)
@pytest.mark.parametrize("scoring, dtype, head_dim, without, gated", SCORING, ids=lambda value: str(value))
def test_what_windows_softcap_and_sinks_spill_is_known(scoring, dtype, head_dim, without, gated, gate, tmp_path):
    code = sass.hopper(tmp_path, dtype, head_dim, True, gate, False, scoring=scoring)
    assert not code.serialized, code.notes
    assert (code.spilled, code.spilled_in_loops) <= (gated if gate else without)
    assert code.spilled_in_loops <= (gated if gate else without)[1]
    assert code.shared <= HOPPER_SHARED


@pytest.mark.parametrize(
    "heads, keys, head_dim, expected",
    [(8, 8192, 128, 8), (8, 8200, 128, 4), (8, 32768, 128, 2), (8, 131072, 128, 1), (8, 1 << 20, 128, 1),
     (12, 32768, 64, 4), (7, 16384, 128, 1), (1, 64, 64, 1)],
)  # fmt: skip
def test_a_section_is_as_many_equal_parts_of_the_heads_as_fit(heads, keys, head_dim, expected):
    k = torch.empty(3, heads, keys, head_dim, dtype=BF16, device="meta")
    assert hopper.section_kv_heads(k, k, keys) == expected
    each = 2 * keys * head_dim * 2
    assert expected == 1 or expected * each <= hopper.SECTION_BYTES
    assert hopper.section_kv_heads(k, k[..., :1], keys) >= expected


# (capability, head dim, rows, keys, block lists): tiles of every width and shape. Those of head dims 96 and 128 are
# equally wide, and without wgmma a tile of 64 columns needs less of everything than the same one of 128.
PORTABLE = [
    (80, 64, 64, 128, True),
    (80, 128, 128, 64, True),
    (80, 256, 64, 128, True),
    (90, 64, 64, 128, True),
    (90, 64, 128, 64, False),
    (90, 96, 64, 128, False),
    (90, 128, 128, 64, True),
    (90, 256, 64, 128, True),
    (90, 256, 128, 64, False),
]


@pytest.mark.parametrize("capability, head_dim, rows, keys, lists", PORTABLE)
def test_portable_uses_tensor_cores_and_fits_any_gpu(capability, head_dim, rows, keys, lists, tmp_path):
    code = sass.portable(tmp_path, BF16, head_dim, rows, keys, capability, lists)
    assert not code.serialized, code.notes
    if capability == 90:
        assert code.count("HGMMA") >= 16 and code.count("HMMA") == 0
        assert code.count("WARPGROUP.DEPBAR") * 4 <= code.count("HGMMA")
    else:
        assert code.count("HMMA") >= 64
        assert head_dim > 128 or code.spilled <= 128
    # Where there is no wgmma, head dim 256 needs more than the smallest GPUs have.
    assert code.shared <= (A100_SHARED if head_dim == 256 and capability == 80 else SMALLEST_SHARED)


@pytest.mark.parametrize("capability, head_dim", [(80, 64), (90, 128)])
def test_portable_int8_scores_are_integer_products_of_tensor_cores(capability, head_dim, tmp_path):
    code = sass.portable(tmp_path, BF16, head_dim, 64, 128, capability, int8=True)
    assert not code.serialized, code.notes
    assert code.count("IGMMA" if capability == 90 else "IMMA") >= head_dim // 32 * 2
    assert code.count("HGMMA" if capability == 90 else "HMMA") >= 16  # PV
    assert code.shared <= SMALLEST_SHARED


@pytest.mark.parametrize("kernel", ["_sum_keys", "_quantise_keys", "_quantise_queries"])
@pytest.mark.parametrize("capability, head_dim", [(80, 128), (90, 128), (90, 256)])
def test_int8_preparation_moves_16_bytes_at_a_time_without_spills(capability, head_dim, kernel, tmp_path):
    code = sass.preparation(tmp_path, kernel, BF16, head_dim, capability)
    assert code.spilled == 0 and not code.serialized
    assert code.shared <= (HOPPER_SHARED if capability == 90 else SMALLEST_SHARED)
    loads = [opcode for opcode in code.instructions if opcode.startswith(("LDG.E", "LDGSTS"))]
    assert any(opcode.endswith(".128") for opcode in loads) and not any("U16" in opcode for opcode in loads)
    if kernel != "_sum_keys":
        assert code.count("HGMMA" if capability == 90 else "HMMA") >= 4
        assert "STG.E.128" in code.instructions and code.count("STG.E.U8") == 0


# (capability, head dim, pairs of query and head, page, spans, scoring): from decoding to a chunk of 64 queries.
SPLIT_KV = [
    (80, 128, 4, 0, False, ""),
    (80, 128, 256, 16, True, ""),
    (90, 128, 4, 0, False, ""),
    (90, 128, 256, 0, False, ""),
    (90, 128, 256, 16, True, ""),
    (90, 128, 256, 128, True, "wcs"),
    (90, 256, 64, 0, False, ""),
]


@pytest.mark.parametrize("capability, head_dim, pairs, page, spans, scoring", SPLIT_KV)
def test_split_kv_streams_16_bytes_at_a_time_without_spills(
    capability, head_dim, pairs, page, spans, scoring, tmp_path
):
    code = sass.split_kv(
        tmp_path, "attend", BF16, head_dim, pairs, capability, page=page, spans=spans, scoring=scoring
    )  # fmt: skip
    assert not code.serialized, code.notes
    assert code.spilled == 0
    if capability == 90:
        assert code.count("HGMMA") >= 8 and code.count("WARPGROUP.DEPBAR") * 4 <= code.count("HGMMA")
    else:
        assert code.count("HMMA") >= 32
    # Of 4 bytes are page numbers.
    copies = [opcode for opcode in code.instructions if opcode.startswith("LDGSTS")]
    wide = sum(opcode.endswith(".128") for opcode in copies)
    assert wide >= 8 and len(copies) - wide <= (16 if page else 0)
    assert code.shared <= (HOPPER_SHARED if capability == 90 else SMALLEST_SHARED)


def test_split_kv_in_float32_fits_the_smallest_gpus(tmp_path):
    code = sass.split_kv(tmp_path, "attend", torch.float32, 128, 256, 80)
    assert code.shared <= SMALLEST_SHARED and code.spilled == 0


def test_split_kv_sums_its_parts_without_spills(tmp_path):
    code = sass.split_kv(tmp_path, "combine", BF16, 128, 4, 90, spans=True, scoring="s")
    assert code.spilled == 0 and "LDG.E.128" in " ".join(code.instructions)


@pytest.mark.parametrize("causal", [True, False], ids=label)
@pytest.mark.parametrize("width, forced", [(1, False), (3, True)])
def test_streams_of_block_lists_compile(width, forced, causal, tmp_path):
    code = sass.schedule(tmp_path, width, forced, causal)
    assert code.spilled == 0 and code.count("STG") >= 1


def test_a_spill_and_a_serialized_product_would_be_seen():
    notes = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    notes += "    8 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads\n"
    text = "        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;\n"
    text += "        /*0020*/                   STL [R1+0x2c], R0 ;\n"
    code = sass.MachineCode(0, notes, text)
    assert code.serialized and code.spilled == 12 and code.spilled_in_loops == 0
    inside = ".L_x_1:\n.L_x_2:\n" + text + "@P0 BRA `(.L_x_2) ;\nLDL R1, [R2] ;\n@P1 BRA `(.L_x_1) ;\n"
    assert sass.MachineCode(0, notes, inside).spilled_in_loops == 1
    assert code.instructions == ["HGMMA.64x128x16.F32.BF16", "STL"]


def test_costs_of_dropping_stream_both_products_without_spills(tmp_path):
    code = sass.drop_costs(tmp_path, "_shares", BF16, 128, 90)
    assert not code.serialized, code.notes
    assert code.count("HGMMA") >= 32 and code.spilled == 0
    assert code.shared <= HOPPER_SHARED


@pytest.mark.parametrize("capability, spilled", [(80, 32), (90, 0)])
def test_sums_over_dropped_tiles_are_a_product(capability, spilled, tmp_path):
    code = sass.drop_costs(tmp_path, "_costs", BF16, 64, capability)
    assert code.count("HGMMA" if capability == 90 else "HMMA") >= 24 and code.spilled <= spilled
    assert code.shared <= SMALLEST_SHARED
