"""Which tensors hold a parameter: read and written by hand, and every part of a tensor once."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.models.hf.tensor import Tensor

# A checkpoint's tensor of six outputs and two inputs: queries in rows 0 to 3, keys in 4 and 5. The
# queries' rows are rotary pairs side by side, 0 with 1 and 2 with 3; ours are halves.
FUSED = np.array([[0, 1], [10, 11], [20, 21], [30, 31], [40, 41], [50, 51]], np.float32)
QUERIES = Tensor("qkv", transposed=True, order=(0, 2, 1, 3))
KEYS = Tensor("qkv", transposed=True, begin=4)


def test_a_parameter_is_a_part_of_a_tensor_by_hand():
    queries = QUERIES.read(FUSED, ((0, 2), (0, 4)))
    keys = KEYS.read(FUSED, ((0, 2), (0, 2)))

    np.testing.assert_array_equal(queries, [[0, 20, 10, 30], [1, 21, 11, 31]])
    np.testing.assert_array_equal(keys, [[40, 50], [41, 51]])
    assert QUERIES.shape((2, 4)) == (4, 2) and KEYS.shape((2, 2)) == (6, 2)


@pytest.mark.parametrize("bounds", [((0, 1), (1, 3)), ((1, 2), (3, 4)), ((0, 2), (2, 4))])
def test_a_device_reads_its_part_alone(bounds):
    whole = QUERIES.read(FUSED, ((0, 2), (0, 4)))
    (first, last), (begin, end) = bounds
    np.testing.assert_array_equal(QUERIES.read(FUSED, bounds), whole[first:last, begin:end])


def test_what_was_read_is_written_back_as_it_was():
    again = np.full_like(FUSED, np.nan)
    for tensor, outputs in ((QUERIES, 4), (KEYS, 2)):
        tensor.write(tensor.read(FUSED, ((0, 2), (0, outputs))), again)
    np.testing.assert_array_equal(again, FUSED)


def test_a_bias_has_rows_too():
    bias = np.arange(6.0)
    part = Tensor("b", begin=4)
    np.testing.assert_array_equal(part.read(bias, ((0, 2),)), [4, 5])
    again = np.zeros(6)
    part.write(np.array([4.0, 5.0]), again)
    np.testing.assert_array_equal(again, [0, 0, 0, 0, 4, 5])


def test_of_a_layer_the_name_has_the_number():
    assert Tensor("model.layers.{layer}.q").of_layer(3).name == "model.layers.3.q"
