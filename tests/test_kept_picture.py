import numpy as np
import pytest

from csp_edge.kept_picture import kept_picture

WHITE = np.full((48, 48, 3), 240, np.uint8)


def test_evicted_patches_are_darker() -> None:
    shares = np.zeros((6, 6))
    shares[:3] = 1
    shares[:, 3:] /= 2
    page = np.asarray(kept_picture([WHITE], [shares]).convert("L"), float)
    # tile at (276, 68), 240 pixels wide; inside the patches' borders
    kept, half, evicted = page[90, 300], page[90, 500], page[290, 300]
    assert kept == 240
    assert evicted < half < kept
    assert evicted < 80


def test_size_grows_with_the_pictures() -> None:
    shares = np.ones((6, 6))
    one = kept_picture([WHITE], [shares])
    two = kept_picture([WHITE] * 2, [shares] * 2)
    five = kept_picture([WHITE] * 5, [shares] * 5)
    assert one.mode == "RGB"
    assert one.width >= 2 * 240
    assert one.width < two.width == five.width
    assert one.height == two.height < five.height


def test_any_shape_of_picture_and_grid() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 200), (500, 700), (3, 400)):
        for rows, cols in ((1, 1), (7, 5), (24, 24), (300, 300)):
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            shares = rng.random((rows, cols)).astype(np.float32)
            assert kept_picture([picture], [shares], title="").width > 480


def test_same_input_same_picture() -> None:
    shares = np.random.default_rng(0).random((6, 6))
    first, second = (kept_picture([WHITE], [shares], title="x") for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("pictures", "kept", "match"),
    [
        ([], [], "0 pictures"),
        ([WHITE], [], "1 pictures and 0 maps"),
        ([WHITE[:, :, 0]], [np.ones((6, 6))], r"pictures\[0\] is uint8 of shape \(48, 48\)"),
        ([WHITE / 255], [np.ones((6, 6))], r"pictures\[0\] is float64"),
        ([WHITE, WHITE], [np.ones((6, 6)), np.ones(36)], r"kept\[1\] is of shape \(36,\)"),
        ([WHITE], [np.ones((0, 6))], r"kept\[0\] is of shape"),
        ([WHITE], [np.full((6, 6), 1.1)], r"kept\[0\] is from 1\.1"),
        ([WHITE], [np.full((6, 6), np.nan)], r"kept\[0\] is from nan"),
    ],
)
def test_mismatched_input(pictures: list, kept: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kept_picture(pictures, kept)
