"""Liger's kernels and compiled blocks in a policy's backbone, against the modules that transformers built."""

import copy
import functools
import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.first_checks import check_stages
from fastcorl.memory import block_bytes_per_token
from fastcorl.model import fused_layers as module
from fastcorl.model import load_policy, save_policy
from fastcorl.model.fused_layers import CLASSES, Shape, compile_blocks, use_liger, uses_liger, working_kernels
from fastcorl.model.loading import empty_policy
from fastcorl.parts import liger_choice
from tests.helpers import HIDDEN_SIZE, janus_config, make_policy
from tests.model.backbones import DEVICE, pack, prepared

PACKS = [[5, 9, 2], [30], [1, 1, 12], [40, 3, 2, 17]]
ALL = tuple(CLASSES)


@pytest.fixture
def liger(monkeypatch):
    """Liger works on DEVICE, on a CPU through Triton's interpreter."""
    pytest.importorskip("liger_kernel")
    if DEVICE == "cpu":
        interpret_liger(monkeypatch)
    monkeypatch.setattr(module, "DEVICE", DEVICE)
    forget()
    yield
    forget()


def interpret_liger(monkeypatch):
    """Mend what Liger asks of a scalar and of libdevice, and the interpreter has not."""
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda values: tl.rsqrt(values))


def forget():
    working_kernels.cache_clear()
    module._liger.cache_clear()


def results(policy, lengths):
    """Hidden states, and by name the gradient of each trained parameter of the backbone."""
    hidden = policy.hidden_states(pack(policy, lengths))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    trained = {name: weight for name, weight in policy.backbone.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad((hidden * weights).sum(), list(trained.values()))
    return hidden.detach(), dict(zip(trained, gradients, strict=True))


def assert_same(policy, reference, lengths, tolerance=1e-5):
    (hidden, gradients), (expected, others) = results(policy, lengths), results(reference, lengths)
    torch.testing.assert_close(hidden, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        scale = others[name].norm()
        assert scale > 1e-3, name
        assert (gradient - others[name]).norm() <= 10 * tolerance * scale, name


# Liger


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_liger_gives_what_torch_gives(liger, lora, recomputed):
    policy = prepared(lora=lora, recomputed=recomputed)
    use_liger(policy.backbone, "on")
    assert uses_liger(policy.backbone)
    assert_same(policy, prepared(lora=lora), PACKS[3])


def test_adapters_may_come_after_liger(liger):
    policy = prepared()
    use_liger(policy.backbone, "on")
    policy.add_adapters(rank=2, alpha=4, targets=["gate_proj", "v_proj"])
    state = {name: torch.full_like(weight, 0.01) for name, weight in policy.named_parameters() if "lora_" in name}
    policy.load_state_dict(state, strict=False)
    hidden = policy.hidden_states(pack(policy, [6]))
    with policy.without_adapters():
        expected = prepared().hidden_states(pack(policy, [6]))
        torch.testing.assert_close(policy.hidden_states(pack(policy, [6])), expected, rtol=1e-5, atol=1e-5)
    assert (hidden - expected).norm() > 1e-3 * expected.norm()


def test_only_this_backbone_changes(liger):
    classes = [before for before, _ in CLASSES.values()]
    forwards = [each.forward for each in classes]
    policy, other = prepared(), prepared()
    names, parameters = list(policy.state_dict()), list(policy.parameters())
    modules = list(policy.modules())
    use_liger(policy.backbone, "on")
    assert [each.forward for each in classes] == forwards
    assert all(new is old for new, old in zip(policy.modules(), modules, strict=True))
    assert all(new is old for new, old in zip(policy.parameters(), parameters, strict=True))
    assert list(policy.state_dict()) == names
    for backbone in (other.backbone, make_policy().backbone):
        assert not uses_liger(backbone)
        assert {type(each) for each in backbone.modules()} >= set(classes)
    kinds = {type(each) for each in policy.backbone.modules()}
    assert kinds.isdisjoint(classes) and kinds >= {after for _, after in CLASSES.values()}


def test_a_copy_stands_alone(liger):
    """DeepSpeed's whole copy under ZeRO 3, and a kept reference."""
    policy = prepared(recomputed=1)
    use_liger(policy.backbone, "on")
    twin = copy.deepcopy(policy)
    assert uses_liger(twin.backbone) and not twin.backbone.norm.in_place
    with torch.no_grad():
        for weight in policy.backbone.parameters():
            weight.zero_()
    assert_same(twin, prepared(), PACKS[0])


def test_hooks_fire(liger):
    """ZeRO 3 gathers a module's weights in them."""
    policy = prepared()
    use_liger(policy.backbone, "on")
    block, seen = policy.backbone.layers[1], []
    leaves = [block.input_layernorm, block.post_attention_layernorm, block.self_attn, block.mlp]
    leaves += [linear for linear in block.modules() if isinstance(linear, torch.nn.Linear)]
    for leaf in leaves:
        leaf.register_forward_pre_hook(lambda module, _: seen.append(("before", module)))
        leaf.register_full_backward_hook(lambda module, *_: seen.append(("backward", module)))
    results(policy, PACKS[0])
    assert len(seen) == 2 * len(leaves)
    assert {(when, id(each)) for when, each in seen} == {
        (w, id(leaf)) for w in ("before", "backward") for leaf in leaves
    }


def test_the_gradient_that_comes_in_stays(liger):
    policy = prepared()
    use_liger(policy.backbone, "on")
    hidden = policy.hidden_states(pack(policy, PACKS[0]))
    gradient = torch.randn_like(hidden)
    before = gradient.clone()
    hidden.backward(gradient)
    assert torch.equal(gradient, before)


def test_a_second_backward_is_refused(liger):
    policy = prepared()
    use_liger(policy.backbone, "on")
    loss = policy.hidden_states(pack(policy, PACKS[0])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


def test_what_liger_saves_is_what_the_memory_table_takes_off(liger):
    lengths, saved = [16, 16], []
    for fused in (False, True):
        policy = prepared()
        if fused:
            use_liger(policy.backbone, "on")
        weights = {weight.untyped_storage()._cdata for weight in policy.parameters()}
        kept = {}

        def keep(tensor, kept=kept, weights=weights):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = policy.hidden_states(pack(policy, lengths))
        assert hidden.requires_grad
        saved.append(sum(storage.nbytes() for storage in kept.values()))
    shapes = empty_policy(janus_config(), torch.float32)
    per_block = block_bytes_per_token(shapes) - block_bytes_per_token(shapes, fused=True)
    last_norm = 4 * HIDDEN_SIZE
    assert saved[0] - saved[1] == pytest.approx(sum(lengths) * (2 * per_block + last_norm), rel=0.02)


def wrong(function):
    def spoilt(*args, **options):
        return function(*args, **options) * 1.1

    return spoilt


def broken(*_, **__):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize("how", ["wrong", "broken"])
def test_a_kernel_that_does_not_work_is_done_without(liger, monkeypatch, caplog, how):
    monkeypatch.setattr(module, "liger_rms_norm", wrong(module.liger_rms_norm) if how == "wrong" else broken)
    policy = prepared()
    with caplog.at_level(logging.INFO):
        use_liger(policy.backbone, "auto")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Liger's RoPE, SwiGLU" in record.message and "RMSNorm: " in record.message and "\n" not in record.message
    assert type(policy.backbone.norm) is LlamaRMSNorm
    assert_same(policy, prepared(), PACKS[0])
    with pytest.raises(UserError, match="model.liger: on does not work here: RMSNorm") as raised:
        use_liger(prepared().backbone, "on")
    assert "\n" not in str(raised.value)


def test_another_activation_is_left_to_torch(liger, caplog):
    policy = prepared()
    policy.backbone.config.hidden_act = "gelu"
    use_liger(policy.backbone, "auto")
    assert {type(layer.mlp) for layer in policy.backbone.layers} == {LlamaMLP}
    assert "SwiGLU: TypeError: the activation is gelu" in caplog.text


def test_without_the_package_torch_runs(liger, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    forget()
    policy = prepared()
    use_liger(policy.backbone, "auto")
    assert type(policy.backbone.layers[0].self_attn) is LlamaAttention
    assert "torch's modules" in caplog.text and "ModuleNotFoundError" in caplog.text


def test_all_work_at_every_call(liger, caplog):
    with caplog.at_level(logging.INFO):
        policy = prepared()
        with torch.inference_mode():
            use_liger(policy.backbone, "auto")
    assert caplog.messages == ["the backbone runs on Liger's RMSNorm, RoPE, SwiGLU"]


def test_a_cpu_runs_on_torch(caplog):
    policy = make_policy()
    with caplog.at_level(logging.INFO):
        use_liger(policy.backbone, "auto")
    assert caplog.messages == ["the backbone runs on torch's modules (the weights are on cpu, not on cuda)"]
    assert not uses_liger(policy.backbone)
    with pytest.raises(UserError, match="model.liger: on does not work here: the weights are on cpu"):
        use_liger(policy.backbone, "on")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "intermediate", "heads"), [(2048, 5632, 16), (4096, 11008, 32)])
def test_kernels_on_a_gpu(dtype, width, intermediate, heads):
    shape = Shape(dtype, torch.device("cuda", 0), width, intermediate, heads, heads, 128, 1e-6, "silu")
    assert working_kernels(shape) == (ALL, ())


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_policy_in_half_precision_on_a_gpu(recomputed):
    policy, reference = prepared(recomputed=recomputed), prepared()
    policy.to(torch.bfloat16)
    use_liger(policy.backbone, "on")
    assert_same(policy, reference.to(torch.bfloat16), [300, 17, 128], tolerance=0.01)


# Compiled blocks


@pytest.fixture
def compiler():
    if module._compile_problem(torch.device(DEVICE)):
        pytest.skip("torch.compile does not work here")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("backend", "lora", "recomputed"),
    [pytest.param("inductor", False, 0, marks=pytest.mark.slow), ("eager", False, 1), ("eager", True, 1)],
)
def test_compiled_blocks_give_what_torch_gives(compiler, monkeypatch, backend, lora, recomputed):
    build = functools.partial(torch.compile, dynamic=True, backend=backend)
    monkeypatch.setattr(module, "compiled", functools.cache(build))
    policy, reference = prepared(lora=lora, recomputed=recomputed), prepared(lora=lora)
    forward = LlamaDecoderLayer.forward
    names = list(policy.state_dict())
    compile_blocks(policy.backbone)
    assert LlamaDecoderLayer.forward is forward and list(policy.state_dict()) == names
    graphs = []
    for lengths in PACKS:
        assert_same(policy, reference, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] <= 8, graphs
    assert not counters["graph_break"]
    with torch.no_grad():
        assert torch.equal(policy.hidden_states(pack(policy, [4, 4])), reference.hidden_states(pack(policy, [4, 4])))
    with torch.inference_mode():
        policy.hidden_states(pack(policy, [1]))
    assert counters["stats"]["unique_graphs"] == graphs[-1]
    twin = copy.deepcopy(policy)
    assert_same(twin, reference, PACKS[0])
    assert counters["stats"]["unique_graphs"] == graphs[-1]


def test_a_missing_compiler_is_the_users_to_install(monkeypatch, tmp_path):
    if DEVICE != "cpu":
        pytest.skip("a GPU's code is compiled by Triton")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    module._compile_problem.cache_clear()
    torch.compiler.reset()
    with pytest.raises(UserError, match="model.compile: torch.compile does not work here: .*compiler") as raised:
        compile_blocks(make_policy().backbone)
    assert "\n" not in str(raised.value)
    module._compile_problem.cache_clear()


# Gradient checkpointing


@pytest.mark.parametrize(("setting", "runs"), [(False, [1, 1]), (True, [2, 2]), (1, [2, 1]), (2, [2, 2]), (9, [2, 2])])
def test_blocks_run_again_where_that_is_asked_for(policy, tmp_path, setting, runs):
    save_policy(policy, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loaded = load_policy(tmp_path, gradient_checkpointing=setting)
        calls = [[] for _ in runs]
        for layer, seen in zip(loaded.backbone.layers, calls, strict=True):
            layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        (hidden, gradients), (expected, others) = (results(each, PACKS[3]) for each in (loaded, policy))
    assert list(map(len, calls)) == runs
    assert torch.equal(hidden, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name])


# Choices that a configuration makes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.compile=true", "--deepspeed.zero_stage=3"], "model.compile: is not there under ZeRO 3"),
        (["--model.compile=true", *(cosine := ["--evaluation.gradient_cosine=true", "--evaluation.every=5"])], "twice"),
        (["--model.liger=on", *cosine], "gradient_cosine: goes backward twice"),
    ],
)
def test_what_does_not_go_together(options, message):
    config = load_config(options)
    with pytest.raises(UserError, match=message):
        check_stages(config, config.stages, 1)


def test_two_backward_passes_do_without_liger():
    assert liger_choice(load_config([])) == "auto"
    assert liger_choice(load_config(cosine)) == "off"


def test_liger_and_compiled_blocks_exclude_one_another():
    with pytest.raises(UserError, match="model.compile|model.liger"):
        load_config(["--model.liger=on", "--model.compile=true"])
