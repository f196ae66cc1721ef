"""Every error a user can cause. The command line prints one in one line and exits with code 2."""


class CoterieError(Exception):
    """Base of all of them."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0]) if self.args else ""


class ArgumentError(CoterieError, ValueError):
    """A wrong shape, dtype, device or option: what was expected, what was found."""


class CheckpointError(CoterieError, ValueError):
    """A checkpoint that cannot be read or written: names the file, the tensor, expected and found."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that is not in the checkpoint: lists every name tried."""


class UnsupportedModelError(CoterieError, ValueError):
    """A model whose experts cannot be computed here: names its class and the reason."""


class DeviceError(CoterieError, RuntimeError):
    """The machine lacks what was asked for."""


class TicketError(CoterieError, RuntimeError):
    """A ticket of another process, or of one that ends: nobody will do its work."""


class StateError(CoterieError, RuntimeError):
    """A call that comes too early, or once too often: names the one to make first."""
