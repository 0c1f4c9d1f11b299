"""The policy: a unified model whose backbone runs on packed positions and whose two heads are read separately."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import JanusForConditionalGeneration, ProcessorMixin

from fastcorl.model.adapters import adapted_layers, add_adapters, without_adapters
from fastcorl.model.attention import AttentionContext, PackedAttention
from fastcorl.model.projections import lay_side_by_side
from fastcorl.model.prompts import PromptEncoder
from fastcorl.records import PackedBatch


class Policy(nn.Module):
    """Janus seen as: embeddings -> backbone -> hidden states -> text head or image head.

    Trained parts are the language backbone with its embedding and the text head, or the backbone's adapters if it has
    any; vision tower, aligners, VQ model, generation embedding and generation head are frozen, as in the public code.
    `attention_backend` computes the attention of packs (`backends.NAMES`).
    """

    def __init__(
        self,
        janus: JanusForConditionalGeneration,
        processor: ProcessorMixin,
        encoder: PromptEncoder,
        *,
        attention_backend: str = "auto",
    ):
        super().__init__()
        self.janus = janus
        self.processor = processor
        self.encoder = encoder
        self.attention_backend = attention_backend
        self.freeze()

    def freeze(self) -> None:
        """Set `requires_grad` of every parameter to what CoRL trains."""
        self.janus.requires_grad_(False)
        for _, parameter in self.trained_parameters():
            parameter.requires_grad_(True)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What CoRL trains, by name, whether it requires a gradient at present or not."""
        adapters = self.has_adapters
        for name, parameter in self.named_parameters():
            if ".lora_" in name if adapters else name.startswith(("janus.model.language_model.", "janus.lm_head.")):
                yield name, parameter

    def add_adapters(self, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
        """Train LoRA adapters on `targets` of the backbone from now on, and nothing else."""
        add_adapters(self.backbone, rank=rank, alpha=alpha, targets=targets)
        self.freeze()

    @property
    def has_adapters(self) -> bool:
        return bool(adapted_layers(self.backbone))

    def without_adapters(self) -> AbstractContextManager[None]:
        """A block in which the policy is what it was before it got adapters."""
        return without_adapters(self.backbone)

    def lay_out(self) -> None:
        """Lay the weights that sampling reads as one side by side. Afterwards nothing may move the parameters."""
        lay_side_by_side(self.backbone)

    def recompute(self, blocks: int) -> None:
        """Have backward run the first `blocks` blocks again, in place of keeping what they computed.

        The first, since backward comes to them when it has freed what the others kept.
        """
        # transformers' own switch has another name in each of its versions.
        run_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
        for index, layer in enumerate(self.backbone.layers):
            layer._gradient_checkpointing_func = run_again
            # The second flag stands for train mode, which nothing is ever put in; it reaches no module in the block.
            layer.gradient_checkpointing = layer.training = index < blocks

    @property
    def backbone(self) -> nn.Module:
        return self.janus.model.language_model

    @property
    def text_head(self) -> nn.Linear:
        return self.janus.lm_head

    @property
    def image_head(self) -> nn.Linear:
        return self.janus.model.generation_head.vision_head

    @property
    def num_image_tokens(self) -> int:
        """Codes of one drawing."""
        return self.janus.config.vq_config.num_patches**2

    @property
    def image_size(self) -> int:
        return self.janus.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        return self.text_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm.weight.dtype

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) text ids -> (..., hidden)."""
        return self.backbone.embed_tokens(ids)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """(...) image codes -> (..., hidden)."""
        return self.janus.prepare_embeddings_for_image_generation(codes)

    @property
    def num_codes(self) -> int:
        return self.janus.model.generation_embeddings.num_embeddings

    def code_parameters(self) -> list[nn.Parameter]:
        """What `embed_codes` depends on; frozen."""
        model = self.janus.model
        return [*model.generation_embeddings.parameters(), *model.generation_aligner.parameters()]

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """(N, hidden) input embeddings of a pack."""
        code_positions = batch.code_positions
        embeds = self.embed_text(batch.token_ids.index_fill(0, code_positions, self.encoder.pad_id))
        # Also without any code: under ZeRO 3 every rank must call the same modules.
        codes = self.embed_codes(batch.token_ids.index_select(0, code_positions))
        embeds = embeds.index_copy(0, code_positions, codes.to(embeds.dtype))
        if len(batch.vision_positions):
            features = batch.vision_features.index_select(0, batch.vision_rows)
            embeds = embeds.index_copy(0, batch.vision_positions, features.to(embeds.dtype))
        return embeds

    def run_backbone(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, attention: AttentionContext
    ) -> torch.Tensor:
        """(B, L, hidden) embeddings at (B, L) positions -> (B, L, hidden) final hidden states."""
        return self.backbone(
            inputs_embeds=embeds, position_ids=position_ids, use_cache=False, attention=attention
        ).last_hidden_state

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """(N, hidden) final hidden states of a pack."""
        device, backend = batch.token_ids.device, self.attention_backend
        attention = PackedAttention(batch.cu_seqlens, batch.prefixes, device=device, backend=backend)
        return self.run_backbone(self.embed(batch).unsqueeze(0), batch.position_ids.unsqueeze(0), attention).squeeze(0)

    def image_head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """The generation head up to its last, linear layer: `image_head` of this gives the code logits.

        Guidance is linear in logits, so it may be applied to this vector instead: W(u + w(c - u)) + b.
        """
        head = self.janus.model.generation_head
        return head.activation_fn(head.proj_out(hidden))

    def preprocess(self, images: list[Image]) -> torch.Tensor:
        """Normalised (n, 3, H, W) input of the vision tower."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels).to(self.device, self.dtype)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) pixels in [0, 1], of any size -> input of the vision tower."""
        processor = self.processor.image_processor
        if pixels.shape[-1] != self.image_size:
            pixels = F.interpolate(pixels, size=(self.image_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        return ((pixels.to(self.device) - mean) / std).to(self.dtype)

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised (n, 3, H, W) -> (n, T_vision, hidden), aligned with the text embeddings."""
        with torch.no_grad():
            return self.janus.model.get_image_features(pixel_values, return_dict=True).pooler_output

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) in [0, 1], of the size that `decode_images` gives -> (n, T) codes."""
        vq = self.janus.model.vqmodel
        codebook = vq.quantize.embedding.weight
        with torch.no_grad():
            latents = vq.quant_conv(vq.encoder((pixels * 2 - 1).to(self.device, codebook.dtype)))
            # Janus compares directions; transformers' own `encode` does not normalise and picks other codes.
            latents = F.normalize(latents.flatten(2).transpose(1, 2).float(), dim=-1)
            return (latents @ F.normalize(codebook.float(), dim=-1).t()).argmax(-1)

    def decode_images(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, T) codes -> (n, 3, H, W) float32 in [0, 1]."""
        with torch.no_grad():
            pixels = self.janus.decode_image_tokens(codes)
        return (pixels.permute(0, 3, 1, 2).float() / 2 + 0.5).clamp(0, 1)


def pack_prompts(
    prompts: list[list[int]], vision_features: torch.Tensor | None, image_id: int, device: torch.device
) -> PackedBatch:
    """Prompts of text ids behind one another; placeholders are filled from `vision_features` in order of appearance."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    token_ids = torch.tensor([token for ids in prompts for token in ids], device=device)
    placeholders = (token_ids == image_id).nonzero().squeeze(-1)
    features = vision_features.flatten(0, 1) if vision_features is not None else None
    num_features = 0 if features is None else len(features)
    if len(placeholders) != num_features:
        raise ValueError(f"the prompts have {len(placeholders)} image placeholders for {num_features} image features")
    return PackedBatch(
        token_ids=token_ids,
        code_positions=token_ids.new_empty(0),
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        vision_positions=placeholders,
        vision_rows=torch.arange(len(placeholders), device=device),
        vision_features=features,
        image=None,
        text=None,
    )
