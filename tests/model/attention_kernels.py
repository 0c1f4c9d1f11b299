"""Stand-ins for the kernels of packed attention, with the signatures of the real ones, for any device and type."""

import sys
from functools import wraps
from itertools import pairwise
from types import ModuleType

import torch

from fastcorl.model import backends, flex
from fastcorl.model.prefix_attention import PlainKernel, Segments

PLAIN = PlainKernel()


def attended(query, key, value, bounds, scale, causal):
    """Attention by its formula, one sequence at a time: (N, heads, D) states -> (N, heads, D)."""
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        logits = q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        if causal:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, float("-inf"))
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def grouped(query, states):
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def check(query, key, bounds, other_bounds, longest, other_longest):
    assert bounds.dtype == torch.int32 and bounds is other_bounds
    assert longest == other_longest and longest >= bounds.diff().max()
    assert query.shape[0] == key.shape[0] == bounds[-1]


def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
               return_attn_probs=False, block_table=None):  # fmt: skip
    check(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attended(q, grouped(q, k), grouped(q, v), cu_seqlens_q, softmax_scale, causal)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return attended(query, key, value, cu_seq_q, None, is_causal)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
    check(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape == key.shape == value.shape
    return attended(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    check(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa or query.shape == key.shape
    key, value = grouped(query, key), grouped(query, value)
    return attended(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


class BlockDiagonalCausalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert kv_seqlen is None and all(isinstance(length, int) and length > 0 for length in q_seqlen)
        mask = cls()
        mask.bounds = torch.tensor([0, *q_seqlen], device=device).cumsum(0)
        return mask


def xformers(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """(1, N, heads, D) each."""
    assert isinstance(attn_bias, BlockDiagonalCausalMask)
    assert query.shape == key.shape == value.shape and query.shape[:2] == (1, attn_bias.bounds[-1])
    return attended(query[0], key[0], value[0], attn_bias.bounds, scale, causal=True)[None]


def segments_of(query, key, cu_queries, cu_keys, longest_queries, longest_keys):
    for states, bounds, longest in ((query, cu_queries, longest_queries), (key, cu_keys, longest_keys)):
        assert bounds.dtype == torch.int32 and bounds[-1] == len(states)
        assert longest >= max(2, bounds.diff().max())  # at 1 the kernels take their path for decoding
    return Segments(cu_queries, cu_keys, longest_queries, longest_keys)


def aten_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                 scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    assert dropout_p == 0.0 and not return_debug_mask
    segments = segments_of(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    with torch.no_grad():
        results = PLAIN.forward(query, key, value, segments, scale, is_causal)
    return *results, torch.zeros(2), torch.empty(0), torch.empty(0)


def aten_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                  is_causal, rng_state, unused, *, scale=None, window_size_left=None,
                  window_size_right=None):  # fmt: skip
    assert dropout_p == 0.0 and rng_state.dtype == torch.uint64 and grad_out.is_contiguous()
    assert logsumexp.is_contiguous() and logsumexp.shape == (query.shape[1], query.shape[0])
    segments = segments_of(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    return PLAIN.backward(grad_out, query, key, value, out, logsumexp, segments, scale, is_causal)


def flash_attn_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                       causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
                       return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
                       zero_tensors=False):  # fmt: skip
    assert dropout_p == 0.0 and window_size_left == window_size_right == -1 and softcap == 0.0
    segments = segments_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *PLAIN.forward(q, k, v, segments, softmax_scale, causal), torch.empty(0), torch.zeros(2)


def flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, deterministic, rng_state=None, zero_tensors=False):  # fmt: skip
    assert dropout_p == 0.0 and window_size_left == window_size_right == -1 and softcap == 0.0
    segments = segments_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gradients = PLAIN.backward(dout, q, k, v, out, softmax_lse, segments, softmax_scale, causal)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)
    return torch.empty(0)


def flex_attention(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False,
                   kernel_options=None, *, return_aux=None):  # fmt: skip
    """Sees what the kernel would: blocks that are listed as full, and in those that are listed otherwise what the mask
    says."""
    assert enable_gqa or query.shape == key.shape
    size, block = query.shape[2], block_mask.BLOCK_SIZE[0]
    blocks = -(-size // block)
    listed = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    for kind, counts, columns in (
        (0, block_mask.kv_num_blocks, block_mask.kv_indices),
        (1, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        for row in range(blocks):
            listed[kind, row, columns[0, 0, row, : counts[0, 0, row]].long()] = True
    masked, full = listed.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :size, :size]
    rows, columns = torch.arange(size)[:, None], torch.arange(size)
    seen = full | (masked & block_mask.mask_mod(0, 0, rows, columns))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)


def broken(problem):
    def function(*args, **options):
        raise problem

    return function


no_segments = broken(RuntimeError("no segments"))


class Installed:
    """What is importable, and how often each public function was called since; nothing is until it is added."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = {"flash_attn": 0, "xformers": 0, "torch": 0, "flex": 0}
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", broken(RuntimeError("no torch kernel")))
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", broken(NotImplementedError("no aten kernel")))
        monkeypatch.setattr(flex, "flex_attention", broken(RuntimeError("no compiler")))
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setitem(sys.modules, "xformers", None)

    def flash_attn(self, function, forward=no_segments, backward=None):
        package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
        package.flash_attn_varlen_func = self._counted("flash_attn", function)
        package.flash_attn_interface = interface
        interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward
        self.monkeypatch.setitem(sys.modules, "flash_attn", package)

    def xformers(self, function):
        modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
        modules["xformers.ops.fmha.attn_bias"] = ModuleType("xformers.ops.fmha.attn_bias")
        modules["xformers.ops"].memory_efficient_attention = self._counted("xformers", function)
        modules["xformers.ops.fmha.attn_bias"].BlockDiagonalCausalMask = BlockDiagonalCausalMask
        for name, module in modules.items():
            self.monkeypatch.setitem(sys.modules, name, module)

    def torch(self, function):
        self.monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", self._counted("torch", function))

    def aten(self, forward=aten_forward, backward=aten_backward):
        self.monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
        self.monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)

    def flex(self, function=flex_attention):
        self.monkeypatch.setattr(flex, "flex_attention", lambda: self._counted("flex", function))

    def everything(self):
        self.flash_attn(flash_attn, flash_attn_forward, flash_attn_backward)
        self.xformers(xformers)
        self.torch(torch_2_12)
        self.aten()
        self.flex()

    def _counted(self, name, function):
        @wraps(function)  # also its signature
        def counted(*args, **options):
            self.calls[name] += 1
            return function(*args, **options)

        return counted


def install(monkeypatch, dtype=torch.float32):
    """Let packs of this type on the CPU take the way of half precision on CUDA."""
    monkeypatch.setattr(backends, "DEVICE", "cpu")
    monkeypatch.setattr(backends, "DTYPES", (dtype,))
    return Installed(monkeypatch)
