"""What can go wrong. Every message is one line: what was wrong, with which value, what to do."""


def printable(text: str) -> str:
    """On one line, and without what could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class CspEdgeError(Exception):
    """Base of all errors that this package raises on purpose."""

    def __init__(self, message: str) -> None:
        # it may name paths and quote files, whatever is in them
        super().__init__(printable(message))


class LibraryError(CspEdgeError):
    """The patched llama.cpp libraries are missing, or llama_cpp is already bound to others."""


class ModelError(CspEdgeError):
    """The model file is missing, not a GGUF, corrupt, or of a kind that can't be used here."""


class ProjectorError(CspEdgeError):
    """The projector (mmproj) is missing, corrupt, or belongs to another model."""


class ImageError(CspEdgeError):
    """A picture can't be read, is empty or too large, or comes from where none is fetched."""


class PromptError(CspEdgeError):
    """A prompt or message list is empty, malformed, not valid text, or beyond the context."""


class TemplateError(CspEdgeError):
    """The chat template is broken, or refuses the messages, or loses their pictures."""


class PolicyError(CspEdgeError):
    """A cache policy is unknown, or one of its settings makes no sense."""


class OptionError(CspEdgeError):
    """A setting other than the policy's makes no sense: sampling, cache type, threads."""


class SessionError(CspEdgeError):
    """A saved conversation can't be written or read, is damaged, or is another model's."""


class ServerError(CspEdgeError):
    """An RPC server can't be reached, or the connection to it was lost, and its layers with it."""


class MemoryLimitError(CspEdgeError):
    """There is not enough memory for the weights or the cache."""
