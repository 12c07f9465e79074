"""torch, imported late, so that the command line stays instant, and sooner than by `import torch`."""

from __future__ import annotations

import gc
import sys


def import_torch() -> None:
    """Import torch where that was not done, and have the collector of garbage never look at what it made.

    While torch is imported the collector walks many times through what has come to stay, and once more at the end of
    the process: a sixth of the time of a command that draws 64 pictures of 32 pixels (seen: 2.9 s instead of 3.5 s).
    """
    if "torch" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

        gc.freeze()
    finally:
        if collects:
            gc.enable()
