"""The NumPy oracle itself: its gradients are those of its values, by finite differences."""

import norm_reference as ref
import numpy as np
import pytest

EPS = 0.03
C = 3
SHAPES = [(5, C), (3, C, 4), (3, C, 2, 3), (2, C, 2, 1, 3)]


@pytest.fixture
def draw():
    return np.random.default_rng(7).standard_normal


def renorm(x, gamma, beta):
    r = np.array([[0.5], [1.0], [1.7]])
    d = np.array([[0.4], [0.0], [-0.8]])
    return ref.batch_renorm(x, gamma, beta, r, d, EPS)


LAYERS = {
    "batch": lambda x, gamma, beta: ref.batch_norm(x, gamma, beta, EPS),
    "renorm": renorm,
    "ghost": lambda x, gamma, beta: ref.ghost_batch_norm([x[:2], x[2:]], gamma, beta, EPS),
    "inference": lambda x, gamma, beta: ref.inference(
        x, [0.1, -1, 2], [1, 0.5, 3], gamma, beta, EPS
    ),
    "mean-only": lambda x, beta: ref.mean_only(x, beta),
}


def check(layer, arguments, dy):
    """Every gradient of a layer against finite differences."""
    gradients = layer(*arguments)[1](dy)
    assert len(gradients) == len(arguments)
    for i, gradient in enumerate(gradients):

        def value(changed, i=i):
            return layer(*arguments[:i], changed, *arguments[i + 1 :])[0]

        expected = ref.differences(value, arguments[i], dy)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def arguments_of(name, draw, shape):
    x = 2 * draw(shape) + 1
    return (x, draw(C)) if name == "mean-only" else (x, 1 + draw(C), draw(C))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_values(name, shape, draw):
    if name == "ghost" and len(shape) == 5:
        shape = (4, *shape[1:])
    check(LAYERS[name], arguments_of(name, draw, shape), draw(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_wrong_by_a_thousandth_is_seen(name, draw):
    arguments, dy = arguments_of(name, draw, (4, C, 3)), draw((4, C, 3))
    for wrong in range(len(arguments)):

        def faulty(*arguments, wrong=wrong):
            y, backward = LAYERS[name](*arguments)
            return y, lambda dy: [
                gradient * (1.001 if i == wrong else 1) for i, gradient in enumerate(backward(dy))
            ]

        with pytest.raises(AssertionError, match="Not equal"):
            check(faulty, arguments, dy)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("c", [None, 0.7])
def test_weight_norm_gradients(transposed, c, draw):
    v, dw = draw((4, 3, 2)), draw((4, 3, 2))
    places = ref.units(v, transposed=transposed, groups=2 if transposed else 1)
    g = 1 + draw(len(places)) ** 2

    def layer(g, v):
        if c is None:
            return ref.weight_norm(g, v, places)
        return ref.weight_norm_log(g, v, places, c)

    check(layer, (g, v), dw)
    _, dv = layer(g, v)[1](dw)
    for place in places:
        assert abs((dv[place] * v[place]).sum()) < 1e-12


def test_every_weight_belongs_to_one_unit():
    weight = np.zeros((6, 2, 3))
    for place in ref.units(weight, transposed=True, groups=3):
        weight[place] += 1
    assert (weight == 1).all()
    assert len(ref.units(weight, transposed=True, groups=3)) == 6
