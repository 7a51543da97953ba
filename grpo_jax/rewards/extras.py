"""Libraries that some rewards read and that the package does not require."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

PACKAGES = {  # by module: the package to install, and the extra of ours that has it
    "sacrebleu": ("sacrebleu", "rewards"),
    "rouge_score": ("rouge-score", "rewards"),
    "jsonschema": ("jsonschema", "rewards"),
    "py3langid": ("py3langid", "rewards"),
    "vaderSentiment": ("vaderSentiment", "rewards"),
    "better_profanity": ("better-profanity", "rewards"),
    "profanity_check": ("alt-profanity-check", "toxicity"),
    "torch": ("torch", "embeddings"),
}


def lacking(*modules: str) -> str:
    """What is missing among these modules, and how to install it; "" if nothing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package, extra = PACKAGES[module]
            return (
                f"needs {package}, which is not installed: pip install {package}, or "
                f'pip install "grpo_jax[{extra}]"'
            )
    return ""


def of_function(found: Callable) -> str:
    """As `lacking`, for the modules that a built-in reward names in its attribute `needs`.

    The attribute may be a function of the bound arguments, if these decide.
    """
    needs = getattr(getattr(found, "func", found), "needs", ())
    return lacking(*(needs(**getattr(found, "keywords", {})) if callable(needs) else needs))
