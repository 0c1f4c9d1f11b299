"""Caption similarity by embeddings of a BERT-like model: BERTScore (Zhang et al. 2020) and the cosine of sentences.

Both are callables `(references, candidates) -> scores`, NaN for a reference without words. Each distinct sentence is
embedded once per call, in float32; sentences beyond the model's limit are cut, their end token stays.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from fastcorl.errors import UserError
from fastcorl.rewards.checkpoints import load_model, loading

# The layers that bert_score's authors found to agree best with human judgement, by the last part of a model's name.
BEST_LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilroberta-base": 5,
    "distilbert-base-uncased": 5,
    "albert-base-v2": 9,
    "albert-xxlarge-v2": 8,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
    "electra-base-discriminator": 9,
    "deberta-base-mnli": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "deberta-v2-xlarge-mnli": 17,
    "deberta-v2-xxlarge-mnli": 22,
    "mpnet-base": 8,
}


class TokenStates(NamedTuple):
    """A batch of b sentences, right-padded to L tokens."""

    indices: list[int]  # which sentences these are
    states: torch.Tensor  # (b, L, D) float32
    tokens: torch.Tensor  # (b, L) bool: not padding
    words: torch.Tensor  # (b, L) bool: neither padding nor the begin and end that the tokenizer adds


class TokenEncoder:
    """Hidden states of sentences, in batches of like length."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, batch_size: int = 64) -> None:
        """`layer` indexes the model's hidden states: 0 is its embeddings, -1 the last layer."""
        self.model, self.tokenizer = model, tokenizer
        self.layer, self.batch_size = layer, batch_size
        self.limit = min(tokenizer.model_max_length, max_tokens(model))

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Iterator[TokenStates]:
        """Every sentence once, the shortest first."""
        if not sentences:
            return
        names = ("input_ids", "attention_mask", "special_tokens_mask")
        settings = {"truncation": True, "max_length": self.limit} if self.limit < 1_000_000 else {}
        encoded = self.tokenizer(sentences, return_special_tokens_mask=True, **settings)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(sentences)), key=lengths.__getitem__)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {name: [encoded[name][i] for i in indices] for name in names}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            ids, tokens, special = (batch[name] for name in names)
            output = self.model(ids, attention_mask=tokens, output_hidden_states=True)
            tokens = tokens.bool()
            yield TokenStates(indices, output.hidden_states[self.layer], tokens, tokens & ~special.bool())


class BertScore:
    """F1 of BERTScore, without idf weights and without rescaling by a baseline.

    Tokens match greedily by cosine; the begin and end tokens take no part. As in torchmetrics, a token that is unlike
    all of the other sentence's counts 0, not less, and a candidate without words scores 0.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        path: str | Path,
        layer: int | None = None,
        device: torch.device | str = "cpu",
        *,
        batch_size: int = 64,
    ) -> None:
        """Load a BERT-like checkpoint, a folder or hub name.

        Args:
            layer: index of the hidden states that are compared, 0 for the embeddings. None is the published best layer
                where the last part of `path` is a name in `BEST_LAYERS` (roberta-large, bert-base-uncased, ..), and the
                last layer of any other model. Layers above it are not run, but for one.
            batch_size: sentences, and pairs, per pass.

        Raises:
            UserError: where there is no such model, or no such layer in it.
        """
        with loading("rewards.bert", path) as name:
            total = _num_layers(name)
            self.layer = BEST_LAYERS.get(Path(path).name, total) if layer is None else layer
            if not 0 <= self.layer <= total:
                raise UserError(
                    f"rewards.bert_layer: {self.layer} is no layer of {str(path)!r}; give one from 0 to {total}"
                )
            # One layer more than is read: some models normalise what leaves the last layer.
            model, tokenizer = _load(name, num_hidden_layers=min(self.layer + 1, total))
        self.encoder = TokenEncoder(model.to(device), tokenizer, self.layer, batch_size)

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        pairs = list(zip(references, candidates, strict=True))
        sentences = list(dict.fromkeys([*references, *candidates]))
        embedded: dict[str, torch.Tensor] = {}
        for batch in self.encoder(sentences):
            states = normalize(batch.states, dim=-1)
            for row, index in enumerate(batch.indices):
                embedded[sentences[index]] = states[row][batch.words[row]]
        scores: list[float] = []
        for start in range(0, len(pairs), self.encoder.batch_size):
            some = pairs[start : start + self.encoder.batch_size]
            scores += greedy_f1([embedded[r] for r, _ in some], [embedded[c] for _, c in some]).tolist()
        return scores


def greedy_f1(references: list[torch.Tensor], candidates: list[torch.Tensor]) -> torch.Tensor:
    """BERTScore's F1 of b pairs of unit token vectors, each (tokens, D) -> (b,) float32 in [0, 1]."""
    lengths = torch.tensor(
        [[len(c), len(r)] for c, r in zip(candidates, references, strict=True)], device=references[0].device
    )
    # Padding is 0, so its cosines are the floor of 0 and add nothing to the sums.
    cosine = pad_sequence(candidates, batch_first=True) @ pad_sequence(references, batch_first=True).mT
    if not cosine.numel():
        best = lengths.new_zeros(lengths.shape, dtype=torch.float32)
    else:
        best = torch.stack([cosine.amax(dim=dim).clamp(min=0).sum(dim=1) for dim in (2, 1)], dim=1)
    precision, recall = (best / lengths.clamp(min=1)).unbind(dim=1)
    total = precision + recall
    f1 = torch.where(total == 0, 0, 2 * precision * recall / total).clamp(max=1)
    return f1.masked_fill(lengths[:, 1] == 0, math.nan)


class SentenceSimilarity:
    """Cosine of sentence embeddings.

    Tokens are pooled as the checkpoint's sentence-transformers files say, by mean or first token; without such files by
    mean, begin and end included. A candidate without words is a sentence like any other.
    """

    range = (-1.0, 1.0)

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, batch_size: int = 64) -> None:
        """Load a sentence encoder, a folder or hub name. Raises UserError where there is none or it needs more than
        pooling."""
        with loading("rewards.sentence_encoder", path) as name:
            _num_layers(name)
            self.pooling, limit = _pooling(name)
            model, tokenizer = _load(name)
        self.encoder = TokenEncoder(model.to(device), tokenizer, -1, batch_size)
        self.encoder.limit = min(self.encoder.limit, limit)

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        pairs = list(zip(references, candidates, strict=True))
        sentences = list(dict.fromkeys([*references, *candidates]))
        embedded: dict[str, torch.Tensor] = {}
        empty: set[str] = set()
        for batch in self.encoder(sentences):
            if self.pooling == "mean":
                mask = batch.tokens[..., None]
                pooled = batch.states.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)
            else:
                pooled = batch.states[:, 0]
            unit = normalize(pooled, dim=-1)
            for row, index in enumerate(batch.indices):
                embedded[sentences[index]] = unit[row]
            empty |= {sentences[batch.indices[row]] for row in (~batch.words.any(dim=1)).nonzero().flatten().tolist()}
        if not pairs:
            return []
        cosine = (torch.stack([embedded[r] for r, _ in pairs]) * torch.stack([embedded[c] for _, c in pairs])).sum(-1)
        values = cosine.clamp(-1, 1).tolist()
        return [math.nan if reference in empty else value for (reference, _), value in zip(pairs, values, strict=True)]


def max_tokens(model: nn.Module) -> int:
    """Longest input of a model with position embeddings; RoBERTa's begin behind the padding's index."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    return limit


def _num_layers(name: str) -> int:
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    layers = getattr(config, "num_hidden_layers", None)
    if config.is_encoder_decoder or not isinstance(layers, int):
        raise ValueError(f"it is a {config.model_type!r} model, which is not like BERT")
    return layers


def _load(name: str, **settings: object) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    model = load_model(AutoModel, name, optional=("pooler.",), trust_remote_code=False, **settings)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _pooling(name: str) -> tuple[str, int]:
    """ "mean" or "cls", and the most tokens, by a checkpoint's sentence-transformers files where it has them."""
    settings = _read_json(name, "sentence_bert_config.json") or {}
    limit = settings.get("max_seq_length") or 1_000_000
    pooling = "mean"
    for module in _read_json(name, "modules.json") or []:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            found = _read_json(name, f"{module['path']}/config.json") or {}
            modes = [key for key, used in found.items() if key.startswith("pooling_mode_") and used]
            named = found.get("pooling_mode") or " and ".join(mode.removeprefix("pooling_mode_") for mode in modes)
            pooling = named.removesuffix("_tokens").removesuffix("_token")
            if pooling not in ("mean", "cls"):
                raise ValueError(f"it pools by {pooling or 'nothing'}; only mean and cls can be used")
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"its embeddings need a {kind} module, which cannot be used")
    return pooling, limit


def _read_json(name: str, file: str) -> object:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
