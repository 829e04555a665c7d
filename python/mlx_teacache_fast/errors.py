"""Typed errors and warnings. Bad values are ValueError too, so ``except ValueError`` keeps working."""


class TeaCacheError(Exception):
    """Base class of every error that this package raises on purpose."""


class TeaCacheValueError(TeaCacheError, ValueError):
    """An argument has the wrong type or value; the message names the parameter and what was given."""


class InvalidStepWindowError(TeaCacheValueError):
    """The forced first and last steps leave no step of the schedule for the gate to decide."""


class IncompatibleModelError(TeaCacheError, TypeError):
    """The object is not a pipeline whose steps can be skipped here."""


class AlreadyPatchedError(TeaCacheError):
    """``apply`` was called on a pipeline that a live handle has patched already."""


class PatchLostError(TeaCacheError):
    """Something replaced what ``apply`` had put in place (callbacks, for example), so gating cannot work."""


class TeaCacheWarning(UserWarning):
    """Base class of this package's warnings."""


class DisabledWarning(TeaCacheWarning):
    """A threshold of 0 turns gating off: every step computes."""


class NoBenefitWarning(TeaCacheWarning):
    """Nothing can be skipped: a distilled model's few steps, or a schedule as short as the forced steps."""


class UntestedVersionWarning(TeaCacheWarning):
    """The installed mflux is newer than the newest one that was verified."""
