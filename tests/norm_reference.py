"""Batch norm's variants in NumPy, forward and backward: what the tests hold bnfold.norm against.

Written from the papers, in float64, with no thought for speed. A layer is a function of its input
and its parameters that returns its output and `backward`: from the gradient of the output to those
of the input and the parameters. Inputs are (N, C, ...); statistics and parameters are (C,).
"""

from __future__ import annotations

import numpy as np


def rows(x):
    """(N, C, ...) as (C, values)."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def unrows(r, shape):
    """The inverse of `rows`."""
    return np.moveaxis(r.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


# --- batch norm: Ioffe & Szegedy 2015, algorithm 1 ------------------------------------------------


def batch_norm(x, gamma, beta, eps):
    X, gamma, beta = rows(x), column(gamma), column(beta)
    m = X.shape[1]
    mean = X.sum(1, keepdims=True) / m
    var = ((X - mean) ** 2).sum(1, keepdims=True) / m
    xh = (X - mean) / np.sqrt(var + eps)

    def backward(dy):
        dY = rows(dy)
        dxh = dY * gamma
        dvar = (dxh * (X - mean)).sum(1, keepdims=True) * -0.5 * (var + eps) ** -1.5
        dmean = -dxh.sum(1, keepdims=True) / np.sqrt(var + eps)
        dX = dxh / np.sqrt(var + eps) + dvar * 2 * (X - mean) / m + dmean / m
        return unrows(dX, x.shape), (dY * xh).sum(1), dY.sum(1)

    return unrows(gamma * xh + beta, x.shape), backward


def batch_norm_running(x, mean, var, momentum):
    """Torch's running statistics after a batch: the variance that is kept is the unbiased one."""
    X = rows(x)
    return (
        (1 - momentum) * np.asarray(mean) + momentum * X.mean(1),
        (1 - momentum) * np.asarray(var) + momentum * X.var(1, ddof=1),
    )


def inference(x, mean, var, gamma, beta, eps):
    X = (rows(x) - column(mean)) / np.sqrt(column(var) + eps)

    def backward(dy):
        dY = rows(dy)
        dX = dY * column(gamma) / np.sqrt(column(var) + eps)
        return unrows(dX, x.shape), (dY * X).sum(1), dY.sum(1)

    return unrows(column(gamma) * X + column(beta), x.shape), backward


# --- batch renormalization: Ioffe 2017, algorithm 1 -----------------------------------------------


def correction(x, mu, s, eps, r_max, d_max):
    """(r, d) of a batch, which have no gradient."""
    X, mu, s = rows(x), column(mu), column(s)
    mean = X.mean(1, keepdims=True)
    sigma = np.sqrt(eps + ((X - mean) ** 2).mean(1, keepdims=True))
    r = np.minimum(np.maximum(sigma / s, 1 / r_max), r_max)
    d = np.minimum(np.maximum((mean - mu) / s, -d_max), d_max)
    return r, d


def batch_renorm(x, gamma, beta, r, d, eps):
    X, gamma, beta = rows(x), column(gamma), column(beta)
    m = X.shape[1]
    mean = X.mean(1, keepdims=True)
    sigma = np.sqrt(eps + ((X - mean) ** 2).mean(1, keepdims=True))
    xh = (X - mean) / sigma * r + d

    def backward(dy):
        dY = rows(dy)
        dxh = dY * gamma
        dsigma = (dxh * (X - mean) * -r / sigma**2).sum(1, keepdims=True)
        dmean = (dxh * -r / sigma).sum(1, keepdims=True)
        dX = dxh * r / sigma + dsigma * (X - mean) / (m * sigma) + dmean / m
        return unrows(dX, x.shape), (dY * xh).sum(1), dY.sum(1)

    return unrows(gamma * xh + beta, x.shape), backward


def batch_renorm_running(x, mu, s, eps, alpha):
    """Algorithm 1's averages: of the batches' deviations, epsilon within."""
    X = rows(x)
    sigma = np.sqrt(eps + X.var(1))
    return mu + alpha * (X.mean(1) - mu), s + alpha * (sigma - s)


# --- ghost batch norm: Hoffer, Hubara & Soudry 2017, algorithm 1 ----------------------------------


def ghost_batch_norm(parts, gamma, beta, eps):
    outputs, backwards = zip(*(batch_norm(part, gamma, beta, eps) for part in parts), strict=True)
    starts = np.cumsum([len(part) for part in parts])[:-1]

    def backward(dy):
        gradients = [b(d) for b, d in zip(backwards, np.split(dy, starts), strict=True)]
        dx, dgamma, dbeta = zip(*gradients, strict=True)
        return np.concatenate(dx), sum(dgamma), sum(dbeta)

    return np.concatenate(outputs), backward


def ghost_running(values, first, eta):
    """mu_run = (1 - eta)^n mu_run + sum_i (1 - eta)^(n - i) eta mu_i, i = 1..n."""
    n = len(values)
    kept = (1 - eta) ** n * np.asarray(first)
    return kept + sum((1 - eta) ** (n - i) * eta * v for i, v in enumerate(values, start=1))


# --- weight normalization and mean-only batch norm: Salimans & Kingma 2016 ------------------------


def mean_only(x, beta):
    X = rows(x)

    def backward(dy):
        dY = rows(dy)
        return unrows(dY - dY.mean(1, keepdims=True), x.shape), dY.sum(1)

    return unrows(X - X.mean(1, keepdims=True) + column(beta), x.shape), backward


def units(weight, *, transposed=False, groups=1):
    """The indices of a weight that belong to each output unit, one after the other."""
    if not transposed:
        return [(unit,) for unit in range(weight.shape[0])]
    size = weight.shape[0] // groups
    return [
        (slice(group * size, (group + 1) * size), unit)
        for group in range(groups)
        for unit in range(weight.shape[1])
    ]


def weight_norm(g, v, places):
    """Section 2, equations 2 and 3; `g` holds a length for each of `places`."""
    w = np.zeros_like(v)
    for length, place in zip(g, places, strict=True):
        w[place] = length * v[place] / np.sqrt((v[place] ** 2).sum())

    def backward(dw):
        dg, dv = np.zeros(len(places)), np.zeros_like(v)
        for i, place in enumerate(places):
            norm = np.sqrt((v[place] ** 2).sum())
            dg[i] = (dw[place] * v[place]).sum() / norm
            dv[place] = g[i] / norm * dw[place] - g[i] * dg[i] / norm**2 * v[place]
        return dg, dv

    return w, backward


def weight_norm_log(s, v, places, c):
    """The same with g = exp(c s)."""
    w, of_g = weight_norm(np.exp(c * s), v, places)

    def backward(dw):
        dg, dv = of_g(dw)
        return c * np.exp(c * s) * dg, dv

    return w, backward


# --- finite differences ---------------------------------------------------------------------------


def differences(function, value, dy, step=1e-5):
    """The gradient of sum(function(value) * dy), by central differences."""
    value = np.array(value, dtype=np.float64)
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        ahead, behind = value.copy(), value.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = ((function(ahead) - function(behind)) * dy).sum() / (2 * step)
    return gradient
