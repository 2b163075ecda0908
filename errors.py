"""Every error that s4v raises on purpose.

    S4vError                      exit code 1: the user's input does not fit
    ├── ConfigError               an option's value is out of range, or two options contradict each other
    ├── DatasetError              files or annotations are not as the data set's reader expects them
    │   └── DataNotFoundError     the folder or file is not there
    ├── BackboneError             no such model, or one that s4v cannot use
    ├── WeightsError              weights are missing, unreadable, or belong to another model
    ├── NoGoodVideoError          not one video could be decoded
    ├── StoreError
    │   ├── StoreNotFoundError    nothing there, or something that is not a store
    │   ├── StoreExistsError      writing would replace a store
    │   ├── StoreBusyError        another process is writing there
    │   │   └── LeaseLostError    exit code 5: this process was stopped for long, and another one took over
    │   ├── StoreMismatchError    the store does not hold what the run or the command needs
    │   └── StoreDamagedError     exit code 4: bytes on disk are not the bytes that were written
    ├── RunError
    │   ├── RunNotFoundError      nothing there, or something that is not a run
    │   └── RunExistsError        writing would replace a run
    └── EnvironmentFailedError    exit code 5: the disk is full, a layer produced NaN, a child would not start

A message says what was expected, what was found, where, and what to do next. A class that matches a builtin
also derives from it, so that callers who know nothing of s4v can catch it.
"""


class S4vError(Exception):
    """Base of every error that s4v raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class ConfigError(S4vError, ValueError):
    """An option's value is out of range, or two options contradict each other."""


class DatasetError(S4vError, ValueError):
    """Files or annotations are not as the data set's reader expects them."""


class DataNotFoundError(DatasetError, FileNotFoundError):
    """The folder or file of a data set is not there."""


class BackboneError(S4vError, ValueError):
    """No such model, or one that s4v cannot use."""


class WeightsError(S4vError, ValueError):
    """Weights are missing, unreadable, or belong to another model."""


class NoGoodVideoError(S4vError, RuntimeError):
    """Not one video could be decoded."""


class StoreError(S4vError):
    """Base of what can be wrong with a store."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """Nothing there, or something that is not a store."""


class StoreExistsError(StoreError, FileExistsError):
    """Writing would replace a store."""


class StoreBusyError(StoreError, BlockingIOError):
    """Another process is writing there."""


class LeaseLostError(StoreBusyError):
    """This process was stopped or cut off for so long that another one took over what it was writing to."""

    exit_code = 5


class StoreMismatchError(StoreError, ValueError):
    """The store does not hold what the run or the command needs."""


class StoreDamagedError(StoreError, OSError):
    """Bytes on disk are not the bytes that were written.

    Args:
        row: Of the store, whose bytes they are, where it is one row's.
    """

    exit_code = 4

    def __init__(self, *arguments: object, row: int | None = None) -> None:
        super().__init__(*arguments)
        self.row = row


class RunError(S4vError):
    """Base of what can be wrong with a run's folder."""


class RunNotFoundError(RunError, FileNotFoundError):
    """Nothing there, or something that is not a run."""


class RunExistsError(RunError, FileExistsError):
    """Writing would replace a run."""


class EnvironmentFailedError(S4vError, RuntimeError):
    """The machine failed, not the input: a full disk, NaN in a layer, a child that would not start."""

    exit_code = 5
