import numpy as np
import pytest
from PIL import Image

from fastcorl.runtime.samples import read_answers, sample_files, save_samples


@pytest.mark.parametrize(("size", "cell"), [(24, 96), (32, 96), (96, 96), (128, 128), (384, 192)])
def test_grid_holds_real_image_and_group(tmp_path, rollout, size, cell):
    sampled, scores = rollout(prompts=2, group_size=4, size=size)
    grid = save_samples(tmp_path / "samples" / "step-5", sampled, scores, 8)
    written = np.asarray(Image.open(tmp_path / "samples" / "step-5.png"))
    assert grid.dtype == np.uint8 and np.array_equal(grid, written)
    height, width, _ = grid.shape
    assert 5 * cell < width < 5 * cell + 80
    assert 2 * cell < height < 2 * (cell + 80)


def test_rows_follow_num_prompts(tmp_path, rollout):
    sampled, scores = rollout(prompts=3)
    short, tall = (save_samples(tmp_path / "s", sampled, scores, count) for count in (1, 3))
    assert short.shape[0] < tall.shape[0] and short.shape[1] == tall.shape[1]


def test_pixels_are_the_drawings(tmp_path, rollout):
    sampled, scores = rollout(prompts=1, group_size=2)
    sampled.images.pixels[0], sampled.images.pixels[1] = 1.0, float("nan")
    sampled.images.pixels[0, 1:] = 0.0
    grid = save_samples(tmp_path / "s", sampled, scores, 1)
    assert (grid == (255, 0, 0)).all(-1).sum() == 96 * 96
    assert (grid == (0, 0, 0)).all(-1).sum() >= 96 * 96


def test_text_file(tmp_path, rollout):
    sampled, scores = rollout(prompts=2, group_size=4)
    save_samples(tmp_path / "s", sampled, scores, 2)
    text = (tmp_path / "s.txt").read_text()
    for prompt in sampled.prompts:
        assert prompt.caption in text and prompt.question in text and prompt.solution in text
    assert text.count("] reward ") == 8 and text.count("accuracy ") == 8
    assert text.count("unscored") == 1 and text.count("cut at the length limit") == 2


@pytest.mark.parametrize(("images", "texts"), [(True, False), (False, True), (False, False)])
def test_one_modality_or_none(tmp_path, rollout, images, texts):
    sampled, scores = rollout(images=images, texts=texts)
    if texts:
        sampled.texts.answers[0] = "endless" * 400
    grid = save_samples(tmp_path / "s", sampled, scores, 8)
    assert grid.ndim == 3 and (tmp_path / "s.txt").stat().st_size > 0


def test_answers_are_read_back(tmp_path, rollout):
    sampled, scores = rollout(prompts=2, group_size=2)
    sampled.texts.answers[:] = ["<b>one</b>", "two\nlines\n\n=three", "", "[1] reward"]
    save_samples(tmp_path / "s", sampled, scores, 2)
    first, second = read_answers(tmp_path / "s.txt")
    assert (first.question, first.solution) == (sampled.prompts[0].question, sampled.prompts[0].solution)
    rewards, answers = zip(*first.answers, strict=True)
    assert rewards == (f"{scores.total[0]:.2f}", "unscored")
    assert answers == ("<b>one</b>  (cut at the length limit)", "two\nlines\n\n=three")
    assert [answer for _, answer in second.answers] == ["", "[1] reward"]


def test_drawings_alone_have_no_answers(tmp_path, rollout):
    save_samples(tmp_path / "s", *rollout(texts=False), 2)
    assert [prompt.answers for prompt in read_answers(tmp_path / "s.txt")] == [[], []]


def test_files_are_in_the_order_of_the_run(tmp_path, rollout):
    sampled, scores = rollout(prompts=1, group_size=2)
    for stem in ("00010-t2i-2", "00009-unified_1-9", "100000-mc-1", "other"):
        save_samples(tmp_path / stem, sampled, scores, 1)
    found = [(file.global_step, file.stage, file.step) for file in sample_files(tmp_path)]
    assert found == [(9, "unified_1", 9), (10, "t2i", 2), (100000, "mc", 1)]
    assert sample_files(tmp_path / "none") == []
