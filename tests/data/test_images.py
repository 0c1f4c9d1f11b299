"""Images of untrusted rows."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastcorl.data import ImageError, decode_image
from tests.data.examples import png


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "absent.png", "."])
@pytest.mark.parametrize("absolute", [False, True])
def test_images_stay_in_the_folder(path, absolute, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="data's folder"):
        decode_image(path, folder, absolute=absolute)


def test_absolute_paths_only_where_allowed_and_inside(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    assert decode_image("a.png", folder).size == (8, 6)
    assert decode_image(str(folder / "a.png"), folder, absolute=True).size == (8, 6)
    with pytest.raises(ImageError, match="is an absolute path"):
        decode_image(str(folder / "a.png"), folder)
    with pytest.raises(ImageError, match="leads out"):
        decode_image(str(tmp_path / "secret.png"), folder, absolute=True)


def test_no_folder():
    with pytest.raises(ImageError, match="is the path 'a.png', but this source has no folder"):
        decode_image("a.png")


def test_a_link_inside_the_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert decode_image("b.png", tmp_path).size == (8, 6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_images_come_out_rgb(mode):
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, format="JPEG" if mode == "CMYK" else "PNG")
    image = decode_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: {"bytes": data, "path": "x.png"}])
def test_encoded_images(wrap):
    assert decode_image(wrap(png())).size == (8, 6)


def test_images_come_out_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(png((8, 6), exif=exif)).size == (6, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_in_threads():
    """Refused from their headers, in as many threads as one likes."""
    bombs = [png((8000, 7000), "1"), png((10000, 9500), "1"), png((20000, 20000), "1")] * 4

    def refused(data):
        with pytest.raises(ImageError, match="more than 50000000|is too large") as error:
            decode_image(data)
        return str(error.value)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(refused, bombs))) == 12


def test_sixteen_bits_are_scaled_to_eight():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    decoded = np.asarray(decode_image(buffer.getvalue()))
    assert np.abs(decoded[..., 0].astype(int) - (ramp >> 8)).max() <= 1
