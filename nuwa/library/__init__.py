"""The library call: ``nuwa.generate`` and ``nuwa.stream``, the method without the pipeline."""

from nuwa.library.call import Failure, Streamed, generate, stream
from nuwa.library.options import Options

__all__ = ["Failure", "Options", "Streamed", "generate", "stream"]
