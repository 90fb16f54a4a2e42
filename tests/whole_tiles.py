"""What gates judge of calls that hold a part of a sequence: for the CPU's, the interpreter's and the GPU's tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, make_spans


@dataclass(frozen=True)
class Prompt:
    """One sequence of `length` positions, and thresholds at which about half of its tiles drop."""

    backend: str
    tile: TileShape
    length: int = 333
    head_dim: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    gap: float = 0.6
    scores: str = "exact"

    def tensors(self, batch: int = 1):
        generator = torch.Generator().manual_seed(self.length)
        shapes = [(batch, heads, self.length, self.head_dim) for heads in (4, 2, 2)]
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in shapes]

    def gate(self) -> Gate:
        return Gate(gap=torch.full((4, 1), self.gap, device=self.device))

    def attend(self, q, k, v, gate=Gate(), **options):  # noqa: B008 - frozen
        return block_sparse_attention(
            q,
            k,
            v,
            gate,
            tile=self.tile,
            backend=self.backend,
            return_counts=True,
            return_lse=True,
            scores=self.scores,
            **options,
        )

    def spans(self, start: int, lengths) -> torch.Tensor:
        return make_spans(len(lengths), start, lengths=torch.tensor(lengths), device=self.device)


def close(prompt: Prompt, actual, expected) -> None:
    tolerance = 8 * torch.finfo(prompt.dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def chunks_keep_more(prompt: Prompt, cuts: list[int]) -> None:
    """Query tiles that a chunk holds whole are as in the whole prompt, to the same tiles; all others are dense."""
    q, k, v = prompt.tensors()
    whole, dense = prompt.attend(q, k, v, prompt.gate()), prompt.attend(q, k, v)
    rows = prompt.tile.rows
    judged = 0
    for start, end in zip([0, *cuts], [*cuts, prompt.length], strict=True):
        part = prompt.attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], prompt.gate(), q_offset=start)
        for t in range(part.kept.shape[2]):
            first = (start // rows + t) * rows
            at = slice(max(first, start), min(first + rows, end))
            held = first >= start and first + rows <= end and end - start >= rows
            expected = whole if held else dense
            close(prompt, part.out[:, :, at.start - start : at.stop - start], expected.out[:, :, at])
            counts = (whole.kept[..., first // rows], whole.candidates[..., first // rows])
            for got, want in zip((part.kept[..., t], part.candidates[..., t]), counts, strict=True):
                assert torch.equal(got, want if held else torch.zeros_like(want)), (start, end, t)
            judged += int((whole.candidates - whole.kept)[..., first // rows].sum()) if held else 0
    assert whole.candidates[..., prompt.length // rows :].sum() == 0  # where the sequence ends is not known
    assert judged > 0 or all(b - a < rows for a, b in zip([0, *cuts], [*cuts, prompt.length], strict=True))


def a_known_end_is_whole(prompt: Prompt) -> None:
    """With lengths, the last query tile is judged too, and drops what the plain reference drops."""
    q, k, v = prompt.tensors()
    unknown = prompt.attend(q, k, v, prompt.gate())
    known = prompt.attend(q, k, v, prompt.gate(), spans=prompt.spans(0, [prompt.length]))
    last = prompt.length // prompt.tile.rows
    assert torch.equal(known.kept[..., :last], unknown.kept[..., :last])
    assert (known.kept < known.candidates)[..., last].any() and unknown.candidates[..., last].sum() == 0


def right_padded_chunks(prompt: Prompt, short: int, cut: int) -> None:
    """A batch of which one sequence ends before the second chunk begins, cut where no tile ends."""
    q, k, v = prompt.tensors(2)
    dense = prompt.attend(q, k, v, spans=prompt.spans(0, [prompt.length, short]))
    for gate in (Gate(), prompt.gate()):
        for start, end in ((0, cut), (cut, prompt.length)):
            spans = prompt.spans(start, [end, min(short, end)])
            spans[0, 3] = 2**31 - 1  # the longer one goes on
            part = prompt.attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], gate, spans=spans)
            assert part.out.isfinite().all()
            if gate.open:
                close(prompt, part.out, dense.out[:, :, start:end])
                close(prompt, part.lse, dense.lse[:, :, start:end])
            if start >= short:
                assert part.out[1].abs().max() == 0 and (part.lse[1] == -torch.inf).all()
                assert part.candidates[1].sum() == 0 and part.kept[1].sum() == 0


def nan_scores_are_kept(prompt: Prompt, gates: tuple[Gate, ...]) -> None:
    """A NaN in a key of a tile that every gate would drop shows in the output of every row that sees it; with int8
    scores, of every row that sees its tile.
    """
    q, k, v = prompt.tensors()
    at = 2 * prompt.tile.keys + (3 if prompt.scores == "exact" else 0)  # behind the sink
    k = k.clone()
    k[:, :, 2 * prompt.tile.keys + 3, 0] = torch.nan
    for gate in gates:
        result = prompt.attend(q, k, v, gate.to(prompt.device))
        hidden = result.out[:, :, :at].isfinite().all() and result.out[:, :, at:].isnan().any(-1).all()
        assert hidden, "a NaN was hidden, or seen where it is masked"


DROP_ALL = (Gate(gap=torch.full((4, 1), 1e30)), Gate(absolute=torch.full((4, 1), 1e30)))
