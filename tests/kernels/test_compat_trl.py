import inspect
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

import fastcorl_kernels
from fastcorl_kernels.compat import liger
from fastcorl_kernels.compat import trl as ours


def naive(logits, index, temperature=1.0):
    """TRL's own definition, in its docstring."""
    log_p = (logits / temperature).log_softmax(-1)
    if index.dim() == logits.dim():
        return log_p.gather(-1, index)
    return log_p.gather(-1, index[..., None]).squeeze(-1)


def make_logits(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


SHAPES = [(), (3,), (2, 3), (2, 1, 3), (0, 3)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chosen", [None, 1, 4])
@pytest.mark.parametrize("lead", SHAPES)
def test_log_probs_and_gradients_for_one_or_many_indices_per_row(lead, chosen, temperature):
    logits = make_logits(*lead, 7)
    index = torch.randint(7, lead if chosen is None else (*lead, chosen))
    log_probs = ours.selective_log_softmax(logits, index, temperature)
    expected = naive(logits, index, temperature)
    torch.testing.assert_close(log_probs, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(log_probs, logits, upstream)[0], torch.autograd.grad(expected, logits, upstream)[0]
    )


@pytest.mark.parametrize("lead", SHAPES)
def test_entropies_and_their_gradients(lead):
    logits = make_logits(*lead, 7)
    log_p = logits.log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)
    entropy = ours.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(
        torch.autograd.grad(entropy.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )


@pytest.mark.parametrize("requires_grad", [True, False])
def test_both_at_once_are_of_the_distribution_at_the_temperature(requires_grad):
    logits, index = make_logits(2, 3, 7), torch.randint(7, (2, 3))
    log_probs, entropy = ours.selective_log_softmax_and_entropy(logits, index, requires_grad, temperature=0.7)
    torch.testing.assert_close(log_probs, naive(logits, index, 0.7))
    torch.testing.assert_close(entropy.detach(), ours.entropy_from_logits(logits.detach() / 0.7))
    assert entropy.requires_grad == requires_grad and log_probs.requires_grad


def test_masked_rows_are_zero_and_whatever_lies_on_them_changes_nothing():
    logits, index = make_logits(2, 3, 7), torch.randint(7, (2, 3))
    row_mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    dirty = logits.detach().clone()
    dirty[row_mask == 0] = torch.nan
    dirty.requires_grad_()
    index[row_mask == 0] = -100
    log_probs, entropy = ours.selective_log_softmax_and_entropy(dirty, index, row_mask=row_mask)
    kept = row_mask == 1
    torch.testing.assert_close(log_probs[kept], naive(logits[kept], index[kept]))
    assert not log_probs[~kept].any() and not entropy[~kept].any()
    (gradient,) = torch.autograd.grad(log_probs.sum() + entropy.sum(), dirty)
    assert gradient.isfinite().all() and not gradient[~kept].any() and gradient[kept].any(dim=-1).all()


def test_of_many_indices_per_row_some_can_be_masked():
    logits, index = make_logits(3, 7), torch.randint(7, (3, 2))
    row_mask = torch.tensor([[True, False], [False, False], [True, True]])
    log_probs = ours.selective_log_softmax(logits, index, row_mask=row_mask)
    torch.testing.assert_close(log_probs, naive(logits, index).masked_fill(~row_mask, 0.0))


def test_tokens_that_are_ruled_out_leave_everything_finite_but_their_own_log_prob():
    logits = make_logits(2, 7).detach()
    logits[:, :4] = -torch.inf
    logits.requires_grad_()
    index = torch.tensor([[0, 5], [6, 4]])
    log_probs = ours.selective_log_softmax(logits, index)
    torch.testing.assert_close(log_probs, naive(logits, index))
    entropy = ours.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, ours.entropy_from_logits(logits[:, 4:]))
    assert torch.autograd.grad(log_probs[:, 1].sum() + entropy.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_accumulated_and_returned_in_float32(dtype):
    logits, index = make_logits(3, 7, dtype=dtype), torch.randint(7, (3,))
    log_probs = ours.selective_log_softmax(logits, index)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), naive(logits.double(), index), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, change",
    [
        ("index", {"index": torch.zeros(2, dtype=torch.long)}),
        ("temperature", {"temperature": 0.0}),
        ("row_mask", {"row_mask": torch.ones(2)}),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = {"logits": torch.zeros(3, 7), "index": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        ours.selective_log_softmax(**(arguments | change))


class TheirHead:
    """A fused head that answers with the arguments it got."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ): ...

    @staticmethod
    def apply(*arguments):
        return arguments


@pytest.fixture
def fake_trl(monkeypatch):
    """A TRL of three modules, of which only ``utils`` has a fused head and only ``grpo_trainer`` has Liger's loss."""
    modules = {
        name: ModuleType(name) for name in ("trl", "trl.trainer", "trl.trainer.utils", "trl.trainer.grpo_trainer")
    }
    trainer, utils, grpo_trainer = list(modules.values())[1:]
    trainer.utils, trainer.grpo_trainer = utils, grpo_trainer
    utils.selective_log_softmax = grpo_trainer.selective_log_softmax = lambda: "theirs"
    utils.unrelated = grpo_trainer.LigerFusedLinearGRPOLoss = object()
    utils._ChunkedLogProbFunction = TheirHead
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return utils, grpo_trainer


def test_names_are_replaced_inside_the_context_and_put_back_even_after_an_error(fake_trl):
    utils, grpo_trainer = fake_trl
    before = [dict(vars(module)) for module in fake_trl]
    with pytest.raises(KeyError), ours.patched():
        assert utils.selective_log_softmax is grpo_trainer.selective_log_softmax is ours.selective_log_softmax
        assert grpo_trainer.LigerFusedLinearGRPOLoss is liger.LigerFusedLinearGRPOLoss
        assert utils._ChunkedLogProbFunction.original is TheirHead
        assert [vars(module).keys() for module in fake_trl] == [names.keys() for names in before]
        assert utils.unrelated is before[0]["unrelated"]
        raise KeyError
    assert [dict(vars(module)) for module in fake_trl] == before


def test_a_head_that_is_called_otherwise_is_left_alone(fake_trl):
    class OlderHead:
        def forward(ctx, hidden, weight, targets): ...

    fake_trl[0]._ChunkedLogProbFunction = OlderHead
    with ours.patched():
        assert fake_trl[0]._ChunkedLogProbFunction is OlderHead


def make_head(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((6, 3), (7, 3), (7,))
    )
    return hidden, weight, bias, torch.randint(7, (6,), generator=generator)


@pytest.mark.parametrize("outputs", [("log_probs", "entropy"), ("log_probs",)])
@pytest.mark.parametrize("temperature, scale", [(1.0, 1.0), (0.7, 3.0)])
def test_the_fused_head_gives_log_probs_and_entropies(temperature, scale, outputs):
    hidden, weight, bias, targets = make_head()
    log_probs, entropy, *rest = ours.FusedHead(TheirHead).apply(
        hidden, weight, bias, targets, temperature, 4, None, scale, outputs
    )
    logits = (hidden @ weight.T + bias) * scale / temperature
    assert rest == [None, None, None] and (entropy is None) == (len(outputs) == 1)
    expected, expected_entropy = naive(logits, targets), ours.entropy_from_logits(logits)
    torch.testing.assert_close(log_probs, expected)
    if entropy is None:
        entropy = expected_entropy = torch.zeros(1)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(
        torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight, bias)),
        torch.autograd.grad(expected.sum() + expected_entropy.sum(), (hidden, weight, bias)),
    )


@pytest.mark.parametrize(
    "softcap, scale, outputs, partitioned",
    [
        (30.0, 1.0, ("log_probs",), False),
        (None, -1.0, ("log_probs",), False),
        (None, 1.0, ("log_probs", "is_top1"), False),
        (None, 1.0, ("log_probs",), True),
    ],
)
def test_the_fused_head_leaves_to_trl_what_it_does_not_do(softcap, scale, outputs, partitioned):
    hidden, weight, bias, targets = make_head()
    if partitioned:
        weight.ds_id = 0
    arguments = (hidden, weight, bias, targets, 1.0, 4, softcap, scale, outputs)
    assert ours.FusedHead(TheirHead).apply(*arguments) == arguments


def test_under_autocast_the_operands_are_rounded_and_the_sums_are_not():
    hidden, weight, bias, targets = make_head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = ours.FusedHead(TheirHead).apply(hidden, weight, bias, targets, 1.0, 4, None, 1.0, ("log_probs",))[0]
    rounded_hidden, rounded_weight, rounded_bias = (t.bfloat16().double() for t in (hidden, weight, bias))
    expected = naive(rounded_hidden @ rounded_weight.T + rounded_bias, targets)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
    assert gradient.dtype == torch.float32


def parameters(function):
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


def test_signatures_are_trls():
    utils = pytest.importorskip("trl.trainer.utils")
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"):
        assert parameters(getattr(utils, name)) == parameters(getattr(ours, name))
    head = [name for name, _ in parameters(utils._ChunkedLogProbFunction.forward)]
    assert head[1:] == [name for name, _ in parameters(ours.FusedHead.apply)][1:]


def test_trl_agrees():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, row_mask = make_logits(2, 3, 7), torch.tensor([[1, 0, 1], [0, 0, 1]])
    index, many = torch.randint(7, (2, 3)), torch.randint(7, (2, 3, 4))
    for call in (
        lambda module: module.selective_log_softmax(logits, index, 0.7, row_mask),
        lambda module: module.selective_log_softmax(logits, many),
        lambda module: module.entropy_from_logits(logits),
        lambda module: sum(module.selective_log_softmax_and_entropy(logits, index, True, 0.7, row_mask)),
    ):
        mine, theirs = call(ours), call(utils)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(mine.sum(), logits)[0], torch.autograd.grad(theirs.sum(), logits)[0]
        )


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(context)`` runs two steps of TRL's GRPOTrainer on a random Llama; gives its log and the weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tokenizers
    import transformers

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(29))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    splitting = tokenizers.Tokenizer(model)
    splitting.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitting, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

    def run(context):
        with context:
            trainer = trl.GRPOTrainer(
                model=str(tmp_path / "model"),
                reward_funcs=lambda completions, **_: [float(completion.count("w1")) for completion in completions],
                args=trl.GRPOConfig(
                    output_dir=str(tmp_path / "out"),
                    per_device_train_batch_size=4,
                    num_generations=4,
                    num_iterations=2,
                    max_completion_length=6,
                    max_steps=2,
                    beta=0.1,
                    learning_rate=1e-2,
                    use_cpu=True,
                    bf16=False,
                    logging_steps=1,
                    report_to=[],
                    save_strategy="no",
                    disable_tqdm=True,
                ),
                train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"]}),
                processing_class=tokenizer,
            )
            trainer.train()
        return trainer.state.log_history, [weight.detach() for weight in trainer.model.parameters()]

    return run


def test_two_steps_of_the_trainer_are_the_same_on_our_kernels(train, monkeypatch):
    calls = []
    kernel = fastcorl_kernels.linear_selective_log_softmax
    monkeypatch.setattr(
        fastcorl_kernels, kernel.__name__, lambda *args, **named: calls.append(args) or kernel(*args, **named)
    )
    (log, weights), used = train(nullcontext()), len(calls)
    patched_log, patched_weights = train(ours.patched())
    assert used == 0 and len(calls) >= 4
    assert log[1]["kl"] > 0 and log[0]["grad_norm"] > 0
    for step, patched_step in zip(log[:2], patched_log[:2], strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean"):
            assert patched_step[name] == pytest.approx(step[name], rel=1e-4, abs=1e-6)
    for mine, theirs in zip(patched_weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
