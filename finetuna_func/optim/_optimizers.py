"""Whole optimizers: the chains that have names."""

from __future__ import annotations

from torch import Tensor

from finetuna_func.optim._base import GradientTransformation
from finetuna_func.optim._checks import DECAY, check_number
from finetuna_func.optim._combinators import chain
from finetuna_func.optim._transforms import (
    LearningRate,
    add_decayed_weights,
    identity,
    scale_by_adam,
    scale_by_learning_rate,
    trace,
)


def sgd(
    learning_rate: LearningRate,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Tensor = 0.0,
) -> GradientTransformation:
    """Returns stochastic gradient descent; the same steps as ``torch.optim.SGD``.

    Args:
        learning_rate: Size of a step; see `scale_by_learning_rate`.
        momentum: Decay of the sum of past gradients, in ``[0, 1)``; 0 keeps no sum.
        nesterov: Whether the sum is looked ahead by one step
            (`Sutskever et al. 2013 <https://proceedings.mlr.press/v28/sutskever13.html>`_).
        weight_decay: L2 penalty, added to the gradient before the momentum. A number or ``(N,)``.

    Raises:
        ValueError: A value is out of range, or ``nesterov`` without momentum.

    Example:
        >>> tx = sgd(0.1, momentum=0.9)
        >>> state = tx.init({"w": torch.zeros(1)})
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.ones(1)}, state)
        >>> updates
        {'w': tensor([-0.1900])}
    """
    check_number("sgd", "momentum", momentum, DECAY)
    if nesterov and momentum == 0:
        raise ValueError("sgd(nesterov=True, momentum=0.0): Nesterov's step needs a momentum above 0, such as 0.9.")
    return chain(
        add_decayed_weights(weight_decay),
        trace(momentum, nesterov) if momentum else identity(),
        scale_by_learning_rate(learning_rate),
    )


def adam(learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Returns Adam; the same steps as ``torch.optim.Adam``. Arguments and errors as in `adamw`.

    Source: `Adam <https://arxiv.org/abs/1412.6980>`_.

    Example:
        >>> tx = adam(0.1)
        >>> tx.update({"w": torch.tensor([3.0, -4.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-0.1000,  0.1000])}
    """
    return chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
) -> GradientTransformation:
    """Returns Adam with decoupled weight decay; the same steps as ``torch.optim.AdamW``.

    A step subtracts ``learning_rate * (adam's direction + weight_decay * param)``. Where params and
    gradients are zero, as in zero-padded LoRA rows, they stay exactly zero.

    Args:
        learning_rate: Size of a step; see `scale_by_learning_rate`.
        b1: Decay of the mean of gradients, in ``[0, 1)``.
        b2: Decay of the mean of squared gradients, in ``[0, 1)``.
        eps: Added to the root of the mean square; above 0.
        weight_decay: Decoupled decay, at least 0. A number or ``(N,)``. Unless it is 0, ``update``
            needs ``params``.

    Raises:
        ValueError: A value is out of range.

    Source: `Decoupled weight decay regularization <https://arxiv.org/abs/1711.05101>`_.

    Example:
        >>> tx = adamw(0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([2.0])}
        >>> tx.update({"w": torch.tensor([3.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.2000])}
    """
    return chain(
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
