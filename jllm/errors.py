"""The errors jllm raises, each with the one sentence a user will read."""


class JllmError(Exception):
    """Base of every error that jllm raises on purpose."""


class ConfigError(JllmError, ValueError):
    """An engine option is wrong; raised before anything is loaded."""


class UnsupportedModelError(JllmError, ValueError):
    """The architecture, or a value of its config.json, is not supported."""


class CheckpointError(JllmError, ValueError):
    """A checkpoint file is missing, damaged, or does not match its config."""


class ModelNotFoundError(JllmError, ValueError):
    """No model directory or repository of that name."""


class InvalidRequestError(JllmError, ValueError):
    """A request field has the wrong type or lies outside its range.

    Attributes:
        parameter: Name of the offending field, as the user wrote it.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        """Stores the sentence and the name of the field it is about."""
        super().__init__(message)
        self.parameter = parameter


class ContextTooLongError(InvalidRequestError):
    """The prompt, or prompt and output together, exceed the context or the KV pool."""


class EngineStoppedError(JllmError, RuntimeError):
    """The engine has failed or was shut down; the request was not finished."""
