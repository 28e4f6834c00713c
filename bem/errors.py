"""Every error that BEM raises on purpose, in one tree.

    BemError
    ├── ConfigError        a config file or option that cannot be right
    ├── DataError          a data file or row that cannot be used
    ├── AttachError        a model that cannot be adapted as asked
    │   └── BaseError      a model that cannot be found, fetched or read
    ├── CacheError         a KV cache that does not fit the adapter
    ├── CheckpointError    a checkpoint that is missing, foreign or changed
    │   └── BaseMismatch   made for another base model
    ├── TrainingError      training stopped; the last good state is kept
    │   └── Diverged       the loss or a gradient was not finite
    ├── EngineError        a request or a model that the engine cannot serve
    │   └── QueueFull      too many requests wait
    ├── SafetyError        a guard that was not accepted, is broken, or may not be moved so
    ├── Refused            a request that the server turns away, with its HTTP status
    ├── Unreachable        a server that does not answer
    ├── MeasurementError   a number that could not be measured
    ├── OnlineError        feedback that could not be kept, or a learner that cannot go on
    ├── NotAccepted        promotion or rollback refused: no verdict says PROMOTE, or it never did
    └── MissingExtra       an optional library is not installed

The command line prints these as one message without a traceback; anything else is a defect of ours.
"""


class BemError(Exception):
    """Base of all errors that BEM raises on purpose."""


class ConfigError(BemError):
    """A config file or option that cannot be right."""


class DataError(BemError):
    """A data file or row that cannot be used."""


class AttachError(BemError):
    """A model that cannot be adapted as asked."""


class BaseError(AttachError):
    """A model that cannot be found, fetched or read."""


class CacheError(BemError):
    """A KV cache that does not fit the adapter."""


class CheckpointError(BemError):
    """A checkpoint that is missing, foreign or changed."""


class BaseMismatch(CheckpointError):
    """A checkpoint that was made for another base model."""


class TrainingError(BemError):
    """Training stopped; the last good state is kept."""


class Diverged(TrainingError):
    """The loss or a gradient was not finite."""


class EngineError(BemError):
    """A request or a model that the engine cannot serve."""


class QueueFull(EngineError):
    """Too many requests wait."""


class SafetyError(BemError):
    """A guard that was not accepted, is broken, or may not be moved so."""


class Refused(BemError):
    """A request that the server turns away, as OpenAI's protocol tells it.

    Args:
        status: of HTTP.
        message: what happened, and what to do.
        param: field of the request that is at fault; None: none is.
        code: for programs, such as `model_not_found`.
        retry_after_s: after how long it is worth another try; None: it is not, as it stands.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s


class Unreachable(BemError):
    """A server that does not answer."""


class MeasurementError(BemError):
    """A number that could not be measured."""


class OnlineError(BemError):
    """Feedback that could not be kept, or a learner that cannot go on; what was acknowledged is whole."""


class NotAccepted(BemError):
    """Promotion or rollback refused: no verdict says PROMOTE, or it never did."""


class MissingExtra(BemError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {library}: pip install 'bem[{extra}]'")
