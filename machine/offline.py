"""Whether what a name stands for may be fetched from elsewhere."""

import os


def stay_offline() -> None:
    """From here on, what a file names that may be a stranger's is looked for on this machine alone, unless the user has
    set HF_HUB_OFFLINE=0. To be called before huggingface_hub is first imported, which reads it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
