"""The configured attention: named, refused in one line, logged in one line, and handed to whoever attends in packs."""

import typing

import pytest
import torch

from fastcorl.config import ModelConfig
from fastcorl.errors import UserError
from fastcorl.model import backends, load_policy, pack_prompts
from fastcorl.model.backends import packed_backend
from fastcorl.model.buckets import by_buckets
from fastcorl.rollout import RolloutEngine, SamplingParams
from tests.model.attention_kernels import install

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    backends._packed_backend.cache_clear()
    yield
    backends._packed_backend.cache_clear()


def test_the_configuration_knows_every_backend():
    assert typing.get_args(ModelConfig.model_fields["attention"].annotation) == backends.NAMES
    assert ModelConfig().attention == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_a_cpu_takes_the_buckets(caplog, name, dtype):
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert packed_backend(name, dtype, 32, CPU) == (by_buckets, by_buckets)
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.message.endswith("on cpu with head dimension 32: sdpa")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash_attn", "flash_attn runs on CUDA in float16 or bfloat16, and this is float32 on cpu; take auto"),
        ("xformers", "xformers runs on CUDA"),
        ("torch", "torch runs on CUDA"),
        ("flex", "cannot use flex: NotImplementedError: FlexAttention does not support backward on CPU"),
    ],
)
def test_a_cpu_refuses_the_others_before_weights_are_read(monkeypatch, name, reason):
    monkeypatch.setattr("fastcorl.model.loading.JanusForConditionalGeneration", None)
    with pytest.raises(UserError, match=f"^model.attention: {reason}") as caught:
        load_policy("quickstart", attention=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["flash_attn", "xformers", "torch"])
def test_a_gpu_refuses_what_is_not_there(monkeypatch, name):
    install(monkeypatch)
    with pytest.raises(UserError, match=f"^model.attention: cannot use {name}: .*Error: .*; auto takes") as caught:
        packed_backend(name, torch.float32, 8, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("auto", ": flash_attn"),
        ("flash_attn", ": flash_attn"),
        ("xformers", ": xformers, and torch where prefixes are shared"),
        ("torch", ": torch"),
        ("flex", ": flex"),
        ("sdpa", ": sdpa"),
    ],
)
def test_the_choice_is_one_line(monkeypatch, caplog, name, chosen):
    install(monkeypatch).everything()
    with caplog.at_level("INFO"):
        for _ in range(2):
            packed_backend(name, torch.float32, 8, CPU)
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.message.endswith(chosen)


def test_a_policy_hands_its_backend_to_training_and_sampling(monkeypatch, policy, prompts):
    used = []

    def remember(name, *where):
        used.append(name)
        return packed_backend("auto", *where)

    monkeypatch.setattr("fastcorl.model.attention.packed_backend", remember)
    monkeypatch.setattr(policy, "attention_backend", "sdpa")
    with torch.no_grad():
        policy.hidden_states(pack_prompts([[7, 8]], None, policy.encoder.image_id, policy.device))
    assert set(used) == {"sdpa"}
    used.clear()
    RolloutEngine(policy).generate(prompts, 2, SamplingParams(1.0, 5.0, 3), seed=2)
    assert set(used) == {"sdpa"}


def test_a_loaded_policy_has_the_configured_backend():
    assert load_policy("quickstart").attention_backend == "auto"
    assert load_policy("quickstart", attention="sdpa").attention_backend == "sdpa"
