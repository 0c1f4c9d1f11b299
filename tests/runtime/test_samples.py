import numpy as np
import pytest
from PIL import Image

from fastcorl.runtime.samples import save_samples


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
