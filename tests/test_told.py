"""A weight told from a folded one: every bit, whatever the numbers and whatever the factors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bnfold.errors import InputError
from bnfold.folding.told import original_of, tell

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
SHAPE = (16, 16, 3, 3)


def drawn(seed, dtype, *, spread=1.0):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(SHAPE) * np.exp(spread * rng.standard_normal(SHAPE))
    rows = np.exp2(rng.uniform(-3, 3, (16, 1, 1, 1))) * rng.choice([-1, 1], (16, 1, 1, 1))
    columns = np.exp2(rng.uniform(-3, 3, (1, 16, 1, 1)))
    return weights.astype(dtype), (rows, columns)


def folded(weights, factors):
    with np.errstate(all="ignore"):
        product = factors[0] * weights.astype(np.float64) * factors[1]
        return product.astype(weights.dtype)


def check(weights, factors, view=SHAPE):
    """The weight comes back, bit for bit; how it was told."""
    product = folded(weights, factors) if view == SHAPE else folded_in(weights, factors, view)
    told = tell(weights, "w", product, view, factors)
    if told is not None:
        assert original_of(told, product).tobytes() == weights.tobytes()
        assert told.nbytes < weights.nbytes
    return told


def folded_in(weights, factors, view):
    return folded(weights.reshape(view), factors).reshape(weights.shape)


@pytest.mark.parametrize(("dtype", "seed"), [(t, s) for t in TYPES for s in range(10)])
def test_every_bit_comes_back(dtype, seed):
    assert check(*drawn(seed, dtype)) is not None


def test_it_takes_a_fifth_of_a_bit_for_a_weight():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((256, 256, 3, 3)).astype(np.float32)
    factors = (np.exp2(rng.uniform(-3, 3, (256, 1, 1, 1))), np.ones((1, 1, 1, 1)))
    told = tell(weights, "w", folded(weights, factors), weights.shape, factors)
    assert not told.fixes.size
    assert 0.18 < 8 * told.upper.nbytes / weights.size < 0.21
    assert told.nbytes < 0.01 * weights.nbytes


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_signs_denormals_and_nan_come_back(dtype):
    weights, factors = drawn(1, dtype)
    weights[0] = 0
    weights[1] = dtype(-0.0)
    weights[2] = np.finfo(np.float32).smallest_subnormal if dtype is np.float32 else weights[2]
    weights[3, 3] = dtype(np.nan)
    weights[4, 4] = dtype(np.inf)
    assert check(weights, factors) is not None


@pytest.mark.parametrize("dtype", TYPES)
def test_channels_of_factor_zero_are_kept_as_they_were(dtype):
    weights, (rows, columns) = drawn(2, dtype)
    rows[:4], columns[:, 5] = 0, 0
    fixes = check(weights, (rows, columns)).fixes.size
    lost = 4 * 144 + 12 * 9
    assert fixes >= lost if dtype is np.float64 else fixes == lost


def test_what_underflows_is_kept():
    weights, (rows, columns) = drawn(3, np.float32)
    rows[7] = 1e-42
    assert check(weights, (rows, columns)).fixes.size >= 140


def test_groups_are_seen_in_a_view_of_their_own():
    weights, _ = drawn(4, np.float32)
    view = (4, 4, 16, 3, 3)
    rng = np.random.default_rng(4)
    factors = (rng.uniform(0.5, 2, (4, 4, 1, 1, 1)), rng.uniform(0.5, 2, (4, 1, 16, 1, 1)))
    assert check(weights, factors, view) is not None


@pytest.mark.parametrize("wrong", [0.5, 1 + 2**-20, -1.0])
def test_wrong_factors_cost_room_and_no_bit(wrong):
    """The factors only decide how much has to be kept besides."""
    weights, (rows, columns) = drawn(5, np.float32)
    product = folded(weights, (rows, columns))
    rows = np.where(np.arange(16).reshape(16, 1, 1, 1) == 3, wrong * rows, rows)
    told = tell(weights, "w", product, SHAPE, (rows, columns))
    assert told.fixes.size > 0
    assert original_of(told, product).tobytes() == weights.tobytes()
    assert tell(weights, "w", product, SHAPE, (wrong * rows * 1.1, columns)) is None


def test_other_types_and_sizes_are_not_told():
    weights, factors = drawn(6, np.float32)
    product = folded(weights, factors)
    assert tell(weights, "w", product.astype(np.float16), SHAPE, factors) is None
    assert tell(weights, "w", product[:8], SHAPE, factors) is None
    told = tell(weights, "w", product, SHAPE, factors)
    for other in (product[:8], product.astype(np.float64)):
        with pytest.raises(InputError, match="the record was written for a float32"):
            original_of(told, other)


def test_a_changed_product_gives_another_weight():
    weights, factors = drawn(7, np.float32)
    product = folded(weights, factors)
    told = tell(weights, "w", product, SHAPE, factors)
    product[0, 0, 0, 0] *= np.float32(1.0001)
    assert original_of(told, product).tobytes() != weights.tobytes()
