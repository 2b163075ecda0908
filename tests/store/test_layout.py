import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.store.layout import StoreLayout


def layout(**changes):
    values = dict(
        num_rows=100,
        num_views=1,
        num_frames=8,
        layers=(0, 1),
        num_patches=49,
        width=64,
        channels=64,
        embed_dim=32,
        image_size=(224, 224),
        patch_dtype="int8",
    )
    return StoreLayout(**{**values, **changes})


def test_arrays_have_the_shapes_and_chunks_of_format_1():
    specs = {spec.name: spec for spec in layout(num_views=3).array_specs()}
    assert specs["patches"].shape == (100, 3, 8, 2, 49, 64)
    assert specs["patches"].chunk_shape == (1, 1, 1, 2, 49, 64)
    assert specs["cls"].shape == (100, 3, 8, 2, 64)
    assert specs["cls"].chunk_shape == (1, 1, 8, 2, 64)
    assert specs["cls"].dtype == "float16"
    assert specs["embedding"].shape == (100, 3, 8, 32)
    assert specs["embedding"].chunk_shape is None
    assert specs["pixels"].shape == (100, 3, 8, 1, 224, 224, 3)
    assert specs["pixels"].chunk_shape == (1, 1, 1, 1, 224, 224, 3)
    assert len({spec.shard_shape[0] for spec in specs.values()}) == 1, "row boundaries are the same for all arrays"


def test_vit_e_frame_is_as_large_as_the_design_says():
    sizes = layout(
        layers=tuple(range(1, 64, 2)), num_patches=256, width=1792, channels=1792, patch_dtype="float16"
    ).bytes_per_frame
    assert sizes["patches"] + sizes["cls"] == 32 * 257 * 1792 * 2


def test_store_without_pixels_has_no_pixel_array():
    assert "pixels" not in {spec.name for spec in layout(with_pixels=False).array_specs()}


def test_row_over_one_gigabyte_is_split_along_views():
    big = dict(layers=tuple(range(32)), num_patches=256, width=1792, channels=1792, patch_dtype="float16")
    assert {s.shard_shape[1] for s in layout(num_views=12, num_frames=8, **big).array_specs()} == {1}
    assert {s.shard_shape[1] for s in layout(num_views=2, num_frames=8, **big).array_specs()} == {2}


@given(rows=st.integers(1, 5000), frames=st.integers(1, 64), patches=st.integers(1, 300))
def test_shards_cover_all_rows_once_and_hold_to_their_limits(rows, frames, patches):
    sizes = layout(num_rows=rows, num_frames=frames, num_patches=patches, image_size=(32, 32))
    covered = [row for shard in range(sizes.num_shards) for row in sizes.shard_rows(shard)]
    assert covered == list(range(rows))
    assert 1 <= sizes.rows_per_shard <= min(64, math.ceil(rows / 16))
    assert sizes.rows_per_shard == 1 or sizes.rows_per_shard * sizes.bytes_per_row <= 512 * 2**20


@pytest.mark.parametrize(("dtype", "cls"), [("int8", "float16"), ("float16", "float16"), ("float32", "float32")])
def test_class_tokens_are_never_quantised(dtype, cls):
    assert layout(patch_dtype=dtype).cls_dtype == cls
