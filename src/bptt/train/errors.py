"""What can go wrong in ways a user can put right. Each message is one line that names what to change."""

from __future__ import annotations

__all__ = ["DamagedError", "InputError", "NonFiniteError"]


class InputError(ValueError):
    """Something the user gave cannot be used: an option, a text, a run directory, a missing extra."""


class DamagedError(InputError):
    """A checkpoint was cut short or altered since it was written."""


class NonFiniteError(ArithmeticError):
    """Loss, gradient or state stopped being finite. The weights are those before the step that failed."""
