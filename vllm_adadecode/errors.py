"""The one error type that start-up checks raise: one line, what is wrong and what to do."""


class AdaDecodeError(ValueError):
    """A configuration, checkpoint or environment that the method can't be started with."""
