"""xtuner: fine-tune language models from one settings file.

Import from the modules; the package root holds the version alone.
"""

__version__ = "1.0.0.dev0"
