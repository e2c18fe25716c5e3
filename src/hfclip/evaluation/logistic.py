"""Multinomial logistic regression by L-BFGS on all samples at once, for many lambdas on the same data.

    loss(W, b) = sum_i [log sum_k exp(z_ik) - z_i,y_i] + lambda / 2 * |W - W_0|^2,    z_i = W x_i + b

The loss is a sum over samples, not a mean, and b is not penalised: it is that of scikit-learn's
`LogisticRegression(C=1 / lambda)`, whose W_0 is 0. Of two classes, as there, the one vector w = w_1 - w_0 is penalised.

L-BFGS (Liu and Nocedal 1989) takes few steps where all directions are curved alike. To centre features and turn them to
their principal axes u changes neither loss nor penalty, and brings most of the second derivative to its diagonal,
lambda + sum_i p_ik (1 - p_ik) u_ij^2 for class k and axis j. Parameters are counted in units of its inverse square root where
the descent begins, which is at the solution for another lambda if there is one.

Matrix products are of float32, tile by tile, so that memory beyond the features is bounded; sums over tiles, parameters and
steps are of float64.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..inference import optimize_for_inference


TILE, DEVICE_TILE = 1 << 24, 1 << 28  # features and logits in a product
HISTORY = 10  # steps from which L-BFGS knows the curvature
TRIALS = 20  # step lengths tried per iteration
ROUNDING = 1e-7  # of the loss, from float32
TOLERANCE = 1e-7
MAX_ITERATIONS = 1000  # the paper's


class Fit(NamedTuple):
    """A solution: weight (num_classes, dim) and bias (num_classes,), float64; both belong to features as they came."""

    weight: Tensor
    bias: Tensor
    lam: float
    loss: float
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(num_samples, num_classes), float32, of features (num_samples, dim)."""
        weight, bias = (part.to(features.device, torch.float32) for part in (self.weight, self.bias))
        return torch.addmm(bias, features.float(), weight.T)


class LogisticRegression:
    """Labelled features, prepared once for any number of lambdas.

    Args:
        features: (num_samples, dim), on the device that computes.
        targets: (num_samples,) integers from 0 to num_classes - 1. A class that does not occur is never predicted: its
            weight is 0 and its bias minus infinity.
        num_classes: at least 2, of which at least 2 occur.
        prior: (num_classes, dim), W_0, the distance from which is penalised. There is no bias then, so that a large lambda
            leaves the classifier that the prior is. None: 0, and a bias.

    Raises:
        UsageError: shapes that do not fit, features that are not finite, targets out of range, fewer than two classes.
    """

    are_exclusive = True  # a sample is of one class

    def __init__(self, features: Tensor, targets: Tensor, num_classes: int, prior: Tensor | None = None):
        _check(features, targets, num_classes, prior)
        self.num_classes, self.device = num_classes, features.device
        self.classes, targets = self._used(targets.to(self.device))
        self.has_bias = prior is None
        self.mean = features.mean(0, dtype=torch.float64) * self.has_bias
        prior = self.mean.new_zeros(num_classes, len(self.mean)) if prior is None else prior.to(self.mean)
        self.prior = prior[self.classes]
        tile = TILE if self.device.type == "cpu" else DEVICE_TILE
        rows = max(tile // (len(self.mean) + len(self.classes)), 1)
        self.axes = _principal_axes(features, self.mean, rows)
        self.tiles = []  # features along the axes, targets, and the prior's logits
        for part, of_part in zip(features.split(rows), targets.split(rows), strict=True):
            centred = part.double() - self.mean
            offsets = None if self.has_bias else (centred @ self.prior.T).float()
            self.tiles.append(((centred @ self.axes).float(), of_part, offsets))
        self.layer = nn.Linear(self.axes.shape[1], len(self.classes), device=self.device)
        with suppress(RuntimeError):  # without oneDNN
            optimize_for_inference(self.layer)

    def _used(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The classes that occur, and the place of each sample's among them, `(num_samples, 1)`."""
        classes, places = targets.unique(return_inverse=True)
        return classes, places[:, None]

    @torch.no_grad()
    def fit(
        self,
        lam: float,
        start: Fit | None = None,
        *,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> Fit:
        """The minimum for one lambda.

        Args:
            lam: lambda, above 0.
            start: a solution near which this one is expected: for another lambda, or of part of the data. None: W_0.
            tolerance: it has converged when both the decrease that L-BFGS expects and the last one are at most
                this part of the loss.
            max_iterations: of L-BFGS, after which it stops without having converged.
        """
        if not (lam > 0 and math.isfinite(lam)):
            raise UsageError(f"lambda is {lam}: expected a finite number above 0.")
        # Of two classes w_0 = -w_1 at the minimum, and so |w_1 - w_0|^2 = 2 |W|^2.
        penalty = 2 * lam if self.are_exclusive and len(self.classes) == 2 else lam
        origin = self._along_axes(start)
        with torch.autocast(self.device.type, enabled=False):  # its products would be of half precision
            units = self._curvature(origin, penalty).rsqrt_()

            def loss(params: Tensor) -> tuple[Tensor, Tensor]:
                value, gradient = self._loss(origin + units * params, penalty)
                return value, gradient.mul_(units)

            found, value, iterations, converged = minimise(loss, torch.zeros_like(origin), tolerance, max_iterations)
        return Fit(*self._as_they_came(origin + units * found), lam, value, iterations, converged)

    def _along_axes(self, start: Fit | None) -> Tensor:
        """(num_axes + 1, num_classes): weights beyond the prior along the axes, and last the bias at the features' mean."""
        if start is None:
            shape = self.axes.shape[1] + 1, len(self.classes)
            return torch.zeros(shape, dtype=torch.float64, device=self.device)
        weight, bias = (part.to(self.prior)[self.classes] for part in (start.weight, start.bias))
        bias = torch.where(bias.isfinite(), bias, bias[bias.isfinite()].min()) + weight @ self.mean
        return torch.cat([self.axes.T @ (weight - self.prior).T, bias[None]])

    def _as_they_came(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of all classes, for features that are neither centred nor turned."""
        weight = self.prior.new_zeros(self.num_classes, self.prior.shape[1])
        weight[self.classes] = self.prior + (self.axes @ params[:-1]).T
        bias = self.prior.new_full((self.num_classes,), -torch.inf)
        shift = params[-1].mean() if self.are_exclusive else 0
        bias[self.classes] = params[-1] - shift - weight[self.classes] @ self.mean
        return weight, bias

    def _logits(self, params: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, targets and logits, (rows, num_classes) in float32, of each tile."""
        self.layer.weight.copy_(params[:-1].T)
        self.layer.bias.copy_(params[-1])
        for features, targets, offsets in self.tiles:
            logits = self.layer(features)
            yield features, targets, logits if offsets is None else logits.add_(offsets)

    def _loss(self, params: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """The loss and its gradient, of the shape of `params`."""
        loss, gradient = penalty / 2 * params[:-1].square().sum(), penalty * params
        gradient[-1] = 0
        for features, targets, logits in self._logits(params):
            losses, errors = self._errors(logits, targets)
            loss += losses.sum(dtype=torch.float64)
            gradient[:-1] += features.T @ errors
            gradient[-1] += errors.sum(0) * self.has_bias
        return loss, gradient

    def _errors(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of samples, and their derivatives by the logits, which are overwritten."""
        largest = logits.amax(1, keepdim=True)
        short = largest - logits.gather(1, targets)
        # Without that of its target a row adds up what is wrong with it, to the last digit even where it is 1e-20.
        odds = logits.sub_(largest).exp_().scatter_(1, targets, 0)
        wrong, right = odds.sum(1, keepdim=True), short.neg().exp_()
        total = wrong + right
        return short + (wrong + (right - 1)).log1p_(), odds.div_(total).scatter_(1, targets, -wrong / total)

    def _curvatures(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Second derivatives of the losses by each logit."""
        shares = logits.softmax(1)
        return shares.mul_(1 - shares)

    def _curvature(self, params: Tensor, penalty: float) -> Tensor:
        """The diagonal of the second derivative, of the shape of `params`."""
        curvature = torch.full_like(params, penalty)
        curvature[-1] = min(penalty, 1)  # where all is classified with certainty it would be 0
        for features, targets, logits in self._logits(params):
            shares = self._curvatures(logits, targets)
            curvature[:-1] += features.square().T @ shares
            curvature[-1] += shares.sum(0)
        return curvature


class LabelRegressions(LogisticRegression):
    """A logistic regression for each label by itself, of samples that may have several; lambda is of each.

    loss(w, b) = sum_i log(1 + exp(-y_i z_i)) + lambda / 2 * |w|^2,    z_i = w x_i + b,    y_i = 1 with the label, else -1

    Args:
        targets: (num_samples, num_classes), above 0 for the labels of a sample, below 0 for what is ignored. A label that
            no sample has is never predicted.

    Raises:
        UsageError: see `LogisticRegression`; there is no label that some samples have and others not.
    """

    are_exclusive = False

    def _used(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        classes = ((targets > 0).any(0) & (targets == 0).any(0)).nonzero().flatten()
        return classes, targets[:, classes]

    def _errors(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        counted, has_label = targets >= 0, targets > 0
        losses = F.softplus(torch.where(has_label, -logits, logits)) * counted
        # 1 - sigmoid would lose the digits of what is nearly certain.
        errors = torch.where(has_label, -logits.neg().sigmoid(), logits.sigmoid())
        return losses, errors.mul_(counted)

    def _curvatures(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sigmoid() * logits.neg().sigmoid() * (targets >= 0)


def minimise(
    loss: Callable[[Tensor], tuple[Tensor, Tensor]], params: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, float, int, bool]:
    """The minimum of a convex function by L-BFGS, from `params` on.

    Args:
        loss: gives value and gradient.
        tolerance, max_iterations: see `LogisticRegression.fit`.

    Returns:
        Parameters, value, iterations, and whether it has converged.
    """
    value, gradient = loss(params)
    value, decrease, memory = value.item(), math.inf, _Memory(params)
    for iteration in range(max_iterations + 1):
        direction = -memory.times_inverse_hessian(gradient.flatten()).view_as(params)
        slope = (gradient * direction).sum().item()
        converged = max(-slope / 2, decrease) <= tolerance * value
        if converged or iteration == max_iterations:
            break
        found = _search(lambda length: loss(params + length * direction), direction, value, slope)
        if found is None:
            break
        length, new_value, new_gradient = found
        step = length * direction
        memory.add(step.flatten(), (new_gradient - gradient).flatten())
        params, decrease, value, gradient = params + step, value - new_value, new_value, new_gradient
    return params, value, iteration, converged


class _Memory:
    """The latest steps of L-BFGS, and the inverse Hessian that follows from them.

    In the compact form of Byrd, Nocedal and Schnabel (1994, theorem 2.2), whose matrix products take one pass over the
    steps; their inner products are kept.
    """

    def __init__(self, params: Tensor):
        self.steps = self.changes = params.new_empty(0, params.numel())
        self.products = self.squares = params.new_empty(0, 0)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Keeps a step and the change of the gradient by it."""
        if step @ change <= 0:  # rounding alone: the function is convex
            return
        self.steps, self.changes = (
            torch.cat([old[-HISTORY + 1 :], new[None]]) for old, new in ((self.steps, step), (self.changes, change))
        )
        self.products = self._extended(self.products, self.steps @ change)
        self.squares = self._extended(self.squares, self.changes @ change)

    def times_inverse_hessian(self, vector: Tensor) -> Tensor:
        """The product with a vector."""
        if len(self.steps) == 0:
            return vector
        scale, triangle = self.products[-1, -1] / self.squares[-1, -1], self.products.triu()
        along = torch.linalg.solve_triangular(triangle, (self.steps @ vector)[:, None], upper=True)
        rest = self.squares @ along - (self.changes @ vector)[:, None]
        rest = self.products.diagonal()[:, None] * along + scale * rest
        rest = torch.linalg.solve_triangular(triangle.T, rest, upper=False)
        return scale * vector + rest[:, 0] @ self.steps - scale * (along[:, 0] @ self.changes)

    @staticmethod
    def _extended(matrix: Tensor, column: Tensor) -> Tensor:
        """The matrix of the latest, symmetric or read above its diagonal alone, with a column more."""
        size = len(column)
        extended = column.expand(size, size).clone()
        extended[:-1, :-1] = matrix[1 - size :, 1 - size :] if size > 1 else matrix
        extended[:, -1] = column
        return extended


def _search(
    loss: Callable[[float], tuple[Tensor, Tensor]], direction: Tensor, value: float, slope: float
) -> tuple[float, float, Tensor] | None:
    """A step length that meets the strong Wolfe conditions, with value and gradient there; None if rounding hides it.

    Along a line the slope of a convex function only grows, so that lengths are found by its secant alone.
    """
    low, low_slope, high, high_slope, length = 0.0, slope, None, None, 1.0
    for _ in range(TRIALS):
        new_value, gradient = loss(length)
        new_value, new_slope = torch.stack([new_value, (gradient * direction).sum()]).tolist()
        too_high = not new_value <= value + 1e-4 * length * slope + ROUNDING * abs(value)
        if not too_high and abs(new_slope) <= 0.9 * -slope:
            return length, new_value, gradient
        if too_high or new_slope > 0:
            high, high_slope = length, new_slope
        else:
            low, low_slope = length, new_slope
        if high is None:
            length *= 4
        else:
            share = low_slope / (low_slope - high_slope) if high_slope > 0 else 0.5
            length = low + (high - low) * min(max(share, 0.1), 0.9)
    return None


def _principal_axes(features: Tensor, mean: Tensor, rows: int) -> Tensor:
    """(dim, num_axes) orthonormal float64: as many axes as there are dimensions, or samples if they are fewer."""
    span = None
    if len(features) < features.shape[1]:
        span = torch.linalg.qr((features.double() - mean).T).Q
    gram = 0
    for tile in features.split(rows):
        tile = tile.double() - mean
        tile = (tile if span is None else tile @ span).float()
        gram = gram + (tile.T @ tile).double()
    axes = torch.linalg.eigh(gram).eigenvectors
    return axes if span is None else span @ axes


def _check(features: Tensor, targets: Tensor, num_classes: int, prior: Tensor | None) -> None:
    are_rows = targets.ndim == 2 and targets.shape == (len(features), num_classes)
    if features.ndim != 2 or not are_rows and (targets.shape != features.shape[:1] or targets.is_floating_point()):
        raise UsageError(
            f"features are {tuple(features.shape)} and targets {tuple(targets.shape)} of {targets.dtype}: expected "
            "(num_samples, dim) and an integer per sample."
        )
    if not features.isfinite().all():
        index = (~features.isfinite()).any(1).nonzero()[0].item()
        raise UsageError(f"the features of sample {index} are not finite: check the model's weights.")
    if are_rows:
        if not ((targets > 0).any(0) & (targets == 0).any(0)).any():
            raise UsageError("found no label that some samples have and others have not: expected one or more.")
        return
    if len(outside := targets[(targets < 0) | (targets >= num_classes)]):
        raise UsageError(f"found target {outside[0].item()}: expected 0 to {num_classes - 1}.")
    if (found := len(targets.unique())) < 2:
        raise UsageError(f"found samples of {found} class{'es' * (found != 1)}: expected two or more to tell apart.")
    if prior is not None and prior.shape != (num_classes, features.shape[1]):
        raise UsageError(f"prior is {tuple(prior.shape)}: expected {(num_classes, features.shape[1])}.")
