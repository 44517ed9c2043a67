"""What a sampler is: a deterministic map from logits and uniforms to sparse targets."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sparselogits.targets import SparseTargets


class Sampler(Protocol):
    """Turns a teacher's logits into sparse targets.

    Attributes:
        name: the word that selects it on the command line and stands in the identity.
        unbiased: whether the expectation of the targets over the uniforms is the teacher's
            distribution. Missing-mass rules of the loss are for samplers where it is not.
        rounds: rounds a position, or None where entries are not drawn in rounds of equal weight.
        uniforms_per_position: columns U of the uniforms it consumes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def unbiased(self) -> bool: ...  # noqa: D102

    @property
    def rounds(self) -> int | None: ...  # noqa: D102

    @property
    def uniforms_per_position(self) -> int: ...  # noqa: D102

    def parameters(self) -> dict[str, Any]:
        """JSON values that, with the name, rebuild the sampler; part of the cache's identity."""
        ...

    def at(self, tokens: Tensor, positions: slice | Tensor) -> Sampler:
        """The sampler for these positions of one window.

        Args:
            tokens: int64 [L], the window's tokens.
            positions: those whose logits come next: a run, or int64 indices where some are masked.

        Returns:
            Itself, unless the sampler spends its rounds by what a student knows of the window.
        """
        ...

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Sample.

        Args:
            logits: float [P, V] of any floating dtype; ids that are no token hold -inf.
            uniforms: float64 [P, uniforms_per_position] in [0, 1).

        Raises:
            InvalidLogitsError: NaN, +inf, a row of -inf only, or shapes that do not fit.
        """
        ...
