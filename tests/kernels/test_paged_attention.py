"""Decoding over pages against a loop over rows in float64; Triton is interpreted where there is no GPU."""

import pytest
import torch

from fastcorl_kernels import SharedPrefix, paged_decode_attention, rope_to_pages

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # In values that are not selected.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SPLIT, PAGE = 16, 4
LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT - 2]


@pytest.fixture
def short_splits(monkeypatch, triton_device):
    """Contexts of a few dozen tokens take several splits, and a split several steps."""
    from fastcorl_kernels.paged_attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "SPLIT", SPLIT)
    return triton_kernels


class Cache:
    """Rows of random tokens on shuffled pages; everything that no row may see is NaN, or no page at all."""

    def __init__(self, lengths, device, dtype=torch.float32, kv_heads=2, share=1, head_dim=32, page=PAGE, shared=()):
        """``shared``: (rows, tokens) of the groups that the rows begin with."""
        generator = torch.Generator().manual_seed(0)
        needed = [-(-length // page) for length in lengths]
        total = sum(needed) + 3
        ids = torch.randperm(total, generator=generator).int()
        table = torch.full((len(lengths), max(needed) + 1), 2**30, dtype=torch.int32)
        for row, (count, own) in enumerate(zip(needed, ids[: sum(needed)].split(needed), strict=True)):
            table[row, :count] = own
        self.prefix = self._share(table, shared, page, device)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        pages = [torch.full((total, page, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
        for row, length in enumerate(lengths):
            for token in range(length):
                for part in pages:
                    part[table[row, token // page], token % page] = normal(kv_heads, head_dim)
        self.query = normal(len(lengths), kv_heads * share, head_dim).to(device)
        self.keys, self.values = (part.to(device) for part in pages)
        self.table, self.lengths = table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)

    @staticmethod
    def _share(table, shared, page, device):
        bounds = [0]
        for rows, tokens in shared:
            first, count = bounds[-1], tokens // page
            table[first : first + rows, :count] = table[first, :count].clone()
            bounds.append(first + rows)
        if not shared:
            return None
        lengths = [tokens for _, tokens in shared]
        bounds, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in (bounds, lengths))
        return SharedPrefix(bounds, lengths, max(rows for rows, _ in shared))

    def attend(self, rows=slice(None), backend="triton", **kwargs):
        table, lengths = self.table[rows], self.lengths[rows]
        return paged_decode_attention(
            self.query[rows], self.keys, self.values, table, lengths, backend=backend, **kwargs
        )

    def expected(self, scaling=None):
        """One row and one head at a time, float64."""
        page, kv_heads, head_dim = self.keys.shape[1:]
        out = torch.zeros_like(self.query, dtype=torch.float64)
        share = out.shape[1] // kv_heads
        for row, length in enumerate(self.lengths.tolist()):
            places = [(self.table[row, token // page], token % page) for token in range(length)]
            for head in range(out.shape[1] if length else 0):
                keys, values = (
                    torch.stack([part[place][head // share] for place in places]).double()
                    for part in (self.keys, self.values)
                )
                scores = keys @ self.query[row, head].double() * (scaling or head_dim**-0.5)
                out[row, head] = torch.softmax(scores, 0) @ values
        return out


def assert_near(got, expected, dtype=torch.float32):
    torch.testing.assert_close(got.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_reference_is_the_loop(share, scaling):
    cache = Cache(LENGTHS, "cpu", torch.float64, share=share)
    got = cache.attend(backend="torch", scaling=scaling)
    torch.testing.assert_close(got, cache.expected(scaling), rtol=1e-12, atol=1e-12)
    assert got[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_attention(triton_device, short_splits, head_dim, share, dtype):
    cache = Cache(LENGTHS, triton_device, dtype, share=share, head_dim=head_dim)
    got = cache.attend()
    assert got.dtype == dtype and got[0].eq(0).all()
    assert_near(got, cache.expected(), dtype)


@pytest.mark.parametrize("head_dim", [8, 64])
def test_three_heads_per_head_of_keys_and_a_scaling(triton_device, short_splits, head_dim):
    cache = Cache(LENGTHS, triton_device, kv_heads=1, share=3, head_dim=head_dim)
    assert_near(cache.attend(scaling=0.3), cache.expected(0.3))


def test_contexts_that_fit_into_one_split(triton_device, short_splits):
    cache = Cache([0, 1, PAGE, 3 * PAGE - 1], triton_device)
    assert_near(cache.attend(), cache.expected())


@pytest.mark.parametrize("page", [1, 16, 64])
def test_page_sizes(triton_device, short_splits, page):
    cache = Cache([5, 64, 33], triton_device, page=page)
    assert_near(cache.attend(), cache.expected())


def test_splits_and_tiles_as_they_are(triton_device):
    cache = Cache([255, 256, 257, 600], triton_device, kv_heads=1, page=16)
    assert_near(cache.attend(), cache.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("queries", [16, 32])
@pytest.mark.parametrize("shared", [[(1, 4)], [(2, 0), (8, 16)], [(9, 40)], [(1, 0), (2, 20), (0, 8), (9, 4)]])
def test_a_shared_prefix_changes_nothing(triton_device, short_splits, monkeypatch, shared, queries, share, dtype):
    monkeypatch.setattr(short_splits, "PREFIX_QUERIES", queries)
    lengths = [tokens + (3 * row) % 20 for rows, tokens in shared for row in range(rows)] + [7, 0]
    cache = Cache(lengths, triton_device, dtype, kv_heads=1, share=share, shared=shared)
    expected = cache.expected()
    assert_near(cache.attend(prefix=cache.prefix), expected, dtype)
    assert_near(cache.attend(), expected, dtype)
    assert torch.equal(cache.attend(prefix=cache.prefix, backend="torch"), cache.attend(backend="torch"))


def test_a_row_shorter_than_the_prefix_of_its_group(triton_device, short_splits):
    cache = Cache([50, 40, 44], triton_device, shared=[(3, 40)])
    cache.lengths[1:] = torch.tensor([0, 18], dtype=torch.int32)
    cache.table[1] = 2**30
    assert_near(cache.attend(prefix=cache.prefix), cache.expected())


def test_no_groups(triton_device, short_splits):
    cache = Cache([5, 20], triton_device)
    bounds, lengths = (torch.zeros(n, dtype=torch.int32, device=triton_device) for n in (1, 0))
    assert torch.equal(cache.attend(prefix=SharedPrefix(bounds, lengths, 1)), cache.attend())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_else(triton_device, short_splits, dtype):
    cache = Cache(LENGTHS, triton_device, dtype, share=2)
    everything = cache.attend()
    assert torch.equal(cache.attend(), everything)
    for row in range(len(LENGTHS)):
        assert torch.equal(cache.attend(slice(row, row + 1)), everything[row : row + 1])
    wide = torch.full((len(LENGTHS), 40), 2**30, dtype=torch.int32, device=triton_device)
    wide[:, : cache.table.shape[1]] = cache.table
    narrow, cache.table = cache.table, wide
    assert torch.equal(cache.attend(), everything)
    # Where the table holds one split only, nothing is merged.
    cache.table = narrow[:, : SPLIT // PAGE]
    short = cache.lengths <= SPLIT
    assert torch.equal(cache.attend(short), everything[short])


def test_a_row_depends_on_its_own_prefix_only(triton_device, short_splits):
    cache = Cache([45, 40, 50, 30, 26], triton_device, shared=[(3, 40), (2, 24)])
    everything = cache.attend(prefix=cache.prefix)
    assert torch.equal(cache.attend(prefix=cache.prefix), everything)
    bounds, lengths = (torch.tensor(x, dtype=torch.int32, device=triton_device) for x in ([0, 1], [40]))
    alone = cache.attend(slice(1, 2), prefix=SharedPrefix(bounds, lengths, 3))
    assert torch.equal(alone, everything[1:2])


def test_strided_operands(triton_device, short_splits):
    cache = Cache(LENGTHS, triton_device)
    expected = cache.attend()
    cache.query = cache.query.transpose(0, 2).contiguous().transpose(0, 2)
    cache.table = cache.table.t().contiguous().t()
    cache.lengths = torch.stack([cache.lengths] * 2, 1)[:, 0]
    assert torch.equal(cache.attend(), expected)


def test_no_rows_and_no_pages(triton_device):
    cache = Cache([4, 0], triton_device)
    assert cache.attend(slice(0, 0)).shape == (0, 2, 32)
    cache.table, cache.lengths = cache.table[:, :0], cache.lengths * 0
    for backend in ("torch", "triton"):
        assert cache.attend(backend=backend).eq(0).all()


def rope_problem(device, dtype=torch.float32, rows=5, query_heads=4, kv_heads=2, head_dim=32):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, (query_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype).to(device)
    angles = torch.rand(9, head_dim // 2, generator=generator).mul(6).repeat(1, 2)
    pages = [torch.full((4, PAGE, kv_heads, head_dim), -7.0, dtype=dtype, device=device) for _ in range(2)]
    positions, slots = torch.tensor([3, 0, 8, 3, 1]), torch.tensor([9, 4, 15, 6, 7])
    return [x.to(device) for x in (qkv, angles.cos(), angles.sin(), positions, slots)] + pages


def rope_expected(qkv, cos, sin, positions, kv_heads, head_dim):
    """(query, key, value) in float32, rotated by transformers."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads = qkv.float().unflatten(1, (-1, head_dim)).transpose(0, 1)[None]
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    query, key = apply_rotary_pos_emb(query, key, cos[positions][None], sin[positions][None])
    return [part[0].transpose(0, 1) for part in (query, key, value)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (9, 3)])
@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rope_to_pages(triton_device, backend, head_dim, heads, dtype):
    problem = rope_problem(triton_device, dtype, 5, *heads, head_dim)
    qkv, cos, sin, positions, slots, keys, values = problem
    query = rope_to_pages(*problem, backend=backend)
    expected_query, expected_key, expected_value = rope_expected(*problem[:4], heads[1], head_dim)
    assert query.dtype == dtype
    assert_near(query, expected_query, dtype)
    for part, expected in ((keys, expected_key), (values, expected_value)):
        flat = part.flatten(0, 1)
        assert_near(flat[slots], expected, dtype)
        others = torch.ones(len(flat), dtype=torch.bool, device=triton_device).index_fill(0, slots, False)
        assert flat[others].eq(-7).all()
    assert torch.equal(values.flatten(0, 1)[slots], qkv.unflatten(1, (-1, head_dim))[:, -heads[1] :])


@pytest.mark.parametrize("view", ["row stride", "column stride"])
def test_rope_of_strided_rows(triton_device, view):
    problem = rope_problem(triton_device)
    expected = rope_to_pages(*problem, backend="torch")
    pages = [part.clone() for part in problem[-2:]]
    wide = torch.zeros(10, 2 * problem[0].shape[1], device=triton_device)
    strided = wide[::2, : problem[0].shape[1]] if view == "row stride" else wide[:5, ::2]
    strided.copy_(problem[0])
    problem[3], problem[4] = problem[3].int(), problem[4].int()
    assert_near(rope_to_pages(strided, *problem[1:], backend="triton"), expected)
    for one, other in zip(problem[-2:], pages, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_share_a_slot(triton_device, backend):
    problem = rope_problem(triton_device)
    problem[4] = torch.tensor([0, 5, 0, 0, 0], device=triton_device)
    query, expected = rope_to_pages(*problem, backend=backend), rope_expected(*problem[:4], 2, 32)
    assert_near(query, expected[0])
    for part, rows in zip(problem[-2:], expected[1:], strict=True):
        flat = part.flatten(0, 1)
        assert_near(flat[5], rows[1])
        assert any(torch.allclose(flat[0], rows[row], atol=1e-5) for row in (0, 2, 3, 4))
        assert flat[[1, 2, 3, 4, *range(6, 16)]].eq(-7).all()


def test_rope_of_no_rows(triton_device):
    problem = rope_problem(triton_device)
    empty = [problem[0][:0], *problem[1:3], problem[3][:0], problem[4][:0], *problem[5:]]
    assert rope_to_pages(*empty, backend="triton").shape == (0, 4, 32)


def prefix_of(bounds, lengths, most=2):
    return SharedPrefix(torch.tensor(bounds, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), most)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"query": torch.zeros(3, 2, 16)}, "query"),
        ({"query": torch.zeros(3, 3, 32)}, "query"),
        ({"query": torch.zeros(3, 64)}, "query"),
        ({"key_pages": torch.zeros(4, 4, 2, 32, dtype=torch.float16)}, "key_pages"),
        ({"key_pages": torch.zeros(4, 3, 2, 32), "value_pages": torch.zeros(4, 3, 2, 32)}, "key_pages"),
        ({"value_pages": torch.zeros(5, 4, 2, 32)}, "value_pages"),
        ({"value_pages": torch.zeros(4, 2, 4, 32).transpose(1, 2)}, "value_pages"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.long)}, "block_table"),
        ({"block_table": torch.full((3, 2), 4, dtype=torch.int32)}, "block_table"),
        ({"context_lengths": torch.zeros(2, dtype=torch.int32)}, "context_lengths"),
        ({"context_lengths": torch.full((3,), 9)}, "context_lengths"),
        ({"scaling": 0.0}, "scaling"),
        ({"prefix": (0, 3)}, "prefix"),
        ({"prefix": prefix_of([0, 2, 3], [4])}, "prefix.row_bounds"),
        ({"prefix": prefix_of([0, 3], [4])}, "prefix.row_bounds"),
        ({"prefix": prefix_of([0, 4], [4], 4)}, "prefix.row_bounds"),
        ({"prefix": prefix_of([0, 2], [3])}, "prefix.lengths"),
        ({"prefix": prefix_of([0, 2], [12])}, "prefix.lengths"),
        ({"prefix": prefix_of([1, 3], [8])}, "prefix.lengths"),
        ({"prefix": prefix_of([0, 2], [4], 0)}, "prefix.max_group"),
    ],
)
def test_attention_names_a_bad_argument(change, name):
    arguments = {
        "query": torch.zeros(3, 4, 32),
        "key_pages": torch.zeros(4, 4, 2, 32),
        "value_pages": torch.zeros(4, 4, 2, 32),
        "block_table": torch.tensor([[1, 2], [1, 2], [1, 3]], dtype=torch.int32),
        "context_lengths": torch.tensor([5, 8, 6], dtype=torch.int32),
    }
    paged_decode_attention(**arguments, prefix=prefix_of([0, 2, 3], [8, 4]))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        paged_decode_attention(**arguments | change)


@pytest.mark.parametrize(
    "place, value, name",
    [
        (0, torch.zeros(5, 250), "qkv"),
        (0, torch.zeros(5, 128), "qkv"),
        (1, torch.zeros(9, 16), "cos"),
        (2, torch.zeros(9, 32, dtype=torch.float64), "sin"),
        (2, torch.zeros(8, 32), "sin"),
        (3, torch.full((5,), 9), "positions"),
        (3, torch.zeros(4, dtype=torch.long), "positions"),
        (4, torch.full((5,), 16), "slots"),
        (5, torch.zeros(4, 4, 2, 32, dtype=torch.float16), "key_pages"),
        (6, torch.zeros(4, 4, 1, 32), "value_pages"),
    ],
)
def test_rope_names_a_bad_argument(place, value, name):
    problem = rope_problem("cpu")
    problem[place] = value
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        rope_to_pages(*problem)


def janus_problem(rows=256, context=608, heads=16, head_dim=128):
    """Rows of Janus-Pro-1B, in groups of 8 whose first 320 tokens are shared."""
    torch.manual_seed(0)
    count = context // 16
    pages = [torch.randn(rows * count, 16, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    table = torch.randperm(rows * count, device="cuda").int().view(rows, count)
    table.view(-1, 8, count)[:, :, :20] = table[::8, None, :20]
    lengths = torch.randint(320, context + 1, (rows,), device="cuda", dtype=torch.int32)
    query = torch.randn(rows, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    bounds = torch.arange(0, rows + 1, 8, device="cuda", dtype=torch.int32)
    prefix = SharedPrefix(bounds, torch.full((rows // 8,), 320, device="cuda", dtype=torch.int32), 8)
    return (query, *pages, table, lengths), prefix


@pytest.mark.gpu
def test_the_sizes_of_janus():
    arguments, prefix = janus_problem()
    expected = paged_decode_attention(*arguments, backend="torch")
    for shared in (None, prefix):
        assert_near(paged_decode_attention(*arguments, prefix=shared), expected, torch.bfloat16)


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_numbers():
    pages = [torch.zeros(66000, 16, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    qkv = torch.randn(1, 3 * 2048, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.ones(1, 128, device="cuda"), torch.zeros(1, 128, device="cuda")
    last = torch.tensor([66000 * 16 - 16], device="cuda")
    query = rope_to_pages(qkv, cos, sin, torch.zeros_like(last), last, *pages)
    table, lengths = (last // 16).int()[:, None], torch.ones_like(last)
    got = paged_decode_attention(query, *pages, table, lengths)
    assert torch.equal(got.flatten(), qkv[0, 4096:])


@pytest.mark.gpu
def test_a_graph_replays_with_new_contents():
    arguments, prefix = janus_problem(rows=16)
    lengths = arguments[-1]
    for _ in range(2):
        paged_decode_attention(*arguments, prefix=prefix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_decode_attention(*arguments, prefix=prefix)
    for change in (0, -300, 50):
        lengths.add_(change).clamp_(0, 608)
        graph.replay()
        assert_near(got, paged_decode_attention(*arguments, backend="torch"), torch.bfloat16)
