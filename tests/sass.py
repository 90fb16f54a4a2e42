"""Kernels compiled to machine code on a machine without a GPU, and what ptxas and the disassembly say about them."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}
RUNTIME = dict(
    lse_ptr="*fp32", kept_ptr="*i32", candidates_ptr="*i32", absolute_ptr="*fp32", gap_ptr="*fp32", spans_ptr="*i32",
    entries_ptr="*i32", lengths_ptr="*i32", order_ptr="*i64", table_ptr="*i32", packed_ptr="*i32",
    table_row="i32",
    sinks_ptr="*fp32", q_scale_ptr="*fp32", k_scale_ptr="*fp32", q_shift_ptr="*fp32", scale="fp32", softcap="fp32",
    window="i32", q_offset="i32",
    q_rows="i32", k_rows="i32", tiles="i32", k_scales="i32",
    absolute_tiles="i32", gap_tiles="i32", room="i32", out_batch="i32", out_head="i32", out_row="i32",
)  # fmt: skip


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel: shared memory in bytes, what `ptxas -v` said, and the disassembly."""

    shared: int
    notes: str
    sass: str

    @property
    def spilled(self) -> int:
        """Bytes of spill stores."""
        return int(re.search(r"(\d+) bytes spill stores", self.notes)[1])

    @cached_property
    def product_loops(self) -> list[list[str]]:
        """Lines of the innermost loops around matrix products."""
        lines = [line.strip() for line in self.sass.splitlines()]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".L_x_") and line.endswith(":")}
        jumps = [(i, re.search(r"\bBRA `\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
        loops = [range(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i]
        around = ([loop for loop in loops if i in loop] for i, line in enumerate(lines) if "HGMMA" in line)
        innermost = {min(found, key=len) for found in around if found}
        return [[lines[i] for i in loop] for loop in innermost]

    @property
    def spilled_in_loops(self) -> int:
        """Accesses to spilled values inside them."""
        return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for loop in self.product_loops for line in loop)

    @property
    def serialized(self) -> bool:
        """ptxas gave up running wgmma asynchronously."""
        return "serializ" in self.notes

    @cached_property
    def instructions(self) -> list[str]:
        """Opcodes in program order: HGMMA.64x128x16.F32.BF16, BAR.SYNC.DEFER_BLOCKING, ..."""
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", self.sass)

    def count(self, opcode: str) -> int:
        return sum(instruction.startswith(opcode) for instruction in self.instructions)


def compile_kernel(
    kernel, signature: dict, constants: dict, capability: int, folder: Path, aligned: Collection[str] = (), **options
) -> MachineCode:
    """Compile for `capability`, in an empty cache under `folder` so that ptxas runs and speaks. The arguments `aligned`
    are multiples of 16, as Triton finds at a launch.
    """
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants
    }
    target, said = GPUTarget("cuda", capability, 32), io.StringIO()
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.cache.dir = str(folder / "cache")
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source(kernel, types, constants, attributes), target=target, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin]  # code alone, not analysed
    sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return MachineCode(compiled.metadata.shared, said.getvalue(), sass)


def both(head_dim: int | tuple[int, int]) -> tuple[int, int]:
    """Head dims of Q and K, and of V."""
    return head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)


def hopper_shape(head_dim: int | tuple[int, int], int8: bool = False):
    """hopper.Shape of such heads."""
    from bsfa_kernels import hopper

    k, v = (torch.empty(1, 1, 1, n, device="meta") for n in both(head_dim))
    return hopper.shape_of(SimpleNamespace(scores="int8" if int8 else "exact", k=k, v=v))


def hopper(
    folder: Path,
    dtype: torch.dtype,
    head_dim: int | tuple[int, int],
    causal: bool,
    gate: str,
    spans: bool,
    lists: bool = False,
    scoring: str = "",
    int8: bool = False,
    paged: bool = False,
    packed: bool = False,
) -> MachineCode:
    """The hopper backend's kernel as it is launched; `head_dim` is that of Q, K and V, or those of Q and K and of V;
    `gate` holds an a (absolute), a g (gap), both or neither, and `scoring` a w (window), a c (softcap), an s (attention
    sinks).
    """
    from bsfa_kernels import hopper, hopper_kernel, hopper_stream

    shape = hopper_shape(head_dim, int8)
    kinds = (causal, True, "a" in gate, "g" in gate, spans, lists, *(x in scoring for x in "wcs"), int8)
    shifted = int8 and ("a" in gate or "s" in scoring)
    variant = hopper.variant_of(shape, 8, 32, 4, min(both(head_dim)), *kinds, shifted, paged, packed)

    def descriptor(rows, element, columns=shape.columns):
        layout = hopper.tile_layout(rows, columns, element)
        return f"tensordesc<{NAMES[element]}[1, 1, {rows}, {columns}],{layout!r}>"

    rounded = torch.int8 if int8 else dtype
    signature = RUNTIME | dict(
        q_desc=descriptor(hopper_stream.ROWS.value, rounded), k_desc=descriptor(hopper_stream.KEYS.value, rounded),
        v_desc=descriptor(hopper_stream.KEYS.value // shape.v_parts, dtype, shape.v_columns),
        out_ptr=f"*{NAMES[dtype]}",
    )  # fmt: skip
    options = dict(num_warps=4, maxnreg=shape.registers)
    return compile_kernel(hopper_kernel.forward, signature, dict(VARIANT=variant), 90, folder, **options)


def portable(
    folder: Path,
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    keys: int,
    capability: int,
    lists: bool = False,
    scoring: str = "",
    int8: bool = False,
    v_head_dim: int | None = None,
) -> MachineCode:
    """The triton backend's kernel as it is launched: causal, gap gate, no spans; with `lists`, block lists; `scoring`
    as in `hopper`; with `int8`, int8 scores; `v_head_dim` where V's heads are narrower.
    """
    from bsfa_kernels import portable as module

    operand = torch.int8 if int8 else dtype
    v_head_dim = v_head_dim or head_dim
    name, block_d, block_v = NAMES[dtype], module.columns(head_dim, operand), module.columns(v_head_dim, dtype)
    q, k, v = (
        f"tensordesc<{NAMES[element]}[1, 1, {n}, {wide}]>"
        for element, n, wide in ((operand, rows, block_d), (operand, keys, block_d), (dtype, keys, block_v))
    )
    signature = RUNTIME | dict(q_desc=q, k_desc=k, v_desc=v, out_ptr=f"*{name}")
    constants = dict(
        absolute_ptr=None, spans_ptr=None, table_ptr=None, packed_ptr=None, HEADS=32, GROUP=4, D=v_head_dim,
        BLOCK_D=block_d, BLOCK_V=block_v, ROWS=rows, KEYS=keys, CAUSAL=True, KEEP_SINK=True, WINDOWED="w" in scoring,
        CAPPED="c" in scoring,
    )  # fmt: skip
    if "s" not in scoring:
        constants |= dict(sinks_ptr=None)
    shifted = "c" in scoring or "s" in scoring
    constants |= dict.fromkeys(() if int8 else ("q_scale_ptr", "k_scale_ptr"))
    constants |= dict.fromkeys(() if int8 and shifted else ("q_shift_ptr",))
    if not lists:
        constants |= dict(entries_ptr=None, lengths_ptr=None)
    launch = module.launch_shape(dtype, head_dim, rows, capability == 90)
    return compile_kernel(module._forward, signature, constants, capability, folder, **launch)


def split_kv(
    folder: Path,
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    pairs: int,
    capability: int,
    *,
    page: int = 0,
    spans: bool = False,
    scoring: str = "",
) -> MachineCode:
    """A kernel of split_kv_kernel.py as it is launched for several splits, causal, of `pairs` rows a KV head; `page` of
    the cache; `scoring` as in `hopper`.
    """
    from bsfa_kernels import split_kv as module
    from bsfa_kernels import split_kv_kernel

    function, name = getattr(split_kv_kernel, kernel), NAMES[dtype]
    shape = module.shape_of(pairs, dtype, head_dim, head_dim, capability == 90)
    wide = module.columns(head_dim, dtype)
    signature = RUNTIME | {f"{x}_ptr": f"*{name}" for x in "qkv"} | dict.fromkeys(split_kv_kernel.INTEGERS, "i32")
    signature |= dict(out_ptr=f"*{name}", partial_ptr="*fp32", partial_lse_ptr="*fp32")
    constants = dict(
        KV_HEADS=8, GROUP=4, HEADS=32, D=head_dim, V_D=head_dim, BLOCK_D=wide, BLOCK_V=wide, ROWS=shape.rows,
        KEYS=shape.keys, PAGE=page, CAUSAL=True, WINDOWED="w" in scoring, CAPPED="c" in scoring, STAGES=shape.stages,
        MOST=module.MOST_SPLITS, WIDTH=32,
    )  # fmt: skip
    absent = dict(spans_ptr=spans, table_ptr=page, packed_ptr=page, sinks_ptr="s" in scoring)
    constants |= {pointer: None for pointer, there in absent.items() if not there}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    aligned = [argument for argument in function.arg_names if argument.endswith("_ptr")]
    warps = shape.warps if kernel == "attend" else 4
    return compile_kernel(function, signature, constants, capability, folder, aligned, num_warps=warps)


def schedule(folder: Path, width: int, forced: bool, causal: bool) -> MachineCode:
    """The kernel that makes streams of block lists."""
    from bsfa_kernels import schedule as module

    signature = RUNTIME | dict(indices_ptr="*i32", counts_ptr="*i32", listed_ptr="*i8", key_tiles="i32", capacity="i32")
    constants = dict(
        spans_ptr=None, HEADS=32, ROWS=64, KEYS=128, CAUSAL=causal, KEEP_SINK=True, WINDOWED=False, WIDTH=width,
        FORCED=forced, BLOCK=module.BLOCK,
    )  # fmt: skip
    return compile_kernel(module._schedule, signature, constants, 90, folder)


def preparation(folder: Path, kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> MachineCode:
    """A kernel of int8_kernel.py as it is launched for tiles of 128 keys: no spans, `q_shift` wanted."""
    from bsfa_kernels import int8 as module
    from bsfa_kernels import int8_kernel, quantise

    name, wide, block = NAMES[dtype], quantise.columns(head_dim), quantise.rotation_block(head_dim)
    signature = RUNTIME | dict(
        q_ptr=f"*{name}", k_ptr=f"*{name}", sums_ptr="*fp32", mean_ptr="*fp32", q8_ptr="*i8", k8_ptr="*i8",
        batch_stride="i32", head_stride="i32", row_stride="i32", split="i32", splits="i32", steps="i32",
    )  # fmt: skip
    constants = dict(D=head_dim, BLOCK=block, BLOCKS=wide // block, UNIT=quantise.unit(block), spans_ptr=None)
    constants |= dict(SPLITS=module.SPLITS, KEYS=128, GROUP=4, HEADS=32 if kernel == "_quantise_queries" else 8)
    constants |= dict(ROWS=module.SUMMED if kernel == "_sum_keys" else module.ROWS)
    function = getattr(int8_kernel, kernel)
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    aligned = [argument for argument in function.arg_names if argument.endswith(("_ptr", "_stride"))]
    return compile_kernel(
        function, signature, constants, capability, folder, aligned, **module.launch_shape(kernel, 128, wide)
    )


def drop_costs(
    folder: Path, kernel: str, dtype: torch.dtype, head_dim: int, capability: int, scoring: str = ""
) -> MachineCode:
    """A kernel of dropping_kernel.py as it is launched: causal, tiles of 64x128, `scoring` as in `hopper`."""
    from bsfa_kernels import dropping_kernel as module

    block_d = module.columns(head_dim, dtype)
    together, launch = module.launch_shape(dtype, head_dim, 64, capability == 90)
    of_rows, of_keys = (f"tensordesc<{NAMES[dtype]}[1, 1, {n}, {block_d}]>" for n in (64 * together, 128))
    signature = RUNTIME | dict(
        q_desc=of_rows, gradient_desc=of_rows, out_desc=of_rows, k_desc=of_keys, v_desc=of_keys, moved_ptr="*fp32",
        mass_ptr="*fp32", cell_ptr="*i32", cost_ptr="*i64", first="i32", length="i32", blocks="i32", key_tiles="i32",
        most="fp32", unit="fp32", entries="i32",
    )  # fmt: skip
    constants = dict(HEADS=32, GROUP=4, BLOCK_D=block_d, KEYS=128, CAUSAL=True, WINDOWED="w" in scoring)
    constants |= dict(CAPPED="c" in scoring, ENTRIES=module.ENTRIES, TILES=module.TILES, TOGETHER=together)
    function, shares = getattr(module, kernel), kernel == "_shares"
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    constants |= dict(ROWS=64 * together if shares else 64)
    aligned = [argument for argument in function.arg_names if argument.endswith("_ptr")]
    launch = launch if shares else dict(num_warps=4)
    return compile_kernel(function, signature, constants, capability, folder, aligned, **launch)
