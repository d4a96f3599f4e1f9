"""The tensor functions under the parts, against plain Python and PyTorch's own."""

from __future__ import annotations

from itertools import pairwise

import plain
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenprune.core import gram, ops, ranks, transfer

numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -torch.inf, torch.inf, 1e-45, -3e38])
rows = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n * 3, max_size=n * 3), min_size=1, max_size=3)
)


@settings(max_examples=100)
@given(rows, st.data())
def test_top_k_is_a_stable_sort(scores, data):
    counts = [data.draw(st.integers(0, len(row))) for row in scores]
    index = ops.top_k(torch.tensor(scores), counts)
    assert index.shape == (len(scores), max(counts))
    for row, count, got in zip(scores, counts, index.tolist(), strict=True):
        assert got[:count] == plain.best(row, count)
        assert set(got[count:]) <= {-1}


def test_negative_zero_ties_with_zero():
    assert ops.top_k(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), [1, 1]).tolist() == [[0], [0]]


def test_top_k_takes_valid_entries_first_and_preferred_before_all():
    scores = torch.tensor([[5.0, 1.0, -torch.inf, 3.0, 9.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert ops.top_k(scores, [4], valid).tolist() == [[0, 1, 2, 3]]
    prefer = torch.tensor([[False, True, True, False, True]])
    assert ops.top_k(scores, [3], valid, prefer).tolist() == [[0, 1, 2]]
    assert ops.top_k(scores, [1], valid, prefer).tolist() == [[1]]


def test_top_k_of_equal_scores_in_half_precision_takes_the_first():
    """576 random scores in bfloat16 have far fewer different values: ties are the normal case."""
    scores = torch.randn(1, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len(scores.unique()) < 500
    assert ops.top_k(scores, [200])[0].tolist() == plain.best(scores[0].tolist(), 200)


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_evenly_takes_exactly_so_many_and_leaves_no_wide_gap(mask, data):
    size = sum(mask)
    count = data.draw(st.integers(0, size))
    chosen = ops.evenly(torch.tensor([mask]), torch.tensor([count]))[0].tolist()
    assert sum(chosen) == count
    assert all(m for c, m in zip(chosen, mask, strict=True) if c)
    if count:
        taken = [c for c, m in zip(chosen, mask, strict=True) if m]
        at = [i for i, c in enumerate(taken) if c]
        gaps = [b - a for a, b in pairwise(at)]
        assert all(size // count <= gap <= -(-size // count) for gap in gaps)
        assert at[0] <= size / count / 2
        assert size - 1 - at[-1] <= size / count / 2 + 1


def test_hash_is_uniform_and_depends_on_seed_and_index_alone():
    index = torch.arange(20_000)
    a, b = ops.hashed(index, 0), ops.hashed(index, 1)
    assert a.dtype == torch.float32
    for x in (a, b):
        assert 0 <= x.min() < 0.001
        assert 0.999 < x.max() < 1
        assert abs(x.mean() - 0.5) < 0.01
        assert torch.histc(x, 20, 0, 1).sub(1000).abs().max() < 150
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 0.03
    assert torch.equal(ops.hashed(index.flip(0)[:7], 0), a.flip(0)[:7])


def test_equal_rows_are_at_equal_distances_to_the_bit():
    x = torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0)) + 100
    x[0, 31] = x[0, 2]
    for apart in (gram.distances(x)[0], gram.distances(x, x.clone())[0]):
        assert apart[2, 31] == 0
        assert torch.equal(apart[2], apart[31])
        assert torch.allclose(apart, (x[0, :, None] - x[0]).norm(dim=-1), rtol=1e-4)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_numerical_rank_is_that_of_the_matrix_without_padding(rank_rows, columns, inner, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(rank_rows, inner, generator=generator) @ torch.rand(inner, columns, generator=generator)
    padded = torch.zeros(1, rank_rows + 3, columns + 5)
    padded[0, :rank_rows, 2 : columns + 2] = a
    got = ranks.numerical_rank(padded, torch.tensor([rank_rows]), torch.tensor([columns]))
    assert got.item() == torch.linalg.matrix_rank(a)


EPS = torch.finfo(torch.float32).eps


@st.composite
def near_tolerance(draw):
    """A float32 matrix with singular values close to where `matrix_rank` stops counting, on both sides of it."""
    rows, columns = draw(st.integers(2, 24)), draw(st.sampled_from([24, 100, 576]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    factor = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.1, 2.0, 10.0, 1e3, 1e4])
    size = [1.0, *(columns * EPS * draw(factor) for _ in range(rows - 1))]
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    made = (u * torch.tensor(size, dtype=torch.float64)) @ v.mT * draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return made.float() if draw(st.booleans()) else made.float().mT


@given(near_tolerance(), st.integers(0, 5), st.integers(0, 5))
def test_rank_close_to_the_tolerance(a, more_rows, more_columns):
    """Always the rank in exact arithmetic; and torch's own, where its float32 values can tell the two sides apart."""
    padded = torch.zeros(2, a.shape[0] + more_rows, a.shape[1] + more_columns)
    padded[1, more_rows:, more_columns:] = a  # the first sample is all padding
    rows, columns = torch.tensor([0, a.shape[0]]), torch.tensor([0, a.shape[1]])
    nothing, got = ranks.numerical_rank(padded, rows, columns).tolist()
    values = torch.linalg.svdvals(a.double())
    distance = values / (max(a.shape) * EPS * values[0]) - 1
    assume(bool((distance.abs() > 1e-6).all()))
    assert (nothing, got) == (0, int((distance > 0).sum()))
    if bool((distance.abs() > 0.05).all()):
        assert got == torch.linalg.matrix_rank(a)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_singular_values_are_those_of_an_svd(rows, columns, seed, dtype):
    a = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    got, expected = ranks.squared_singular_values(a), torch.linalg.svdvals(a.double()) ** 2
    assert got.dtype == torch.float64
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12 * float(expected.max()))


def test_repeated_and_equal_rows_add_no_rank():
    """Ties: raters that see the same, and tokens that nobody sees."""
    row = torch.softmax(torch.randn(1, 300, generator=torch.Generator().manual_seed(3)), -1)
    a = torch.cat([row, row, torch.roll(row, 7, 1), torch.zeros(1, 300), row])[None]
    assert ranks.numerical_rank(a, torch.tensor([5]), torch.tensor([300])).item() == 2
    assert ranks.energy_rank(a, 1.0).item() == 2
    flat = torch.full((1, 12, 300), 1 / 300)
    assert ranks.numerical_rank(flat, torch.tensor([12]), torch.tensor([300])).item() == 1
    assert ranks.energy_rank(flat, 1.0).item() == 1


def test_rank_depends_on_storage_and_energy_rank_does_not():
    """SparseVLM's trap: a matrix of rank 3, 20 x 576, has rank 20 once it was stored in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(20, 3, generator=generator) @ torch.rand(3, 576, generator=generator)
    size = torch.tensor([20]), torch.tensor([576])
    assert ranks.numerical_rank(a[None], *size).item() == 3
    assert ranks.numerical_rank(a.bfloat16().float()[None], *size).item() == 20
    assert ranks.energy_rank(a[None], 0.95).item() == ranks.energy_rank(a.bfloat16().float()[None], 0.95).item() <= 3


def test_energy_rank_by_hand():
    diagonal = torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    for energy, expected in ((0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.95, 4), (1.0, 4)):
        assert ranks.energy_rank(diagonal[None], energy).item() == expected, energy
    assert ranks.energy_rank(torch.zeros(1, 3, 4), 0.9).item() == 0
    assert ranks.energy_rank(torch.zeros(1, 0, 4), 0.9).item() == 0
    assert ranks.numerical_rank(torch.zeros(1, 0, 4), torch.tensor([0]), torch.tensor([4])).item() == 0


@pytest.mark.parametrize("values", [(3, 3), (1, 2), (5,), (0, 0, 7)])
def test_ints(values):
    assert transfer.ints(values, torch.device("cpu")).tolist() == list(values)


def test_places_and_masks_are_inverse():
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    index = ops.places(mask, [3, 1])
    assert index.tolist() == [[0, 2, 3], [2, -1, -1]]
    assert torch.equal(ops.mask_of(index, 4), mask)


@settings(max_examples=50)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_places_are_where_the_mask_is_true(mask):
    expected = [[i for i, each in enumerate(row) if each] for row in mask]
    counts = [len(row) for row in expected]
    got = ops.places(torch.tensor(mask), counts).tolist()
    assert got == [row + [-1] * (max(counts) - len(row)) for row in expected]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_products_are_summed_in_float32(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 64, generator=generator).to(device, dtype) for n in (5, 7))
    got, exact = gram.products(x, y), x.double() @ y.double().mT
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-4, "sums in half precision are off by some hundredths"
    x.requires_grad_()
    gram.products(x, y).sum().backward()
    assert torch.allclose(x.grad, y.sum(1, keepdim=True).expand_as(x), rtol=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_downloaded_is_on_the_host(device: str) -> None:
    copied = transfer.download(torch.arange(6, device=device))
    assert copied().device.type == "cpu" and copied().tolist() == list(range(6))


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_taken_and_put_alike_in_any_batch(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    x, rows = torch.randn(batch, 7, 4, generator=generator), torch.randn(batch, 3, 4, generator=generator)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(batch)])
    taken, written = ops.take_rows(x, index), ops.put_rows_(x.clone(), index, rows)
    for b, each in enumerate(index.tolist()):
        expected = x[b].clone()
        expected[each] = rows[b]
        assert torch.equal(taken[b], x[b, each])
        assert torch.equal(written[b], expected)
        assert torch.equal(ops.take_rows(x[:1], index)[b], x[0, each])
    assert ops.take_rows(x[:, :0], index[:, :0]).shape == (batch, 0, 4)


def test_nothing_is_put_where_the_index_is_padding() -> None:
    x, index = torch.zeros(2, 4), torch.tensor([[3, 0], [1, -1]])
    written = ops.put_(x, index, torch.tensor([[5.0, 6.0], [7.0, 8.0]]), index >= 0)
    assert written.tolist() == [[6, 0, 0, 5], [0, 7, 0, 0]]
    rows = ops.put_rows_(x[..., None], index, torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]]), index >= 0)
    assert rows.squeeze(-1).tolist() == written.tolist()
    marked = ops.put_(x.bool(), index.clamp(min=0), True)
    assert marked.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert torch.equal(x, torch.zeros(2, 4))


def test_in_memory_is_the_same_tensor_eager_and_compiled() -> None:
    x = torch.randn(2, 5, 3)
    assert ops.in_memory(x) is x
    written: list[bool] = []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        written.append(any(node.target == "index_copy" for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(lambda x: ops.in_memory(x.cos()) * 2, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), x.cos() * 2)
    assert written == [True], "written to a tensor of its own"
