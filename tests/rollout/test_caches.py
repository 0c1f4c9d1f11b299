"""Decoding over every kind of cache against the packed forward: what a row sees is its prompt and its own tokens."""

import pytest
import torch

from fastcorl.model import pack_prompts
from fastcorl.rollout import grouped_cache
from fastcorl.rollout.decoder import Decoder, Rope
from fastcorl.rollout.grouped_cache import GroupedCache
from fastcorl.rollout.paged_cache import PagedCache
from fastcorl.rollout.prefill import Prefiller

TOKENS = 22  # of a row, its prompt's last token and all that is fed
KINDS = ["grouped", "paged", "triton"]


def make_cache(kind, decoder, rope, *, copies=1, images=8, texts=16, longest=64, group_size=4, pages=400):
    if kind == "triton":
        pytest.importorskip("triton")
    if kind == "grouped":
        return GroupedCache(decoder.geometry, rope, copies=copies, image_tokens=TOKENS, text_tokens=TOKENS)
    cache = PagedCache(
        decoder.geometry,
        rope,
        pages,
        images=(copies, images),
        texts=texts,
        image_tokens=TOKENS,
        text_tokens=TOKENS,
        longest=longest,
        group_size=group_size,
        backend="torch" if kind == "paged" else "triton",
    )
    for page in (*cache.key_pages, *cache.value_pages):
        page.fill_(torch.nan)  # what was never written is never read
    return cache


class Runner:
    """Feeds rows their sequences and compares every state with that of the whole sequence in one packed forward."""

    def __init__(self, policy, cache, decoder):
        self.policy, self.cache, self.decoder = policy, cache, decoder
        self.images, self.texts = [], []  # [sequence, tokens that are cached, expected states]

    def rows(self, sequences, lengths):
        batch = pack_prompts(sequences, None, self.policy.encoder.image_id, self.policy.device)
        states = self.policy.hidden_states(batch).split([len(sequence) for sequence in sequences])
        return [list(row) for row in zip(sequences, lengths, states, strict=True)]

    def step(self):
        rows = self.images + self.texts
        embeds = self.policy.embed_text(torch.tensor([sequence[at] for sequence, at, _ in rows]))
        self.cache.begin_step(len(self.images), len(self.texts))
        hidden = self.decoder(embeds, self.cache)
        self.cache.advance()
        for row, state in zip(rows, hidden, strict=True):
            torch.testing.assert_close(state, row[2][row[1]], rtol=0, atol=2e-5)
            row[1] += 1


def random_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 300, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(grouped_cache, "CHUNK", 8)


@pytest.fixture
def decoder(policy):
    return Decoder(policy)


@pytest.fixture
def rope(policy):
    return Rope(policy.backbone, 256)


@pytest.fixture
def prefiller(policy, decoder, rope):
    return Prefiller(policy, decoder, rope)


# Whole pages of a prompt without its last token: 0, 15, 1, 0 and 15 tokens beyond a page's end; and the shortest.
PROMPTS = [17, 16, 34, 33, 32, 1, 2]


@torch.no_grad()
def test_a_prefill_keeps_nothing_but_keys_and_values(prefiller):
    (source,) = prefiller.prompts(random_ids(30), [None])
    for states in (*source.prefill.keys, *source.prefill.values):
        assert states.untyped_storage().nbytes() == states.nbytes


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_see_their_prompt_and_their_own_tokens(policy, decoder, rope, prefiller, kind):
    lengths = PROMPTS if kind != "triton" else PROMPTS[:3]
    steps = TOKENS - 1 if kind != "triton" else 3
    runner = Runner(policy, make_cache(kind, decoder, rope), decoder)
    prompts = random_ids(*lengths)
    sources = prefiller.prompts(prompts, [None] * len(prompts))
    for name, group in (("images", 1), ("texts", 2)):
        own = random_ids(*[TOKENS] * (group * len(prompts)), seed=len(name))
        sequences = [prompts[row // group] + tail for row, tail in enumerate(own)]
        setattr(runner, name, runner.rows(sequences, [len(prompts[row // group]) for row in range(len(own))]))
    runner.cache.set_images(sources)
    runner.cache.add_texts([source for source in sources for _ in range(2)])
    for _ in range(steps):
        runner.step()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_leave_and_others_come_in_any_order(policy, decoder, rope, prefiller, kind):
    runner = Runner(policy, make_cache(kind, decoder, rope, group_size=3), decoder)
    prompts = random_ids(40, 33, 5)
    sources = prefiller.prompts(prompts, [None] * 3)

    def add(wanted, seed):
        tails = random_ids(*[TOKENS] * len(wanted), seed=seed)
        sequences = [prompts[p] + tail for p, tail in zip(wanted, tails, strict=True)]
        runner.texts += runner.rows(sequences, [len(prompts[p]) for p in wanted])
        runner.cache.add_texts([sources[p] for p in wanted])

    def keep(alive):
        order = runner.cache.order_texts(alive)
        assert sorted(order) == sorted(alive)
        runner.cache.keep_texts(order)
        runner.texts = [runner.texts[row] for row in order]

    steps = 2 if kind != "triton" else 1
    add([0, 0, 0, 1, 1], 1)
    for change in (
        lambda: keep([0, 2, 4]),
        lambda: add([2, 0, 2], 2),
        lambda: keep([1, 2, 4, 5]),
        lambda: add([1], 3),
        lambda: keep([3]),
        lambda: add([0, 1, 1, 1], 4),  # a prompt that was dropped comes back
        lambda: keep([]),
        lambda: add([2, 2], 5),
    ):
        for _ in range(steps):
            if runner.texts:
                runner.step()
        change()
    runner.step()


@pytest.mark.parametrize("kind", ["grouped", "paged"])
@torch.no_grad()
def test_one_chain_serves_unconditional_prompts_of_every_length(policy, decoder, rope, prefiller, kind):
    lengths = [2, 3, 17, 18, 9, 40]
    prompts = [policy.encoder.unconditional(length) for length in lengths]
    assert prompts[2] == [policy.encoder.bos_id] + [policy.encoder.pad_id] * 15 + [policy.encoder.begin_image_id]
    chain = prefiller.unconditional(lengths)
    assert len({source.prefill for source in chain.values()}) == 1
    alone = prefiller.prompts(prompts, [None] * len(prompts))
    runner = Runner(policy, make_cache(kind, decoder, rope), decoder)
    for length, source in zip(lengths, alone, strict=True):
        twin = chain[length]
        torch.testing.assert_close(
            twin.prefill.hidden[twin.index], source.prefill.hidden[source.index], rtol=0, atol=1e-5
        )
    runner.cache.set_images([chain[length] for length in lengths])
    tails = random_ids(*[TOKENS] * len(lengths))
    runner.images = runner.rows([p + tail for p, tail in zip(prompts, tails, strict=True)], lengths)
    for _ in range(TOKENS - 1):
        runner.step()


@torch.no_grad()
def test_shared_pages_are_never_written_and_all_pages_come_back(policy, decoder, rope, prefiller):
    cache = make_cache("paged", decoder, rope, texts=6)
    prompts = random_ids(40, 33)
    sources = prefiller.prompts(prompts, [None] * 2)
    cache.set_images([sources[0]])
    cache.add_texts([sources[0], sources[0], sources[1]])
    # 2 whole pages of each prompt, shared by images and answers alike.
    assert [len(pages) for pages, _ in cache.shared.values()] == [2, 2]
    assert [users for _, users in cache.shared.values()] == [3, 1]
    shared = [page for pages, _ in cache.shared.values() for page in pages]
    owned = [page for table in (cache.images, cache.texts) for row in table.row_pages for page in row[2:]]
    assert len(set(owned)) == len(owned) and not set(owned) & set(shared) and 0 not in owned + shared
    before = [page[shared].clone() for page in (*cache.key_pages, *cache.value_pages)]
    assert all(each.isfinite().all() for each in before)
    for _ in range(TOKENS - 1):
        cache.begin_step(1, 3)
        decoder(torch.randn(4, policy.backbone.config.hidden_size), cache)
        cache.advance()
    assert all(map(torch.equal, before, [page[shared] for page in (*cache.key_pages, *cache.value_pages)]))
    cache.keep_texts([2])
    assert [users for _, users in cache.shared.values()] == [1, 1]
    cache.keep_texts([])
    cache.set_images([])
    assert not cache.shared and sorted(cache.free) == list(range(1, 401))


@torch.no_grad()
def test_rows_that_only_fill_up_a_batch_touch_nobody(policy, decoder, rope, prefiller):
    """As under CUDA graphs, where the number of rows is rounded up."""
    cache = make_cache("paged", decoder, rope, copies=2, images=4, texts=4)
    for page in (*cache.key_pages, *cache.value_pages):
        page[0] = 0.0  # nobody's page
    sources = prefiller.prompts(random_ids(20, 35), [None] * 2)
    cache.set_images([sources[0], sources[1], sources[1], sources[0]])  # 2 drawings, 2 rows each
    cache.add_texts([sources[0], sources[1], sources[1]])
    exact = make_cache("paged", decoder, rope, copies=2, images=4, texts=4)
    exact.set_images([sources[0], sources[1], sources[1], sources[0]])
    exact.add_texts([sources[0], sources[1], sources[1]])
    real = [0, 1, 4, 5, 8, 9, 10]
    for _ in range(5):
        inputs = torch.randn(12, policy.backbone.config.hidden_size)
        cache.begin_step(4, 4)
        padded = decoder(inputs, cache)
        cache.advance()
        exact.begin_step(2, 3)
        torch.testing.assert_close(padded[real], decoder(inputs[real], exact), rtol=0, atol=2e-5)
        exact.advance()
    assert cache.texts.lengths[0, 3] == 0 and not cache.images.lengths[:, 2:].any()


@torch.no_grad()
def test_a_done_row_stays_in_its_own_pages(policy, decoder, rope, prefiller):
    cache = make_cache("paged", decoder, rope, texts=2)
    sources = prefiller.prompts(random_ids(20), [None])
    cache.add_texts([sources[0], sources[0]])
    others = [page for page in range(401) if page not in cache.texts.row_pages[0] + cache.texts.row_pages[1]]
    for _ in range(3 * TOKENS):  # far beyond the row's end
        cache.begin_step(0, 2)
        decoder(torch.randn(2, policy.backbone.config.hidden_size), cache)
        cache.advance()
    assert all(page[others].isnan().all() for page in (*cache.key_pages, *cache.value_pages))


def test_a_cache_in_use_grows(policy, decoder, rope, prefiller):
    cache = make_cache("grouped", decoder, rope)
    with torch.no_grad():
        sources = prefiller.prompts(random_ids(9, 30), [None] * 2)
    cache.add_texts([sources[0]])
    first = cache.texts.prompts.keys(0).clone()
    cache.add_texts([sources[1]])
    assert cache.texts.prompts.keys(0).shape[:3:2] == (2, 29)
    assert torch.equal(cache.texts.prompts.keys(0)[:1, :, :8], first)
