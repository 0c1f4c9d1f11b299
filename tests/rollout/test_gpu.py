"""Sampling on a GPU: Triton kernels, CUDA graphs, bfloat16."""

import pytest
import torch

from fastcorl.algorithm import PackOptions, pack_rollout, packed_log_probs
from fastcorl.rewards.background import Background
from fastcorl.rollout import RolloutEngine, SamplingParams
from fastcorl.rollout.decoder import Rope
from tests.helpers import make_policy, objective_options

pytestmark = pytest.mark.gpu

PARAMS = SamplingParams(1.0, 5.0, 24)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16, weights apart"])
def cuda_policy(request):
    policy = make_policy().to("cuda", getattr(torch, request.param.split(",")[0]))
    if "apart" not in request.param:
        policy.lay_out()
    return policy


def assert_same(ours, theirs):
    for name in ("images", "texts"):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one is not None:
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.log_probs, other.log_probs)


def run_eagerly(engine):
    """The same rounded numbers of rows, never captured."""
    engine._worker.graphs.run = lambda step, images, texts: step(images, texts)


@pytest.mark.parametrize("max_rows", [None, 11])
def test_graphs_replay_what_the_step_does(cuda_policy, prompts, max_rows):
    graphed = RolloutEngine(cuda_policy, max_rows=max_rows)
    eager = RolloutEngine(cuda_policy, max_rows=max_rows)
    expected = eager.generate(prompts, 4, PARAMS, seed=1)
    run_eagerly(eager)
    again = eager.generate(prompts, 4, PARAMS, seed=1)
    assert_same(again, expected)
    for _ in range(3):  # captured in the first call, replayed from its second step on
        assert_same(graphed.generate(prompts, 4, PARAMS, seed=1), expected)
    assert graphed._worker.graphs.graphs
    assert_same(graphed.generate(prompts, 4, PARAMS, seed=2), eager.generate(prompts, 4, PARAMS, seed=2))


def test_drawings_are_decoded_and_read_beside_the_decode(cuda_policy, prompts):
    engine, background, jobs = RolloutEngine(cuda_policy), Background(), []
    expected = engine.generate(prompts, 4, PARAMS, seed=1)

    def begin(rollout):
        pixels = rollout.images.pixels
        jobs.append(background.start({"mean": lambda: pixels.mean((1, 2, 3))}, pixels.device))

    for _ in range(3):
        rollout = engine.generate(prompts, 4, PARAMS, seed=1, on_drawings=begin)
        assert_same(rollout, expected)
        torch.testing.assert_close(rollout.images.pixels, expected.images.pixels, rtol=0, atol=1e-2)
        assert torch.equal(jobs[-1].result()["mean"], rollout.images.pixels.mean((1, 2, 3)))


def test_a_graph_captured_at_short_context_serves_long_ones(cuda_policy, prompts, monkeypatch):
    monkeypatch.setattr(cuda_policy.encoder, "eos_id", -1)  # answers go on to the limit
    params = SamplingParams(1.0, 1.0, 900)
    graphed, eager = RolloutEngine(cuda_policy), RolloutEngine(cuda_policy)
    for engine in (graphed, eager):
        engine.context, engine.rope = 1024, Rope(cuda_policy.backbone, 1024)
        engine.prefiller.rope = engine.rope
    texts = graphed.generate(prompts, 2, params, draw=False).texts
    assert (texts.lengths == 900).all()
    eager.generate(prompts, 2, params, draw=False)
    run_eagerly(eager)
    assert torch.equal(texts.tokens, eager.generate(prompts, 2, params, draw=False).texts.tokens)


def test_sampled_log_probs_are_near_the_teacher_forced_ones(cuda_policy, prompts):
    rollout = RolloutEngine(cuda_policy).generate(prompts, 4, PARAMS, seed=3)
    options = objective_options(guidance=5.0)
    (batch,) = pack_rollout(rollout, torch.zeros(rollout.num_rows, device="cuda"), PackOptions(100_000))
    # Guidance is not in this policy, so nothing multiplies the rounding of bfloat16.
    bound = 1e-3 if cuda_policy.dtype == torch.float32 else 0.25
    for modality, log_probs in packed_log_probs(cuda_policy, batch, options).items():
        distance = (log_probs - getattr(batch, modality).sampled_log_probs).abs()
        assert distance.max() < bound and distance.mean() < bound / 10


def test_float32_tokens_are_those_of_the_cpu(policy, prompts):
    cuda = make_policy().to("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    ours = RolloutEngine(cuda).generate(prompts, 4, PARAMS, seed=4)
    theirs = RolloutEngine(policy).generate(prompts, 4, PARAMS, seed=4)
    # A tie within rounding may fall differently, and then the rest of the row does.
    same = (ours.images.tokens.cpu() == theirs.images.tokens).all(dim=1).float().mean()
    assert same > 0.9


def test_graphs_see_weights_that_change_in_place(cuda_policy, prompts):
    engine = RolloutEngine(cuda_policy, weight_version=0)
    before = engine.generate(prompts, 4, PARAMS, seed=5)
    assert_same(engine.generate(prompts, 4, PARAMS, seed=5), before)
    with torch.no_grad():
        for parameter in cuda_policy.backbone.parameters():
            parameter.mul_(1.1)
    engine.weight_version = 1
    after = engine.generate(prompts, 4, PARAMS, seed=5)
    assert not torch.equal(after.images.tokens, before.images.tokens)
    assert_same(after, RolloutEngine(cuda_policy).generate(prompts, 4, PARAMS, seed=5))
