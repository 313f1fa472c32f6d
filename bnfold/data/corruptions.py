"""The fifteen corruptions of CIFAR-10-C at five severities.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019, section 3 and appendix; the constants are those of the CIFAR version,
lengths in pixels of images of 32x32. The code is our own, so that pixels differ from the published
set where chance or an image library had a say. One type is ours in kind: `frost` lays procedural
ice over the image where the paper has photographs. Nothing is rounded to bytes at the end.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bnfold.data.shifts import Images, images_in_unit_range
from bnfold.errors import UsageError

Floats = NDArray[Any]
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """A way to spoil images: `apply(images, *constants[severity - 1], rng)`."""

    apply: Callable[..., Any]
    constants: Sequence[tuple[float, ...]]


def corrupted(images: NDArray[Any], name: str, severity: int, seed: int = 0) -> Images:
    """The images (N, C, H, W) in [0, 1] under the corruption `name` of CORRUPTIONS, float32.

    severity: 1 to 5. The same arguments give the same images. Three channels are red, green and
    blue; any other number are shades of grey, corrupted alike.

    Raises UsageError for an unknown name or severity, another shape, or values outside of [0, 1].
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"There is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"severity is {severity}; it must be 1, 2, 3, 4 or 5.")
    x = images_in_unit_range(images, "A corruption")
    if not x.size:
        return x.copy()
    corruption = CORRUPTIONS[name]
    rng = np.random.default_rng((seed, severity))
    made = corruption.apply(x, *corruption.constants[severity - 1], rng=rng)
    clipped: Images = np.clip(made, 0, 1).astype(np.float32, copy=False)
    return clipped


# --- noise ----------------------------------------------------------------------------------------


def gaussian_noise(x: Images, sigma: float, rng: np.random.Generator) -> Images:
    """Normal noise of standard deviation `sigma` on each value."""
    return x + np.float32(sigma) * rng.standard_normal(x.shape, dtype=np.float32)


def shot_noise(x: Images, photons: float, rng: np.random.Generator) -> Floats:
    """Poisson noise, as if `photons` were counted where a value is 1."""
    return rng.poisson(x * np.float32(photons)) / np.float32(photons)


def impulse_noise(x: Images, share: float, rng: np.random.Generator) -> Floats:
    """A `share` of the values 0 or 1, each channel for itself."""
    draw = rng.random(x.shape, dtype=np.float32)
    return np.where(draw < share / 2, 0, np.where(draw < share, 1, x))


# --- blur -----------------------------------------------------------------------------------------


def defocus_blur(x: Images, radius: float, softness: float, rng: np.random.Generator) -> Images:
    """A disk of `radius`, its edge smoothed by a 3-tap Gaussian of deviation `softness`."""
    del rng
    reach = int(radius) + 1
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
    soft = np.exp(-(np.arange(-1, 2) ** 2) / (2 * softness**2))
    soft /= soft.sum()
    for along in (0, 1):
        disk = np.apply_along_axis(np.convolve, along, disk, soft, "same")
    disk /= disk.sum()
    padded = _padded(x, reach, "reflect")
    out = np.zeros_like(x)
    for i, j in np.argwhere(disk > 0):
        out += np.float32(disk[i, j]) * _window(padded, i, j, x)
    return out


def glass_blur(
    x: Images, sigma: float, reach: int, rounds: int, rng: np.random.Generator
) -> Images:
    """Each pixel in turn replaced by a near one, as through frosted glass, between two blurs.

    The published code means to exchange the two, but copies (its pixels are views); so do we.
    """
    y = gaussian_blur(x, sigma).transpose(0, 2, 3, 1).copy()  # written to: never the caller's
    height, width = y.shape[1:3]
    every = np.arange(len(y))
    for _ in range(rounds):
        for row in range(height - reach, reach, -1):
            offsets = rng.integers(-reach, reach, (2, width, len(y)))
            for column in range(width - reach, reach, -1):
                down, right = offsets[:, column - 1]
                y[:, row, column] = y[every, row + down, column + right]
    return gaussian_blur(np.ascontiguousarray(y.transpose(0, 3, 1, 2)), sigma)


def motion_blur(x: Images, reach: int, sigma: float, rng: np.random.Generator) -> Images:
    """Smeared to one side along a line within 45 degrees of the horizontal, its weight Gaussian."""
    return smeared(x, reach, sigma, rng.uniform(-45, 45, len(x)))


def zoom_blur(x: Images, farthest: float, rng: np.random.Generator) -> Floats:
    """The mean of the image and of its enlargements, in steps of .01, up to `farthest`."""
    del rng
    factors = np.arange(1, farthest, 0.01)
    total = x.copy()
    for factor in factors:
        total += _zoomed(x, factor)
    return total / np.float32(len(factors) + 1)


# --- weather --------------------------------------------------------------------------------------


def snow(
    x: Images,
    mean: float,
    sd: float,
    size: float,
    threshold: float,
    reach: int,
    sigma: float,
    clear: float,
    rng: np.random.Generator,
) -> Floats:
    """A whitened image under falling flakes: noise above a threshold, enlarged and smeared."""
    shape = (len(x), 1, *x.shape[2:])
    flakes = np.float32(mean) + np.float32(sd) * rng.standard_normal(shape, dtype=np.float32)
    flakes = _zoomed(flakes, size)
    flakes[flakes < threshold] = 0
    flakes = smeared(np.clip(flakes, 0, 1), reach, sigma, rng.uniform(-135, -45, len(x)))
    white = np.maximum(x, _grey(x) * np.float32(1.5) + np.float32(0.5))
    pale = np.float32(clear) * x + np.float32(1 - clear) * white
    made: Floats = pale + flakes + flakes[:, :, ::-1, ::-1]
    return made


def frost(x: Images, image: float, ice: float, rng: np.random.Generator) -> Floats:
    """The image and ice over it, mixed with those two weights. The ice is ours (see `_ice`)."""
    return np.float32(image) * x + np.float32(ice) * _ice(x.shape, rng)


def fog(x: Images, thickness: float, decay: float, rng: np.random.Generator) -> Floats:
    """A cloud (`plasma`) added, and the brightest value of the image kept."""
    side = 1 << (max(x.shape[2:]) - 1).bit_length()
    cloud = plasma(len(x), side, decay, rng)[:, None, : x.shape[2], : x.shape[3]]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    scale = brightest / (brightest + np.float32(thickness))
    made: Floats = (x + np.float32(thickness) * cloud) * scale
    return made


def brightness(x: Images, amount: float, rng: np.random.Generator) -> Floats:
    """`amount` added to the value of HSV; hue and saturation stay."""
    del rng
    if x.shape[1] != 3:
        return x + np.float32(amount)
    value = x.max(axis=1, keepdims=True)
    brighter = np.minimum(value + np.float32(amount), 1)
    made: Floats = np.where(value > 0, x * (brighter / np.maximum(value, 1e-12)), brighter)
    return made


# --- digital --------------------------------------------------------------------------------------


def contrast(x: Images, factor: float, rng: np.random.Generator) -> Floats:
    """Distances from each channel's mean over the image times `factor`."""
    del rng
    mean = x.mean(axis=(2, 3), keepdims=True)
    made: Floats = (x - mean) * np.float32(factor) + mean
    return made


def elastic_transform(
    x: Images, reach: float, sigma: float, corner: float, rng: np.random.Generator
) -> Images:
    """An affine map that moves three points at random, then a smooth random displacement.

    In units of the image's shorter side: displacements are uniform noise blurred by `sigma`, times
    `reach`; each coordinate of a point moves by up to `corner`.
    """
    side = min(x.shape[2:])
    x = _affine(x, corner * side, rng)
    noise = rng.uniform(-1, 1, (2, len(x), *x.shape[2:])).astype(np.float32)
    moves = gaussian_blur(noise, sigma * side, "symmetric", 3) * np.float32(reach * side)
    rows, columns = np.meshgrid(
        *(np.arange(n, dtype=np.float32) for n in x.shape[2:]), indexing="ij"
    )
    return _sampled(x, rows + moves[0], columns + moves[1])


def pixelate(x: Images, factor: float, rng: np.random.Generator) -> Floats:
    """Shrunk to `factor` of its size and enlarged again, both by box filters."""
    del rng
    height, width = x.shape[2:]
    small = (max(int(width * factor), 1), max(int(height * factor), 1))
    box = Image.Resampling.BOX
    planes = [
        Image.fromarray(plane).resize(small, box).resize((width, height), box)
        for plane in x.reshape(-1, height, width)
    ]
    return np.stack([np.asarray(plane) for plane in planes]).reshape(x.shape)


def jpeg_compression(x: Images, quality: int, rng: np.random.Generator) -> Images:
    """Through a JPEG file of that quality: in colour for three channels, else each one grey."""
    del rng
    pixels = np.round(x * 255).astype(np.uint8)
    in_colour = x.shape[1] == 3
    stored = pixels.transpose(0, 2, 3, 1) if in_colour else pixels.reshape(-1, *x.shape[2:])
    read = np.stack([_through_jpeg(np.ascontiguousarray(image), quality) for image in stored])
    found = read.transpose(0, 3, 1, 2) if in_colour else read.reshape(x.shape)
    return found.astype(np.float32) / np.float32(255)


def _through_jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# --- what they are made of ------------------------------------------------------------------------


def gaussian_blur(x: Images, sigma: float, border: str = "edge", cut: float = 4) -> Images:
    """Blurred by `sigma` pixels along the last two axes; the kernel ends at `cut` deviations."""
    reach = int(cut * sigma + 0.5)
    if not reach:
        return x
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (-2, -1):
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ _band(x.shape[axis], taps, border), -1, axis)
    return x


def _band(length: int, taps: Floats, border: str) -> Images:
    """The matrix (length, length) that filters rows by `taps`, the border as numpy.pad has it."""
    reach = len(taps) // 2
    index = np.pad(np.arange(length), reach, mode=border)  # type: ignore[call-overload]
    matrix = np.zeros((length, length))
    for out in range(length):
        np.add.at(matrix[:, out], index[out : out + len(taps)], taps)
    return matrix.astype(np.float32)


def _padded(x: Images, reach: int, border: str) -> Images:
    widths = [(0, 0), (0, 0), (reach, reach), (reach, reach)]
    padded: Images = np.pad(x, widths, mode=border)  # type: ignore[call-overload]
    return padded


def _window(padded: Images, row: int, column: int, like: Images) -> Images:
    return padded[:, :, row : row + like.shape[2], column : column + like.shape[3]]


def smeared(x: Images, reach: int, sigma: float, degrees: Floats) -> Images:
    """Each pixel the mean of those that follow it along a line, one angle for each image.

    2 reach + 1 taps of half a Gaussian, at the nearest pixels (as ImageMagick's MotionBlur does it,
    which made the published set); the border is repeated.
    """
    taps = np.exp(-(np.arange(2 * reach + 1) ** 2) / (2 * sigma**2)).astype(np.float32)
    taps /= taps.sum()
    taps = taps[taps > 1e-6]
    height, width = x.shape[2:]
    radians = np.deg2rad(degrees)
    out = np.zeros_like(x)
    images = np.arange(len(x))[:, None, None]
    pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    for i, tap in enumerate(taps):
        down = np.ceil(i * np.sin(radians) - 0.5).astype(int)
        right = np.ceil(i * np.cos(radians) - 0.5).astype(int)
        rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)[:, :, None]
        columns = np.clip(np.arange(width) + right[:, None], 0, width - 1)[:, None, :]
        out += tap * pixels[images, rows, columns].transpose(0, 3, 1, 2)
    return out


def _zoomed(x: Images, factor: float) -> Images:
    """The middle of the images enlarged, bilinear, to their own size."""
    rows, columns = (_enlarging(n, factor) for n in x.shape[2:])
    return np.ascontiguousarray(rows @ x @ columns.T)


def _enlarging(length: int, factor: float) -> Floats:
    """(length, length): crop the middle, interpolate with the ends in place, crop the middle."""
    kept = int(np.ceil(length / factor))
    start = (length - kept) // 2
    enlarged = max(round(kept * factor), length)
    first = (enlarged - length) // 2
    at = (first + np.arange(length)) * (kept - 1) / max(enlarged - 1, 1) + start
    distances = np.abs(np.arange(length) - at[:, None])
    made: Floats = np.maximum(0, 1 - distances).astype(np.float32)
    return made


def _affine(x: Images, move: float, rng: np.random.Generator) -> Images:
    """Three points about the middle moved by up to `move` along each axis, the rest with them."""
    centre = np.array(x.shape[2:]) // 2
    arm = min(x.shape[2:]) // 3
    points = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + rng.uniform(-move, move, (len(x), 3, 2))
    # where a pixel comes from: the map that takes the moved points back
    ones = np.ones((len(x), 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], 2), np.broadcast_to(points, moved.shape))
    grid = np.stack([*np.indices(x.shape[2:]), np.ones(x.shape[2:])], axis=-1)
    source = np.einsum("hwk,nkd->dnhw", grid, back).astype(np.float32)
    return _sampled(x, source[0], source[1])


def _sampled(x: Images, rows: Images, columns: Images) -> Floats:
    """Bilinear samples at (N, H, W) places in pixels; beyond the border the image is mirrored."""
    height, width = x.shape[2:]
    pixels = x.transpose(0, 2, 3, 1)
    images = np.arange(len(x))[:, None, None]
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    tops = [_mirrored(top + i, height) for i in (0, 1)]
    lefts = [_mirrored(left + i, width) for i in (0, 1)]
    across = [
        pixels[images, row, lefts[0]] * (1 - right) + pixels[images, row, lefts[1]] * right
        for row in tops
    ]
    mixed = across[0] * (1 - down) + across[1] * down
    return np.ascontiguousarray(mixed.transpose(0, 3, 1, 2), dtype=np.float32)


def _mirrored(index: NDArray[np.int_], length: int) -> NDArray[np.int_]:
    """Indices folded back at 0 and at length - 1."""
    period = max(2 * (length - 1), 1)
    folded = np.abs(index) % period
    return np.minimum(folded, period - folded) if length > 1 else folded * 0


def plasma(count: int, side: int, decay: float, rng: np.random.Generator) -> Floats:
    """Clouds (count, side, side) from 0 to 1 by the diamond-square algorithm, as on a torus.

    Midpoints are the mean of their four neighbours plus uniform noise, whose reach starts at 100^2
    and shrinks by decay^2 with each halving.
    """
    cloud = np.zeros((count, side, side))
    step, reach = side, 100.0**2
    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        middle = (pairs + np.roll(pairs, -1, 2)) / 4
        cloud[:, half::step, half::step] = middle + rng.uniform(-reach, reach, middle.shape)
        centres = cloud[:, half::step, half::step]
        for axis in (1, 2):  # the points between two corners, and between two centres
            mean = (
                corners + np.roll(corners, -1, axis) + centres + np.roll(centres, 1, 3 - axis)
            ) / 4
            noisy = mean + rng.uniform(-reach, reach, mean.shape)
            place = (slice(half, None, step), slice(None, None, step))
            cloud[:, place[axis - 1], place[2 - axis]] = noisy
        step, reach = half, reach / decay**2
    cloud -= cloud.min(axis=(1, 2), keepdims=True)
    cloud /= cloud.max(axis=(1, 2), keepdims=True)
    return cloud.astype(np.float32)


def _ice(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Procedural ice (N, C, H, W): needles along the creases of noise at four scales, bluish.

    Stands for the paper's photographs of frost, with about their brightness (mean .5) and grain.
    """
    count, channels, height, width = shape
    ice = np.zeros((count, height, width), np.float32)
    for sigma, weight in ((5.0, 0.2), (2.5, 0.3), (1.2, 0.3), (0.6, 0.2)):
        noise = gaussian_blur(rng.standard_normal((count, height, width), dtype=np.float32), sigma)
        noise /= noise.std(axis=(1, 2), keepdims=True)
        ice += np.float32(weight) * np.maximum(0, 1 - np.abs(noise)) ** 2
    low, high = (np.quantile(ice, q, axis=(1, 2), keepdims=True) for q in (0.02, 0.98))
    ice = np.clip((ice - low) / (high - low), 0, 1).astype(np.float32)[:, None]
    if channels != 3:
        return np.broadcast_to(0.15 + 0.85 * ice, shape).astype(np.float32)
    tint = np.array([0.10, 0.17, 0.25], np.float32).reshape(1, 3, 1, 1)
    return tint + (1 - tint) * ice


def _grey(x: Images) -> Floats:
    """(N, 1, H, W): the luma of three channels, else their mean."""
    if x.shape[1] != 3:
        made: Floats = x.mean(axis=1, keepdims=True)
        return made
    return np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), x, axes=(0, 1))[:, None]


def _each(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, _each(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(shot_noise, _each(500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(impulse_noise, _each(0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Corruption(
        glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Corruption(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(zoom_blur, _each(1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(brightness, _each(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(contrast, _each(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(pixelate, _each(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(jpeg_compression, _each(80, 65, 58, 50, 40)),
}
