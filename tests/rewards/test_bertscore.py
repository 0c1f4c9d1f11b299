import json
import math
import shutil

import pytest
import torch
from torchmetrics.functional.text.bert import bert_score
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from fastcorl.errors import UserError
from fastcorl.rewards.captions import bertscore as bertscore_module
from fastcorl.rewards.captions.bertscore import BertScore, SentenceSimilarity, greedy_f1, max_tokens

REFERENCES = [
    "a red dog on the table",
    "two cats and three dogs standing in top of a table .",
    "the dog",
    "a red dog on the table",
    "dog " * 40,
    "a blue digit at top left",
    "the [SEP] cat",
    "Two Cats",
]
CANDIDATES = [
    "a red dog on the table",
    "the cat",
    "two cats and three dogs standing in top of a table .",
    "",
    "cat dog " * 30,
    "zebra",
    "the cat [SEP]",
    "two cats",
]
LIMITS = {"bert": 16, "distilbert": 16, "roberta": 15}  # RoBERTa's positions begin behind the padding's index


@pytest.fixture(params=LIMITS)
def architecture(request):
    return request.param


def published(folder, limit, references, candidates, layer):
    """torchmetrics, pair by pair: in a list of sentences of several lengths it mixes up the pairs (its issue 2728)."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return [
        bert_score(
            [candidate],
            [reference],
            model=model,
            user_tokenizer=tokenizer,
            num_layers=layer,
            max_length=limit,
            truncation=True,
        )["f1"].item()
        for reference, candidate in zip(references, candidates, strict=True)
    ]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, None])
def test_scores_equal_torchmetrics(bert_folders, architecture, layer):
    score = BertScore(bert_folders[architecture], layer, batch_size=3)
    assert score.layer == (3 if layer is None else layer)
    expected = published(bert_folders[architecture], LIMITS[architecture], REFERENCES, CANDIDATES, layer)
    values = score(REFERENCES, CANDIDATES)
    assert values == pytest.approx(expected, abs=2e-6)
    assert len({round(value, 4) for value in values}) > 4
    assert values[0] == pytest.approx(1)
    assert values[3] == 0
    assert all(0 <= value <= 1 for value in values)


def f1_by_loops(reference, candidate):
    def cosine(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))

    precision = sum(max(0, *(cosine(c, r) for r in reference)) for c in candidate) / len(candidate)
    recall = sum(max(0, *(cosine(c, r) for c in candidate)) for r in reference) / len(reference)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f1_equals_loops_in_float64():
    generator = torch.Generator().manual_seed(0)
    lengths = [(2, 5), (4, 4), (7, 2), (3, 6)]
    pairs = [[torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in pair] for pair in lengths]
    references, candidates = (
        [torch.nn.functional.normalize(x, dim=-1) for x in side] for side in zip(*pairs, strict=True)
    )
    expected = [f1_by_loops(r.tolist(), c.tolist()) for r, c in pairs]
    assert greedy_f1(references, candidates).tolist() == pytest.approx(expected, abs=1e-12)


def test_tokens_unlike_all_others_count_nothing():
    """Alone in a batch, where no padding provides the 0."""
    here, there = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.6, 0.8]])
    assert greedy_f1([here], [there]).tolist() == [0]
    # precision (1 + 0) / 2, recall 1
    assert greedy_f1([here], [torch.cat([here, there])]).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize("similarity", [BertScore, SentenceSimilarity])
def test_scores_do_not_depend_on_the_batch(bert_folders, architecture, similarity):
    one, many = (similarity(bert_folders[architecture], batch_size=size) for size in (1, 64))
    assert one(REFERENCES, CANDIDATES) == pytest.approx(many(REFERENCES, CANDIDATES), abs=2e-6)
    assert many([], []) == []
    assert similarity.range[0] <= min(many(REFERENCES, CANDIDATES)) <= max(many(REFERENCES, CANDIDATES)) <= 1


@pytest.mark.parametrize("similarity", [BertScore, SentenceSimilarity])
def test_each_distinct_sentence_is_embedded_once(bert_folders, similarity):
    score = similarity(bert_folders["bert"])
    read = []
    score.encoder.model.register_forward_pre_hook(lambda _, inputs: read.extend(inputs[0].tolist()))
    score(["a dog"] * 3 + ["a cat"], ["a dog", "the dog", "the dog", "a dog"])
    assert len(read) == 3


@pytest.mark.parametrize("similarity", [BertScore, SentenceSimilarity])
def test_a_reference_without_words_cannot_be_scored(bert_folders, similarity):
    score = similarity(bert_folders["bert"])
    assert [math.isnan(value) for value in score(["", "a dog", " "], ["a dog", "", ""])] == [True, False, True]
    assert [math.isnan(value) for value in score(["", ""], ["", ""])] == [True, True]
    with pytest.raises(ValueError, match="shorter|longer"):
        score(["a dog"], [])


def test_layers_above_the_wanted_one_are_not_loaded(bert_folders):
    assert len(BertScore(bert_folders["bert"], 1).encoder.model.encoder.layer) == 2
    assert len(BertScore(bert_folders["bert"], 3).encoder.model.encoder.layer) == 3


def test_the_published_layer_goes_by_the_models_name(bert_folders, tmp_path, monkeypatch):
    monkeypatch.setitem(bertscore_module.BEST_LAYERS, "distilroberta-base", 2)
    shutil.copytree(bert_folders["roberta"], tmp_path / "distilroberta-base")
    assert BertScore(tmp_path / "distilroberta-base").layer == 2
    assert BertScore(tmp_path / "distilroberta-base", 1).layer == 1
    shutil.copytree(bert_folders["bert"], tmp_path / "roberta-large")
    with pytest.raises(UserError, match=r"^rewards.bert_layer: 17 is no layer of .*; give one from 0 to 3$"):
        BertScore(tmp_path / "roberta-large")


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_named(bert_folders, layer):
    with pytest.raises(UserError, match=rf"^rewards.bert_layer: {layer} is no layer"):
        BertScore(bert_folders["bert"], layer)


def test_roberta_reads_as_many_tokens_as_it_has_positions():
    model = RobertaModel(RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    model.resize_token_embeddings(10)
    limit = max_tokens(model)
    assert limit == model.config.max_position_embeddings - model.config.pad_token_id - 1
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
        model(torch.full((1, limit + 1), 5))


def test_sentence_similarity_is_the_cosine_of_mean_states(bert_folders, architecture):
    folder = bert_folders[architecture]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def embed(sentence):
        tokens = tokenizer(sentence, truncation=True, max_length=LIMITS[architecture], return_tensors="pt")
        with torch.no_grad():
            return model(tokens["input_ids"]).last_hidden_state[0].double().mean(dim=0)

    pairs = zip(REFERENCES, CANDIDATES, strict=True)
    expected = [torch.cosine_similarity(embed(r), embed(c), dim=0).item() for r, c in pairs]
    values = SentenceSimilarity(folder)(REFERENCES, CANDIDATES)
    assert values == pytest.approx(expected, abs=2e-6)
    assert max(values) > min(values) + 0.05


@pytest.fixture
def sentence_transformer(bert_folders, tmp_path):
    """Adds the files of sentence-transformers to a checkpoint."""

    def make(pooling, *more):
        folder = tmp_path / "encoder"
        shutil.copytree(bert_folders["bert"], folder)
        names = ["Transformer", "Pooling", *more]
        modules = [
            {"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(names)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5, "do_lower_case": False}))
        return folder

    return make


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        (MEAN, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_and_length_are_the_checkpoints(sentence_transformer, pooling, name):
    similarity = SentenceSimilarity(sentence_transformer(pooling, "Normalize"))
    assert similarity.pooling == name
    assert similarity.encoder.limit == 5
    model, tokenizer = similarity.encoder.model, similarity.encoder.tokenizer
    states = [
        model(tokenizer(text, truncation=True, max_length=5, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        for text in ("a red dog on the table", "the cat")
    ]
    pooled = [state.mean(dim=0) if name == "mean" else state[0] for state in states]
    expected = torch.cosine_similarity(*pooled, dim=0).item()
    assert similarity(["a red dog on the table"], ["the cat"]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    ("pooling", "more", "message"),
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, (), "pools by max_tokens and mean"),
        ({"pooling_mode": "lasttoken"}, (), "pools by lasttoken; only mean and cls"),
        (MEAN, ("Dense",), "need a Dense module"),
    ],
)
def test_what_is_more_than_pooling_is_refused(sentence_transformer, pooling, more, message):
    with pytest.raises(UserError, match=rf"^rewards.sentence_encoder: .*{message}"):
        SentenceSimilarity(sentence_transformer(pooling, *more))


@pytest.mark.parametrize(("similarity", "key"), [(BertScore, "bert"), (SentenceSimilarity, "sentence_encoder")])
def test_no_checkpoint_is_one_line_that_names_the_key(similarity, key, bert_folders, clip_folders, tmp_path):
    with pytest.raises(UserError, match=rf"^rewards.{key}: there is no folder '.*nowhere'"):
        similarity(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"^rewards.{key}: cannot load '{tmp_path}'[^\n]*$"):
        similarity(tmp_path)
    with pytest.raises(UserError, match=rf"^rewards.{key}: cannot load .*a 'clip' model, which is not like BERT$"):
        similarity(clip_folders["laion"])
    broken = tmp_path / "broken"
    shutil.copytree(bert_folders["bert"], broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"^rewards.{key}: cannot load [^\n]*$"):
        similarity(broken)


def test_a_checkpoint_that_lacks_weights_is_refused(bert_folders, tmp_path):
    """transformers would draw them at random."""
    folder = tmp_path / "deeper"
    shutil.copytree(bert_folders["bert"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^rewards.bert: .*it lacks 16 weights, the first is encoder.layer.3"):
        BertScore(folder)
    assert BertScore(folder, 2)(["a dog"], ["a dog"]) == pytest.approx([1])
