"""nbengine: an LLM inference engine that lives inside a notebook."""

__version__ = "0.1.0"
