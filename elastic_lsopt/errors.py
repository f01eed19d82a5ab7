"""Errors that a user can mend: each message names the thing, the value, the limit and the fix, in one line."""


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints it as one line and exits with code 2."""


class Unsupported(UserError):
    """A combination that no test covers: refused at construction, never run on a silent fallback."""


class Diverged(UserError):
    """A job's loss or gradient was not finite for so many steps in a row that it ends; its good checkpoints stay."""


class StaleGeneration(RuntimeError):
    """A space, vector or borrowed gradient of an older generation was used."""


class StaleGradient(RuntimeError):
    """A borrowed gradient was read after the backward pass that overwrote it; keep it with `.clone()`."""


class StaleWeights(RuntimeError):
    """Gathered copies of the weights may be wrong after an exception; call the collective `space.resync()` first."""


class NonFinite(ArithmeticError):
    """A loss or gradient was inf or NaN on some rank; every rank raises it at the same point."""


class PeerFailed(RuntimeError):
    """Another rank raised inside this pass; the message names the rank and what it raised."""
