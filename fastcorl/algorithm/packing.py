"""From a rollout with advantages to packed micro-batches of both modalities."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastcorl.errors import UserError
from fastcorl.records import LossRows, PackedBatch, Rollout


@dataclass(frozen=True)
class PackOptions:
    """`tokens`: most positions in a micro-batch. `guided`: the policy includes guidance, so each drawing brings its
    unconditional twin. `image_shift`: read image log-probs one position too late, as the public code does.
    `share_prefix`: a prompt stands in a pack once, for all the rows of its group that are in it."""

    tokens: int
    guided: bool = False
    image_shift: bool = False
    share_prefix: bool = True


@dataclass
class _Sequence:
    """One sampled sequence: prompt and completion ids, without the last token, which predicts nothing."""

    row: int
    is_image: bool
    prompt: list[int]
    completion: list[int]
    inputs: list[int]  # completion tokens that are fed
    uncond_prompt: list[int] | None = None

    @property
    def num_tokens(self) -> int:
        length = len(self.prompt) + len(self.inputs)
        return 2 * length if self.uncond_prompt else length


class Packer:
    """Splits a rollout into micro-batches of at most `options.tokens` positions, of nearly equal size."""

    def __init__(self, rollout: Rollout, options: PackOptions):
        self.rollout, self.options = rollout, options
        self.sequences = _sequences(rollout, options)
        self.bins = assign([sequence.num_tokens for sequence in self.sequences], options.tokens)

    def pack(self, advantages: torch.Tensor, *, min_micro_batches: int = 1) -> list[PackedBatch]:
        """
        Args:
            advantages: (n,) float32, one per row; drawing and answer of a row share it.
            min_micro_batches: other ranks may need more micro-batches than this one; all must run the same number.
        """
        bins = self.bins
        if min_micro_batches > len(bins):
            lengths = [sequence.num_tokens for sequence in self.sequences]
            bins = assign(lengths, self.options.tokens, min_micro_batches)
        return [_pack([self.sequences[i] for i in chosen], self.rollout, advantages, self.options) for chosen in bins]


def pack_rollout(
    rollout: Rollout,
    advantages: torch.Tensor,
    options: PackOptions,
    *,
    min_micro_batches: int = 1,
) -> list[PackedBatch]:
    """The micro-batches of a rollout; see `Packer`."""
    return Packer(rollout, options).pack(advantages, min_micro_batches=min_micro_batches)


def count_micro_batches(rollout: Rollout, options: PackOptions) -> int:
    """How many micro-batches `pack_rollout` makes of this rollout on its own."""
    return len(Packer(rollout, options).bins)


def assign(lengths: list[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """Indices of `lengths` in the fewest bins (at least `min_bins`) that longest-first balancing needs.

    Each bin's indices are in ascending order, so that a pack keeps the rollout's order.
    """
    if max(lengths) > capacity:
        raise UserError(f"packing.tokens is {capacity}, but one sequence has {max(lengths)} tokens; raise it")
    count = max(min_bins, -(-sum(lengths) // capacity))
    if count > len(lengths):
        raise UserError(f"{count} micro-batches for {len(lengths)} sequences: raise packing.tokens or prompts_per_step")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        loads, bins = [0] * count, [[] for _ in range(count)]
        for index in order:
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[index]
            bins[lightest].append(index)
        if max(loads) <= capacity:
            return [sorted(chosen) for chosen in bins]
        count += 1


def _sequences(rollout: Rollout, options: PackOptions) -> list[_Sequence]:
    sequences = []
    if rollout.images:
        for row, codes in enumerate(rollout.images.tokens.tolist()):
            prompt = row // rollout.group_size
            inputs = codes if options.image_shift else codes[:-1]
            twin = rollout.uncond_ids[prompt] if options.guided else None
            sequences.append(_Sequence(row, True, rollout.draw_ids[prompt], codes, inputs, twin))
    if rollout.texts:
        lengths = rollout.texts.lengths.tolist()
        for row, tokens in enumerate(rollout.texts.tokens.tolist()):
            answer = tokens[: lengths[row]]
            if not answer:  # none of its tokens is trained on
                continue
            sequences.append(_Sequence(row, False, rollout.ask_ids[row // rollout.group_size], answer, answer[:-1]))
    return sequences


class _RowCollector:
    """Gathers the loss rows of one modality."""

    def __init__(self):
        self.positions: list[int] = []
        self.uncond_positions: list[int] = []
        self.targets: list[int] = []
        self.lengths: list[int] = []
        self.rows: list[int] = []

    def build(
        self, advantages: torch.Tensor, sampled: torch.Tensor, external: torch.Tensor | None, device: torch.device
    ) -> LossRows | None:
        """`sampled` (n, L) are the captured log-probs of the modality, `external` (n,) marks rows of the data."""
        if not self.rows:
            return None
        captured = [sampled[row, :length] for row, length in zip(self.rows, self.lengths, strict=True)]
        return LossRows(
            positions=torch.tensor(self.positions, device=device),
            targets=torch.tensor(self.targets, device=device),
            cu_seqlens=F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int().to(device),
            advantages=advantages[torch.tensor(self.rows, device=advantages.device)].to(device),
            sampled_log_probs=torch.cat(captured).to(device),
            uncond_positions=torch.tensor(self.uncond_positions, device=device) if self.uncond_positions else None,
            external=None if external is None else external[self.rows].to(device),
        )


class _PackBuilder:
    """Lays out the positions of one pack."""

    def __init__(self, rollout: Rollout, *, share_prefix: bool):
        self.rollout = rollout
        self.share_prefix = share_prefix
        self.token_ids: list[int] = []
        self.is_code: list[bool] = []
        self.position_ids: list[int] = []
        self.bounds = [0]
        self.prefixes: list[int] = []
        self.vision_positions: list[int] = []
        self.vision_rows: list[int] = []
        self.placed: dict[tuple[str, int], int] = {}  # prompts that stand in the pack: their sequence

    def place(self, kind: str, prompt_index: int, prompt: list[int], inputs: list[int]) -> list[int]:
        """Place a prompt (once, if prefixes are shared) and what follows it. `kind` is draw, uncond or ask.

        Returns the positions from the prompt's last one on: entry j predicts the completion's token j.
        """
        sequence = self.placed.get((kind, prompt_index)) if self.share_prefix else None
        if sequence is None:
            sequence = self._begin(-1)
            start = self._append(prompt, code=False, first_position=0)
            if kind == "ask":
                self._place_image(start + prompt.index(self.rollout.image_token_id), prompt_index)
            self.placed[kind, prompt_index] = sequence
            last = len(self.token_ids) - 1
            if self.share_prefix and inputs:
                self._begin(sequence)
        else:
            last = self.bounds[sequence + 1] - 1
            if inputs:
                self._begin(sequence)
        start = self._append(inputs, code=kind != "ask", first_position=len(prompt))
        return [last, *range(start, start + len(inputs))]

    def _begin(self, prefix: int) -> int:
        """Open a sequence and return its number."""
        self.prefixes.append(prefix)
        self.bounds.append(self.bounds[-1])
        return len(self.prefixes) - 1

    def _append(self, ids: list[int], *, code: bool, first_position: int) -> int:
        start = len(self.token_ids)
        self.token_ids += ids
        self.is_code += [code] * len(ids)
        self.position_ids += range(first_position, first_position + len(ids))
        self.bounds[-1] += len(ids)
        return start

    def _place_image(self, start: int, prompt_index: int) -> None:
        count = self.rollout.vision_features.shape[1]
        self.vision_positions += range(start, start + count)
        self.vision_rows += range(prompt_index * count, (prompt_index + 1) * count)

    def build(self, image: LossRows | None, text: LossRows | None, device: torch.device) -> PackedBatch:
        features = self.rollout.vision_features
        return PackedBatch(
            token_ids=torch.tensor(self.token_ids, device=device),
            is_image_code=torch.tensor(self.is_code, device=device),
            position_ids=torch.tensor(self.position_ids, device=device),
            cu_seqlens=torch.tensor(self.bounds, dtype=torch.int32, device=device),
            vision_positions=torch.tensor(self.vision_positions, dtype=torch.int64, device=device),
            vision_rows=torch.tensor(self.vision_rows, dtype=torch.int64, device=device),
            vision_features=features.flatten(0, 1) if features is not None else None,
            image=image,
            text=text,
            prefixes=torch.tensor(self.prefixes, device=device) if self.share_prefix else None,
        )


def _pack(sequences: list[_Sequence], rollout: Rollout, advantages: torch.Tensor, options: PackOptions) -> PackedBatch:
    builder = _PackBuilder(rollout, share_prefix=options.share_prefix)
    images, texts = _RowCollector(), _RowCollector()
    for sequence in sequences:
        rows, count = (images if sequence.is_image else texts), len(sequence.completion)
        prompt_index = sequence.row // rollout.group_size
        shift = int(options.image_shift and sequence.is_image)
        kind = "draw" if sequence.is_image else "ask"
        rows.positions += builder.place(kind, prompt_index, sequence.prompt, sequence.inputs)[shift : shift + count]
        rows.targets += sequence.completion
        rows.lengths.append(count)
        rows.rows.append(sequence.row)
        if sequence.uncond_prompt:
            positions = builder.place("uncond", prompt_index, sequence.uncond_prompt, sequence.inputs)
            rows.uncond_positions += positions[shift : shift + count]
    device = advantages.device
    # The captured log-probs of the distribution that is trained.
    drawn = rollout.images and (rollout.images.log_probs if options.guided else rollout.images.cond_log_probs)
    external = rollout.external_rows() if rollout.num_external else None
    return builder.build(
        images.build(advantages, drawn, external, device) if rollout.images else None,
        texts.build(advantages, rollout.texts.log_probs, external, device) if rollout.texts else None,
        device,
    )
