"""Liger-Kernel's and TRL's GRPO functions beside fastcorl_kernels' stand-ins for them, each against float64, on a CPU.

    python bench/drop_in.py [--cases N] [--seed S]

Runs N random sets of options per function, then the known hard cases. The figures are the largest error of any output
or gradient, relative to the largest value of that tensor. The exit code is 1 if a stand-in is off anywhere.
"""

import argparse
import importlib
import os
import random
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import torch
from drop_in_problems import (
    DEFAULTS,
    make_problem,
    outputs,
    own_log_probs,
    truth_from_hidden,
    truth_from_logits,
    truth_of_head,
    truth_of_rows,
    z_loss,
)
from rich.console import Console
from rich.table import Table

from fastcorl_kernels.compat import liger as our_liger
from fastcorl_kernels.compat import trl as our_trl

INNER_DELTA = "no gradient for A < 0 and delta < ratio < 1 + eps_high"


def run_logits(function, problem):
    """``triton_grpo_loss``, Liger's or ours."""
    o = problem.options
    leaf = problem.logits.detach()
    leaf = (leaf.clone() if o["inplace"] else leaf).requires_grad_()
    extra = z_loss(problem, leaf)
    first, *rest = function(
        leaf,
        problem.old,
        problem.ref,
        problem.ids,
        problem.advantages,
        problem.mask,
        temperature=o["temperature"],
        beta=o["beta"],
        eps_low=o["eps_low"],
        eps_high=o["eps_high"],
        inplace=o["inplace"],
        loss_type=o["loss_type"],
        importance_sampling_level=o["level"],
        reduce=o["reduce"],
        vllm_is_ratio=problem.vllm,
        delta=o["delta"],
        num_items_in_batch=o["items"],
    )
    if o["reduce"]:
        return outputs(first + extra, {"loss": first, "metrics": torch.stack(rest[0])}, {"logits": leaf})
    named = {"loss": first, "kl": rest[0], "clipped": rest[1]}
    return outputs((first * problem.upstream).sum(), named, {"logits": leaf})


def run_linear(module, problem):
    """``LigerFusedLinearGRPOLoss``, Liger's or ours."""
    o = problem.options
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("hidden", "weight", "bias")}
    loss_function = module(
        beta=o["beta"],
        compiled=False,
        epsilon_low=o["eps_low"],
        epsilon_high=o["eps_high"],
        loss_type=o["loss_type"],
        max_completion_length=problem.ids.shape[1],
        importance_sampling_level=o["level"],
        temperature=o["temperature"],
        delta=o["delta"],
    )
    loss, metrics = loss_function(
        leaves["hidden"],
        leaves["weight"],
        problem.ids,
        problem.mask,
        problem.advantages,
        bias=leaves["bias"],
        ref_per_token_logps=problem.ref if o["ref_given"] else None,
        old_per_token_logps=problem.old,
        vllm_is_ratio=problem.vllm,
        num_items_in_batch=o["items"],
    )
    return outputs(loss, {"loss": loss, "metrics": torch.stack(metrics)}, leaves)


def run_trainer(trainer, problem):
    """``GRPOTrainer._compute_loss`` on given logits: the trainer around it is a stub of what the method reads."""
    from trl.trainer import utils

    o, leaf = problem.options, problem.logits.detach().requires_grad_()
    log_probs = utils.selective_log_softmax(leaf[:, :-1], problem.ids, o["temperature"])
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t),
        args=SimpleNamespace(delta=o["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=o["beta"],
        current_gradient_accumulation_steps=1,
        epsilon_high=o["eps_high"],
        epsilon_low=o["eps_low"],
        importance_sampling_level=o["level"],
        loss_type=o["loss_type"],
        max_completion_length=problem.ids.shape[1],
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=problem.vllm is not None,
        vllm_importance_sampling_correction=True,
    )
    inputs = {
        "prompt_ids": problem.ids[:, :0],
        "prompt_mask": problem.mask[:, :0],
        "completion_ids": problem.ids,
        "completion_mask": problem.mask,
        "advantages": problem.advantages,
        "ref_per_token_logps": problem.ref,
        "importance_sampling_ratio": None if problem.vllm is None else problem.vllm.reshape(len(problem.ids), -1),
        "num_items_in_batch": problem.mask.sum() if o["items"] is None else torch.tensor(o["items"]),
    }
    if problem.old is not None:
        inputs["old_per_token_logps"] = problem.old
    loss = trainer._compute_loss(stub, None, inputs)
    return outputs(loss, {"loss": loss}, {"logits": leaf})


def run_rows(module, problem):
    """``selective_log_softmax_and_entropy``, TRL's or ours."""
    leaf = problem.logits.detach().requires_grad_()
    log_probs, entropy = module.selective_log_softmax_and_entropy(
        leaf[:, :-1], problem.ids, True, problem.options["temperature"], problem.mask
    )
    loss = ((log_probs + entropy) * problem.upstream).sum()
    return outputs(loss, {"log_probs": log_probs, "entropy": entropy}, {"logits": leaf})


def run_head(function, problem):
    """The function behind TRL's fused head, or ours, on tiles of 4 tokens of the vocabulary."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("hidden", "weight", "bias")}
    hidden, weight, bias = leaves.values()
    log_probs, entropy, *_ = function.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        problem.ids.reshape(-1),
        problem.options["temperature"],
        4,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    named = {"log_probs": log_probs.view(problem.ids.shape), "entropy": entropy.view(problem.ids.shape)}
    return outputs((sum(named.values()) * problem.upstream).sum(), named, leaves)


def load(module, name=None):
    """A peer's module, or something of it; None where the peer is not installed."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return found if name is None else getattr(found, name)


def functions():
    """Per name: how to run it, theirs, how to run ours, ours, and the truth."""
    triton = load("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    linear = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    trainer, utils = load("trl", "GRPOTrainer"), load("trl.trainer.utils")
    head, ours = load("trl.kernels", "ChunkedLogProbFunction"), our_liger.triton_grpo_loss
    return {
        "Liger triton_grpo_loss": (run_logits, triton, run_logits, ours, truth_from_logits),
        "LigerFusedLinearGRPOLoss": (
            run_linear,
            linear,
            run_linear,
            our_liger.LigerFusedLinearGRPOLoss,
            truth_from_hidden,
        ),
        "TRL GRPOTrainer loss": (run_trainer, trainer, run_logits, ours, truth_from_logits),
        "TRL selective_log_softmax": (run_rows, utils, run_rows, our_trl, truth_of_rows),
        "TRL fused head": (run_head, head, run_head, our_trl.FusedHead(head), truth_of_head),
    }


def random_case(generator, name):
    """(problem, what of its options is unlike the defaults, why the peer may fail)"""
    loss_type = generator.choice(["grpo", "bnpo", "dapo", "dr_grpo", "cispo"])
    cispo = loss_type == "cispo"
    options = {"temperature": generator.choice([0.5, 1.0, 1.7]), "vocabulary": generator.choice([13, 300, 5000])}
    if name not in ("TRL selective_log_softmax", "TRL fused head"):
        options |= {
            "loss_type": loss_type,
            "level": "token" if cispo else generator.choice(["token", "sequence"]),
            "beta": generator.choice([0.0, 0.04, 0.2]),
            "eps_low": generator.choice([0.1, 0.2]),
            "eps_high": generator.choice([0.6, 3.0]) if cispo else generator.choice([0.2, 0.4]),
            "delta": None if cispo else generator.choice([None, 1.15, 2.0]),
            "reduce": "triton" not in name or generator.random() < 0.5,
            "items": generator.choice([None, 17]),
            "old": generator.random() < 0.8,
            "vllm": generator.choice([None, (3,), (3, 1), (3, 4)]),
        }
    usual = {**DEFAULTS, "old": True, "vocabulary": 13, "vllm": None}
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if value != usual[key])
    return make_problem(generator.randrange(2**31), **options), shown, INNER_DELTA if options.get("delta") else ""


def changed(problem, **tensors):
    """``problem`` with some of its tensors replaced; numbers fill the tensor they replace."""
    filled = {
        name: value if isinstance(value, torch.Tensor) else torch.full_like(getattr(problem, name), value)
        for name, value in tensors.items()
    }
    return replace(problem, **filled)


def with_garbage(problem, *names):
    """NaN on the masked positions of the named tensors."""
    masked = torch.nn.functional.pad(problem.mask == 0, (0, 1))
    tensors = {name: getattr(problem, name).clone() for name in names}
    for tensor in tensors.values():
        tensor[masked[:, : tensor.shape[1]]] = torch.nan
    return changed(problem, **tensors)


def hard_cases():
    """(function, case, problem, tolerance, why the peer fails)"""
    triton, linear, trainer = "Liger triton_grpo_loss", "LigerFusedLinearGRPOLoss", "TRL GRPOTrainer loss"
    rows, head = "TRL selective_log_softmax", "TRL fused head"
    unpicked, tile = "0 * inf in the gradient of a ratio that overflowed", "inf - inf in the maximum over a first tile"
    luspo = {triton: "a token weighs length / L", linear: "the same, and padding counts", trainer: ""}
    for name in (triton, linear, trainer):
        overflow = changed(make_problem(1, beta=0.0), old=-200.0)
        yield name, "ratio overflows, clipped, A > 0", changed(overflow, advantages=1.0), None, unpicked
        yield name, "ratio overflows, A = 0", changed(overflow, advantages=0.0), None, "0 * inf in the loss"
        capped = changed(make_problem(1, beta=0.0, delta=2.0), old=-200.0, advantages=-1.0)
        yield name, "ratio overflows, delta caps it", capped, None, unpicked
        inner = changed(make_problem(6, beta=0.0, delta=1.05), advantages=-1.0)
        yield name, "delta inside the clip range, A < 0", inner, None, INNER_DELTA
        yield name, "luspo, padding", make_problem(3, loss_type="luspo"), None, luspo[name]
        yield name, "luspo, padding, sequence", make_problem(3, loss_type="luspo", level="sequence"), None, luspo[name]
        full = changed(make_problem(3, loss_type="luspo"), mask=1)
        yield name, "luspo, no padding", full, None, "its gradient reads past the end of a buffer"
        empty = make_problem(4)
        empty.mask[1] = 0
        yield name, "a sequence masked throughout", empty, None, ""
    for name in (triton, linear):
        dirty = with_garbage(make_problem(2), "hidden", "logits")
        yield name, "NaN on masked positions", dirty, None, "multiplies by the mask"
        dirty = with_garbage(make_problem(2, level="sequence"), "old")
        yield name, "NaN in masked old log-probs, sequence", dirty, None, "multiplies by the mask"
    yield triton, "first 2048 tokens ruled out (-inf)", make_problem(5, vocabulary=2060, closed=2048), None, tile
    yield linear, "first 4096 tokens ruled out (-inf)", make_problem(5, vocabulary=4110, closed=4096), None, tile
    yield head, "first tile of tokens ruled out (-inf)", make_problem(5, closed=4), None, tile
    for name in (rows, head):
        yield name, "3 of 13 tokens ruled out (-inf)", make_problem(5, closed=3), None, "0 * inf in the entropy"
    plain = make_problem(6)
    strided = torch.stack([plain.logits, plain.logits], dim=2)[:, :, 0]
    yield triton, "strided logits", changed(plain, logits=strided), None, "asserts contiguous logits"
    strided = torch.stack([plain.advantages, -plain.advantages], dim=1)[:, 0]
    yield triton, "strided advantages", changed(plain, advantages=strided), None, "reads them as if contiguous"
    with_z_loss = make_problem(6, inplace=True)
    yield triton, "a z-loss on the same logits, inplace=True", with_z_loss, None, "its backward overwrites the logits"
    near = make_problem(7, old=False, reduce=False, beta=1.0)
    near.ref = (own_log_probs(near) + 1e-3).float()
    yield triton, "KL of a policy 1e-3 away", near, 5e-3, "exp(x) - x - 1 cancels"
    yield linear, "beta = 0, no reference", make_problem(9, beta=0.0, ref_given=False), None, "asserts a reference"
    half = make_problem(8, batch=64, dtype=torch.bfloat16)
    yield linear, "64 sequences in bfloat16", half, 5e-3, "rounds logits and sums of gradients to bfloat16"
    half = make_problem(8, dtype=torch.bfloat16)
    yield rows, "bfloat16 logits", half, 5e-3, "computes in bfloat16 on the CPU"
    yield head, "bfloat16 head", half, 5e-3, "rounds logits to bfloat16"
    dirty = with_garbage(make_problem(2), "logits")
    yield rows, "NaN on masked rows", dirty, None, "multiplies by the mask on the CPU"
    yield rows, "an empty batch", make_problem(5, batch=0), None, "stacks an empty list on the CPU"


def error(result, expected):
    """The largest error of any tensor, relative to its largest value; inf where one is finite and the other is not."""
    worst = 0.0
    for name, tensor in result.items():
        wanted = expected[name]
        finite = wanted.isfinite()
        if not torch.equal(tensor.isfinite(), finite):
            return float("inf")
        if finite.any():
            scale = wanted[finite].abs().max().clamp(min=1e-6)
            worst = max(worst, ((tensor - wanted)[finite].abs().max() / scale).item())
    return worst


def attempt(run, function, problem, expected):
    """The error of a function, or the name of what it raised."""
    try:
        return error(run(function, problem), expected)
    except Exception as raised:
        return type(raised).__name__


def verdict(theirs, ours, tolerance):
    we_are_off, they_are_off = (isinstance(e, str) or not (e is None or e <= tolerance) for e in (ours, theirs))
    if we_are_off:
        return "BOTH ARE OFF" if they_are_off else "WE ARE OFF"
    if they_are_off:
        return "they refuse" if isinstance(theirs, str) else "they are off"
    return "agree" if theirs is not None else "not installed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12, help="random sets of options per function")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Triton reads it when the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore")
    offered, generator = functions(), random.Random(arguments.seed)
    cases = list(hard_cases())
    for name in offered:
        for _ in range(arguments.cases):
            problem, shown, why = random_case(generator, name)
            cases.append((name, shown, problem, None, why))
    cases.sort(key=lambda case: list(offered).index(case[0]))
    table = Table("function", "case", "theirs", "ours", "verdict", "why")
    verdicts = defaultdict(int)
    for name, case, problem, tolerance, why in cases:
        run_theirs, theirs, run_ours, ours, truth = offered[name]
        expected = truth(problem)
        their_error = None if theirs is None else attempt(run_theirs, theirs, problem, expected)
        our_error = attempt(run_ours, ours, problem, expected)
        outcome = verdict(their_error, our_error, tolerance or 2e-4)
        verdicts[outcome] += 1
        shown = [f"{e:.0e}" if isinstance(e, float) else str(e or "") for e in (their_error, our_error)]
        table.add_row(name, case, *shown, outcome, why if outcome.startswith("they") else "")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(verdicts.items())))
    return int(verdicts["WE ARE OFF"] + verdicts["BOTH ARE OFF"] > 0)


if __name__ == "__main__":
    sys.exit(main())
