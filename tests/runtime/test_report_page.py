import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image
from rich.console import Console

from fastcorl.config import LoggingConfig
from fastcorl.errors import UserError
from fastcorl.runtime import report_page
from fastcorl.runtime.curves import RunCurves, curves_of
from fastcorl.runtime.report import draw_comparison, read_run
from fastcorl.runtime.report_page import write_page
from fastcorl.runtime.samples import save_samples
from fastcorl.runtime.telemetry import Telemetry

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = '<script>alert("1")</script> & élan 日本'


class Page(HTMLParser):
    """Fails on a tag that is not closed in turn; keeps what a page refers to, its text and the classes of its rows."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.sources, self.links, self.words, self.rows = [], set(), [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "tr":
            self.rows.append(attributes.get("class"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_page(path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith("#") and f'id="{link[1:]}"' in text for link in page.links)
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    return page


@pytest.fixture
def run(tmp_path, record, rollout):
    """Factory of a run's folder."""

    def make(name="one", stages=None, settings=None, scores=True, samples=True, **fields):
        folder = tmp_path / name
        folder.mkdir()
        stages = {"unified": 2, "oe": 1} if stages is None else stages
        fields = {"metrics": {"loss": 0.1, "kl": 0.2, "mfu": 0.4}, "rewards": {"total": 1.0}} | fields
        with Telemetry(
            folder, LoggingConfig(tensorboard=False), stages, True, Console(file=io.StringIO())
        ) as telemetry:
            for stage, total in stages.items():
                for step in range(1, total + 1):
                    telemetry.write(record(stage, step, total, **fields))
                    if samples:
                        sampled, scored = rollout(prompts=1, group_size=2, images=stage != "oe")
                        sampled.texts.answers[:] = [NASTY, "two\nlines"]
                        stem = f"{telemetry.global_step(stage, step):05d}-{stage}-{step}"
                        save_samples(folder / "samples" / stem, sampled, scored, 1)
        if scores:
            entries = [{"stage": "start", "scores": {"overall": 0.25}}, {"stage": "oe", "scores": {"overall": 0.5}}]
            (folder / "scores.json").write_text(json.dumps(entries))
        settings = {"seed": 0, "model": {"path": NASTY[:27]}} | (settings or {})
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return make


def test_page_of_one_run_needs_nothing_else(tmp_path, run):
    page = read_page(write_page([read_run(run())], tmp_path / "report.html"))
    text = " ".join(page.words)
    assert NASTY in text and "\nlines" in text  # as text, not as tags
    assert "first: unified, step 1" in text and "last: unified, step 2" in text and "last: oe, step 1" in text
    for words in ("50.0", "+25.0", "rollout", "peak memory, GiB", "mean MFU", "model.path"):
        assert words in text
    assert len(page.sources) == 5 + 2  # curves and grids


def test_page_of_several_runs_shows_what_differs(tmp_path, run):
    runs = [read_run(run("one")), read_run(run("two", settings={"seed": 1, "extra": [1]}))]
    page = read_page(write_page(runs, tmp_path / "report.html"))
    assert page.rows.count("differs") == 2  # seed and extra
    text = " ".join(page.words)
    assert "At the end of each run" in text and "Differences" in text and "[1]" in text


def test_page_of_a_run_that_has_little(tmp_path, run):
    folder = run(stages={}, samples=False)
    (folder / "config.yaml").unlink()
    page = read_page(write_page([read_run(folder)], tmp_path / "report.html"))
    assert page.sources == [] and "50.0" in page.words
    bare = run("two", stages={"unified": 1}, samples=False, scores=False, metrics={}, rewards={}, seconds={})
    assert len(read_page(write_page([read_run(bare)], tmp_path / "report.html")).sources) == 1


def test_large_grids_are_compressed(tmp_path, run, monkeypatch):
    monkeypatch.setattr(report_page, "MAX_PICTURE_BYTES", 1000)
    page = read_page(write_page([read_run(run())], tmp_path / "report.html"))
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 2


@pytest.mark.parametrize("others", [{"unified": 1}, {"t2i": 3, "oe": 1}, {}])
def test_runs_of_other_stages_are_drawn_over_one_another(tmp_path, run, others):
    runs = [read_run(run("one")), read_run(run("two", stages=others), "second")]
    path = draw_comparison(runs, tmp_path / "report.png")
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 1000


def test_curves_are_those_of_a_run(record):
    metrics = {"loss": 0.0, "image_entropy": 1.0, "text_mismatch": 0.0, "kl": 0.1, "grad_norm": 1.0, "total/max": 2.0}
    records = [record(metrics=metrics), record(step=2, rewards={"total": 1.0, "late": 0.5}, metrics={})]
    curves = {curve.title: curve for curve in curves_of(records)}
    assert next(iter(curves)) == "reward: total"
    assert {"reward: late", "loss", "KL", "image entropy", "text mismatch", "gradient norm"} < set(curves)
    assert "total/max" not in curves and "mfu" not in curves
    values = RunCurves(records).series(curves["reward: late"].value)
    assert values[1] == 0.5 and values[0] != values[0]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", "not json\n", "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", '{"stage": "unified"}\n', "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl: cannot be read"),
        ("scores.json", "{", "scores.json: cannot be read"),
        ("scores.json", '[{"stage": 1}]', "scores.json: cannot be read"),
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("config.yaml", "", None),
    ],
)
def test_what_is_damaged_is_named(run, file, content, words):
    folder = run(samples=False)
    (folder / file).write_text(content)
    if words is None:
        assert read_run(folder).settings == {}
        return
    with pytest.raises(UserError, match=words):
        read_run(folder)


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match="nothing to report, no step in metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such run"):
        read_run(tmp_path / "none")
