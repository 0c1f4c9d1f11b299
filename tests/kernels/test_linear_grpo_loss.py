import inspect

import pytest
import torch

from fastcorl_kernels import GRPOLoss, group_advantages, grpo_loss, linear_grpo_loss
from fastcorl_kernels.grpo.batch import LossSettings, prepare_batch
from fastcorl_kernels.linear_grpo.reference import linear_grpo_loss_reference

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
CLIPS = [{"eps_low": 0.2, "eps_high": 0.28}, {"eps_low": None}, {"delta": 1.1}]
LOSSES_AND_CLIPS = [(loss, clip) for loss in LOSS_TYPES for clip in CLIPS if loss != "cispo" or "delta" not in clip]


def reference(p, bias, advantages, settings, old, dtype=torch.float64):
    batch = prepare_batch(
        p.hidden,
        p.weight.shape[0],
        dtype,
        settings,
        p.token_ids,
        advantages,
        p.cu_seqlens,
        None,
        None,
        old,
        p.ref_log_probs,
        p.mask,
    )
    return linear_grpo_loss_reference(p.hidden, p.weight, bias, batch, settings)


def assert_same(got, expected, inputs, upstream=2.5, **tolerance):
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    pairs = (torch.autograd.grad(result.loss * upstream, inputs, retain_graph=True) for result in (got, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("loss_type", "clip"), LOSSES_AND_CLIPS, ids=str)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_chunks_match_the_reference(make_problem, set_chunk_rows, loss_type, importance, clip, beta, old, masked):
    p = make_problem(masked=masked)
    old_log_probs = p.old_log_probs if old else None
    settings = {
        "temperature": 0.7,
        "beta": beta,
        "loss_type": loss_type,
        "importance": importance,
        "normalizer": 21 if loss_type == "dr_grpo" else None,
        **clip,
    }
    expected = reference(p, p.bias, p.advantages, LossSettings(**settings), old_log_probs)
    for chunk in (1, 3, 100):
        set_chunk_rows(chunk, 11)
        got = linear_grpo_loss(
            p.hidden,
            p.weight,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            bias=p.bias,
            old_log_probs=old_log_probs,
            ref_log_probs=p.ref_log_probs,
            mask=p.mask,
            **settings,
        )
        assert_same(got, expected, (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("lengths", [(1,), (0, 0, 3), (2, 7, 1, 0), (13,)])
@pytest.mark.parametrize(("hidden_size", "vocabulary"), [(1, 2), (3, 17), (8, 5)])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_odd_shapes_and_no_bias(make_problem, set_chunk_rows, lengths, hidden_size, vocabulary, importance):
    p = make_problem(lengths=lengths, hidden_size=hidden_size, vocabulary=vocabulary)
    set_chunk_rows(2, vocabulary)
    settings = LossSettings(importance=importance)
    got = linear_grpo_loss(
        p.hidden,
        p.weight,
        p.token_ids,
        p.row_advantages,
        cu_seqlens=p.cu_seqlens,
        old_log_probs=p.old_log_probs,
        ref_log_probs=p.ref_log_probs,
        mask=p.mask,
        importance=importance,
    )
    expected = reference(p, None, p.row_advantages, settings, p.old_log_probs)
    assert_same(got, expected, (p.hidden, p.weight))


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradcheck(make_problem, set_chunk_rows, importance):
    p = make_problem(lengths=(2, 0, 3), hidden_size=2, vocabulary=4)
    set_chunk_rows(2, 4)

    def loss(hidden, weight, bias):
        return linear_grpo_loss(
            hidden,
            weight,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            bias=bias,
            old_log_probs=p.old_log_probs,
            ref_log_probs=p.ref_log_probs,
            mask=p.mask,
            beta=0.1,
            importance=importance,
        ).loss

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))


def test_matches_the_loops(make_problem, loop_grpo_loss, set_chunk_rows):
    p = make_problem()
    set_chunk_rows(2, 11)
    kwargs = {"cu_seqlens": p.cu_seqlens, "old_log_probs": p.old_log_probs, "mask": p.mask, "temperature": 0.7}
    got = linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, bias=p.bias, **kwargs).loss
    expected = loop_grpo_loss(p.hidden @ p.weight.t() + p.bias, p.token_ids, p.advantages, **kwargs)
    torch.testing.assert_close(got, expected)
    inputs = (p.hidden, p.weight, p.bias)
    for one, other in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_low_precision(make_problem, set_chunk_rows, dtype, tolerance, importance):
    p = make_problem(dtype=dtype)
    set_chunk_rows(2, 11)
    exact = [t.detach().double().requires_grad_() for t in (p.hidden, p.weight, p.bias)]
    kwargs = {
        "cu_seqlens": p.cu_seqlens,
        "old_log_probs": p.old_log_probs.float(),
        "mask": p.mask,
        "importance": importance,
        "eps_high": 0.3,
    }
    got = linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, bias=p.bias, **kwargs)
    expected = linear_grpo_loss(exact[0], exact[1], p.token_ids, p.advantages, bias=exact[2], **kwargs)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    got.loss.backward()
    for low, high in zip((p.hidden, p.weight, p.bias), torch.autograd.grad(expected.loss, exact), strict=True):
        assert low.grad.dtype == dtype
        torch.testing.assert_close(low.grad.double(), high, rtol=tolerance, atol=tolerance)


def test_mixed_operand_types_get_gradients_of_their_own(make_problem):
    p = make_problem(dtype=torch.float32)
    hidden = p.hidden.detach().bfloat16().requires_grad_()
    linear_grpo_loss(hidden, p.weight, p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens).loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and p.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_garbage_on_masked_rows_changes_nothing(make_problem, set_chunk_rows, loss_type, importance):
    p = make_problem()
    set_chunk_rows(2, 11)
    drop = ~p.mask

    def run(hidden, ids, old, ref, advantages):
        inputs = [t.detach().clone().requires_grad_() for t in (hidden, p.weight, p.bias)]
        result = linear_grpo_loss(
            inputs[0],
            inputs[1],
            ids,
            advantages,
            cu_seqlens=p.cu_seqlens,
            bias=inputs[2],
            old_log_probs=old,
            ref_log_probs=ref,
            mask=p.mask,
            beta=0.1,
            loss_type=loss_type,
            importance=importance,
            normalizer=9,
        )
        result.loss.backward()
        return [*vars(result).values(), *(t.grad for t in inputs)]

    tensors = (p.hidden, p.token_ids, p.old_log_probs, p.ref_log_probs, p.row_advantages)
    clean = run(*tensors)
    for bad, bad_id in ((float("nan"), -100), (float("inf"), 10**9)):
        dirty = [t.detach().clone() for t in tensors]
        for tensor in dirty:
            tensor[drop] = bad_id if tensor.dtype == torch.long else bad
        assert all(torch.equal(a, b) for a, b in zip(clean, run(*dirty), strict=True))
    assert clean[1][drop].eq(0).all() and clean[-3][drop].eq(0).all()


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_overflow_that_is_not_selected(make_problem, set_chunk_rows, loss_type, importance):
    p = make_problem(masked=False)
    set_chunk_rows(2, 11)
    old = p.old_log_probs.clone()
    old[1], old[8] = -5000.0, -9000.0
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0])
    result = linear_grpo_loss(
        p.hidden,
        p.weight,
        p.token_ids,
        advantages,
        cu_seqlens=p.cu_seqlens,
        old_log_probs=old,
        loss_type=loss_type,
        importance=importance,
        normalizer=9,
    )
    gradient = torch.autograd.grad(result.loss, (p.hidden, p.weight))
    assert result.ratio_max == float("inf") and result.loss.isfinite() and all(g.isfinite().all() for g in gradient)
    assert gradient[0][5:].eq(0).all()
    if loss_type != "cispo":
        assert gradient[0][1].eq(0).all()


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_no_row_counts(make_problem, importance):
    p = make_problem()
    nothing = torch.zeros(11, dtype=torch.bool)
    kwargs = {"importance": importance, "cu_seqlens": p.cu_seqlens, "mask": nothing}
    result = linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, **kwargs)
    result.loss.backward()
    assert result.loss == 0 and p.hidden.grad.eq(0).all() and p.weight.grad.eq(0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_no_tensor_of_rows_times_vocabulary(make_problem, set_chunk_rows, record_operations, importance, masked):
    chunk, vocabulary = 6, 200
    p = make_problem(lengths=(40, 50), hidden_size=4, vocabulary=vocabulary, masked=masked)
    set_chunk_rows(chunk, vocabulary)
    with record_operations() as record:
        linear_grpo_loss(
            p.hidden,
            p.weight,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            bias=p.bias,
            old_log_probs=p.old_log_probs,
            ref_log_probs=p.ref_log_probs,
            mask=p.mask,
            beta=0.1,
            importance=importance,
        ).loss.backward()
    assert record.largest <= chunk * vocabulary < 90 * vocabulary
    assert p.weight.grad.ne(0).any()


@pytest.mark.parametrize(("importance", "expected"), [("token", [3, 2, 2]), ("sequence", [3, 2, 2])])
def test_what_is_frozen_costs_no_product(make_problem, record_operations, importance, expected):
    counts = []
    for trains_hidden, trains_weight in ((True, True), (True, False), (False, True)):
        p = make_problem()
        p.hidden.requires_grad_(trains_hidden)
        p.weight.requires_grad_(trains_weight)
        with record_operations() as record:
            result = linear_grpo_loss(
                p.hidden, p.weight, p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens, importance=importance
            )
            before_backward = record.products
            result.loss.backward()
        assert record.products == before_backward
        assert (p.hidden.grad is not None, p.weight.grad is not None) == (trains_hidden, trains_weight)
        counts.append(record.products)
    assert counts == expected


def test_a_sequence_longer_than_a_chunk_is_seen_twice(make_problem, set_chunk_rows, record_operations):
    p = make_problem(lengths=(9,), masked=False)
    products = {}
    for rows in (9, 8):
        set_chunk_rows(rows, 11)
        with record_operations() as record:
            linear_grpo_loss(
                p.hidden, p.weight, p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens, importance="sequence"
            ).loss.backward()
        products[rows] = record.products
    assert products == {9: 3, 8: 8}  # 8: two chunks, four products each


def test_masked_rows_never_enter_a_product(make_problem, set_chunk_rows, record_operations):
    p = make_problem(lengths=(8, 8), masked=False)
    set_chunk_rows(4, 11)
    mask = torch.arange(16) % 4 == 0
    with record_operations() as record, torch.no_grad():
        linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, cu_seqlens=p.cu_seqlens, mask=mask)
    assert record.products == 1


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_without_gradients(make_problem, record_operations, guard, importance):
    p = make_problem()
    kwargs = {"cu_seqlens": p.cu_seqlens, "old_log_probs": p.old_log_probs, "mask": p.mask, "importance": importance}
    expected = linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, **kwargs).loss
    with guard(), record_operations() as record:
        got = linear_grpo_loss(p.hidden, p.weight, p.token_ids, p.advantages, **kwargs).loss
    assert torch.equal(got, expected) and not got.requires_grad and record.products == 1


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_two_runs_agree_bit_for_bit_and_so_do_two_backwards(make_problem, set_chunk_rows, importance):
    p = make_problem(lengths=(30, 0, 41), vocabulary=37, dtype=torch.float32)
    set_chunk_rows(7, 37)
    inputs = (p.hidden, p.weight, p.bias)
    runs = []
    for _ in range(2):
        loss = linear_grpo_loss(
            p.hidden,
            p.weight,
            p.token_ids,
            p.advantages,
            cu_seqlens=p.cu_seqlens,
            bias=p.bias,
            old_log_probs=p.old_log_probs,
            mask=p.mask,
            importance=importance,
        ).loss
        runs += [(loss, *torch.autograd.grad(loss, inputs, retain_graph=True)) for _ in range(2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_operands_are_left_as_they_were(make_problem):
    p = make_problem()
    before = [t.detach().clone() for t in (p.hidden, p.weight, p.bias, p.old_log_probs, p.token_ids)]
    loss = linear_grpo_loss(
        p.hidden,
        p.weight,
        p.token_ids,
        p.advantages,
        cu_seqlens=p.cu_seqlens,
        bias=p.bias,
        old_log_probs=p.old_log_probs,
    ).loss
    loss.backward()
    after = (p.hidden, p.weight, p.bias, p.old_log_probs, p.token_ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_tied_weight_and_a_hidden_state_that_is_computed(make_problem):
    p = make_problem()
    embedding = p.weight.detach().clone().requires_grad_()

    def run(loss):
        hidden = torch.tanh(embedding[p.token_ids])
        return torch.autograd.grad(loss(hidden), embedding)[0]

    kwargs = {"cu_seqlens": p.cu_seqlens, "mask": p.mask}
    one = run(lambda h: linear_grpo_loss(h, embedding, p.token_ids, p.advantages, **kwargs).loss)
    other = run(lambda h: grpo_loss(h @ embedding.t(), p.token_ids, p.advantages, **kwargs).loss)
    torch.testing.assert_close(one, other)


def test_rewards_instead_of_advantages(make_problem):
    p = make_problem()
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0])
    kwargs = {"cu_seqlens": p.cu_seqlens, "mask": p.mask}
    fused = linear_grpo_loss(p.hidden, p.weight, p.token_ids, rewards=rewards, group_size=4, **kwargs).loss
    given = linear_grpo_loss(p.hidden, p.weight, p.token_ids, group_advantages(rewards, 4), **kwargs).loss
    assert torch.equal(fused, given)


def test_the_two_losses_share_one_signature():
    logits = inspect.signature(grpo_loss).parameters
    linear = dict(inspect.signature(linear_grpo_loss).parameters)
    for name in ("bias", "process_group", "vocab_start"):
        del linear[name]
    assert list(linear)[2:] == list(logits)[1:]
    assert all(linear[name].default == logits[name].default for name in list(logits)[1:])
    assert " ".join(GRPOLoss.__dataclass_fields__) == "loss log_probs entropy kl clip_fraction ratio_max"


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("hidden", {"hidden": torch.zeros(11)}),
        ("weight", {"weight": torch.zeros(11, 4)}),
        ("bias", {"bias": torch.zeros(10)}),
        ("token_ids", {"token_ids": torch.full((11,), 11)}),
        ("normalizer", {"loss_type": "dr_grpo"}),
        ("ref_log_probs", {"beta": 0.1}),
        ("advantages", {"rewards": torch.zeros(4), "group_size": 2}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 12])}),
    ],
)
def test_bad_arguments_are_named(make_problem, name, kwargs):
    p = make_problem()
    good = {
        "hidden": p.hidden,
        "weight": p.weight,
        "token_ids": p.token_ids,
        "advantages": p.advantages,
        "cu_seqlens": p.cu_seqlens,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        linear_grpo_loss(**(good | kwargs))
