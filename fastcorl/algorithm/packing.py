"""From a rollout to packed micro-batches of both modalities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from fastcorl.algorithm.assignment import assign, balance
from fastcorl.algorithm.sequences import Ranks, SampledSequence, exchange, sampled_sequences
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


class Packer:
    """Splits a rollout into the fewest micro-batches of at most `options.tokens` positions, of nearly equal size.

    A group stays together, so that its prompt is computed once; where it is cut, the prompt stands in both parts.
    """

    def __init__(self, rollout: Rollout, options: PackOptions):
        self.rollout, self.options = rollout, options
        self.sequences = sampled_sequences(rollout, guided=options.guided, image_shift=options.image_shift)
        self.costs = [sequence.cost(share_prefix=options.share_prefix) for sequence in self.sequences]

    def pack(self, *, min_micro_batches: int = 1) -> list[PackedBatch]:
        """The micro-batches of this rollout on its own, without advantages."""
        runs = assign(self.costs, self.options.tokens, min_micro_batches)
        return [self._pack(self.sequences[run], self.rollout.vision_features) for run in runs]

    def pack_with(self, ranks: Ranks) -> list[PackedBatch]:
        """The micro-batches of this rank, as many as every other has, without advantages; a collective call.

        Where answers are longer on some ranks than on others, sequences move between them, so that all have about as
        many positions. `LossRows.rows` count the rows of all ranks, rank after rank.
        """
        costs, num_rows = zip(*ranks.gather((self.costs, self.rollout.num_rows)), strict=True)
        first_row = sum(num_rows[: ranks.rank])
        sequences = [replace(sequence, row=first_row + sequence.row) for sequence in self.sequences]
        features = self.rollout.vision_features
        shares = balance(costs, self.options.tokens)
        owned = [range(*ends) for ends in pairwise(accumulate(map(len, costs), initial=0))]
        wanted = [range(share[0].start, share[-1].stop) for share in shares]
        if owned != wanted:
            sequences, features = exchange(sequences, self.rollout, owned, wanted, ranks)
        start = wanted[ranks.rank].start
        return [self._pack(sequences[run.start - start : run.stop - start], features) for run in shares[ranks.rank]]

    def _pack(self, sequences: Sequence[SampledSequence], features: torch.Tensor | None) -> PackedBatch:
        options = self.options
        builder = _PackBuilder(self.rollout.image_token_id, features, share_prefix=options.share_prefix)
        collectors = {"draw": _RowCollector(), "ask": _RowCollector()}
        for sequence in sequences:
            rows, count, index = collectors[sequence.kind], len(sequence.completion), sequence.prompt_index
            shift = int(options.image_shift and sequence.is_image)
            placed = builder.place(sequence.kind, index, sequence.prompt, sequence.inputs)
            rows.positions += placed[shift : shift + count]
            rows.sequences.append(sequence)
            if sequence.uncond_prompt:
                placed = builder.place("uncond", index, sequence.uncond_prompt, sequence.inputs)
                rows.uncond_positions += placed[shift : shift + count]
        device = self.rollout.device
        return builder.build(*(rows.build(device) for rows in collectors.values()), device)


def set_advantages(batches: Sequence[PackedBatch], advantages: torch.Tensor) -> None:
    """Gives each sequence the advantage of its row, of (n,) float32; drawing and answer of a row share it."""
    for rows in (rows for batch in batches for rows in (batch.image, batch.text) if rows is not None):
        rows.advantages = advantages[rows.rows]


def pack_rollout(
    rollout: Rollout,
    advantages: torch.Tensor,
    options: PackOptions,
    *,
    min_micro_batches: int = 1,
) -> list[PackedBatch]:
    """The micro-batches of a rollout on one rank, with (n,) float32 advantages; see `Packer`."""
    batches = Packer(rollout, options).pack(min_micro_batches=min_micro_batches)
    set_advantages(batches, advantages)
    return batches


class _RowCollector:
    """Gathers the loss rows of one modality."""

    def __init__(self):
        self.positions: list[int] = []
        self.uncond_positions: list[int] = []
        self.sequences: list[SampledSequence] = []

    def build(self, device: torch.device) -> LossRows | None:
        if not self.sequences:
            return None
        lengths = torch.tensor([len(sequence.completion) for sequence in self.sequences])
        targets = [token for sequence in self.sequences for token in sequence.completion]
        external = [sequence.external for sequence in self.sequences]
        return LossRows(
            positions=torch.tensor(self.positions, device=device),
            targets=torch.tensor(targets, device=device),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int().to(device),
            rows=torch.tensor([sequence.row for sequence in self.sequences], device=device),
            sampled_log_probs=torch.cat([sequence.log_probs for sequence in self.sequences]),
            uncond_positions=torch.tensor(self.uncond_positions, device=device) if self.uncond_positions else None,
            external=torch.tensor(external, device=device) if any(external) else None,
        )


class _PackBuilder:
    """Lays out the positions of one pack."""

    def __init__(self, image_token_id: int, features: torch.Tensor | None, *, share_prefix: bool):
        self.image_token_id, self.features = image_token_id, features
        self.share_prefix = share_prefix
        self.token_ids: list[int] = []
        self.code_positions: list[int] = []
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
                self._place_image(start + prompt.index(self.image_token_id), prompt_index)
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
        if code:
            self.code_positions += range(start, start + len(ids))
        self.position_ids += range(first_position, first_position + len(ids))
        self.bounds[-1] += len(ids)
        return start

    def _place_image(self, start: int, prompt_index: int) -> None:
        count = self.features.shape[1]
        self.vision_positions += range(start, start + count)
        self.vision_rows += range(prompt_index * count, (prompt_index + 1) * count)

    def build(self, image: LossRows | None, text: LossRows | None, device: torch.device) -> PackedBatch:
        features = self.features
        return PackedBatch(
            token_ids=torch.tensor(self.token_ids, device=device),
            code_positions=torch.tensor(self.code_positions, dtype=torch.int64, device=device),
            position_ids=torch.tensor(self.position_ids, device=device),
            cu_seqlens=torch.tensor(self.bounds, dtype=torch.int32),
            vision_positions=torch.tensor(self.vision_positions, dtype=torch.int64, device=device),
            vision_rows=torch.tensor(self.vision_rows, dtype=torch.int64, device=device),
            vision_features=features.flatten(0, 1) if features is not None else None,
            image=image,
            text=text,
            prefixes=torch.tensor(self.prefixes) if self.share_prefix else None,
        )
