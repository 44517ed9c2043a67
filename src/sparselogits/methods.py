"""Define the table of training methods: their names, losses and requirements.

Recipes, the command line, `SparseKDTrainer`, comparisons and reports read this table. To add a
divergence, implement it in `losses/dense.py` and add a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError
from sparselogits.untrusted import shown

BATCH_WINDOWS = 8
"""Number of windows per batch and device if a recipe does not set it."""


@dataclass(frozen=True)
class TrainingMethod:
    """Description of one method to train a student.

    Args:
        name: name in recipes and on the command line.
        title: name in tables and charts.
        loss: description of the loss, for help texts and tables.
        cached: whether the loss uses the cached targets.
        divergence: key in `losses.DIVERGENCES` of the divergence to a teacher that runs online;
            None for a method without an online teacher.
        beta: default share of the teacher in the divergence's mixture, in (0, 1); None for a
            divergence without a mixture.
    """

    name: str
    title: str
    loss: str
    cached: bool = False
    divergence: str | None = None
    beta: float | None = None

    @property
    def online(self) -> bool:
        """Whether the teacher runs in every training step."""
        return self.divergence is not None


METHODS = {
    method.name: method
    for method in (
        TrainingMethod("sparse", "sparse KD", "cross-entropy to the cached targets", cached=True),
        TrainingMethod("ce", "CE", "cross-entropy to the labels"),
        TrainingMethod("full", "full KD", "KL(teacher || student)", divergence="forward_kl"),
        TrainingMethod(
            "reverse_kl", "reverse KL", "KL(student || teacher)", divergence="reverse_kl"
        ),
        TrainingMethod(
            "jensen_shannon",
            "Jensen-Shannon",
            "Jensen-Shannon divergence of teacher and student, with share beta of the teacher",
            divergence="jensen_shannon",
            beta=0.5,
        ),
    )
}
"""Training methods by name."""

ONLINE = [name for name, method in METHODS.items() if method.online]
"""Names of the methods that run the teacher in every training step."""


def listed(names: list[str], last: str = "and") -> str:
    """Join names into an enumeration such as `a, b and c`; `last` replaces the word `and`."""
    return f" {last} ".join(", ".join(names).rsplit(", ", 1))


METHODS_IN_WORDS = "; ".join(
    f"{name}: {method.loss}{', teacher online' if method.online else ''}"
    for name, method in METHODS.items()
)
"""Names and losses of all methods, for help texts."""


def find_method(name: object) -> TrainingMethod:
    """Return the training method with a name. Raises InvalidArgumentError if it is unknown."""
    if not isinstance(name, str) or name not in METHODS:
        raise InvalidArgumentError(f"unknown method {shown(name)}; available: {', '.join(METHODS)}")
    return METHODS[name]


def require_fits(
    method: TrainingMethod, *, teacher: bool, beta: float | None, cosine: float = 0.0
) -> None:
    """Validate that the settings given with a training method fit the method.

    Args:
        method: training method.
        teacher: whether a teacher is given.
        beta: share of the teacher in the mixture; None for the default of the method.
        cosine: weight of the cosine loss between hidden states.

    Raises:
        InvalidArgumentError: a teacher is missing or superfluous, beta or the cosine loss would
            have no effect, or beta is not in (0, 1).
    """
    if cosine and not method.online:
        raise InvalidArgumentError(
            f"method {method.name!r} has no cosine loss, but cosine={cosine:g} is given: this loss "
            "compares the student's hidden states with the teacher's, which a cache does not "
            f"contain. Leave cosine out, or choose a method with the teacher online "
            f"({listed(ONLINE, 'or')})"
        )
    if method.online and not teacher:
        raise InvalidArgumentError(
            f"method {method.name!r} runs the teacher online, but no teacher is given; give the "
            "cache's teacher, or choose a method without an online teacher"
        )
    if teacher and not method.online:
        raise InvalidArgumentError(
            f"method {method.name!r} does not use a teacher, but one is given; remove the teacher, "
            f"or choose {listed(ONLINE, 'or')}"
        )
    if beta is None:
        return
    if method.beta is None:
        with_beta = [name for name, other in METHODS.items() if other.beta is not None]
        raise InvalidArgumentError(
            f"method {method.name!r} has no beta, but beta={beta:g} is given; remove beta, or "
            f"choose {listed(with_beta, 'or')}"
        )
    if not 0.0 < beta < 1.0:
        raise InvalidArgumentError(
            f"beta must be in (0, 1), found {beta:g}; at the limits choose the methods full or "
            "reverse_kl"
        )
