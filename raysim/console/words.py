"""The words that screens and pages share: how methods, figures, sizes and durations are written, everywhere alike."""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

NO_GUARANTEE = "no guarantee"
MISSING = "—"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number (and no truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def human_bytes(num_bytes: float | None) -> str:
    """A size as people read it, in powers of 1000: `0 B`, `912 B`, `3.7 MB`."""
    if num_bytes is None:
        return MISSING
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    digits = 0 if unit == "B" or size >= 99.95 else 1
    return f"{size:.{digits}f} {unit}"


def clock(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


FORMS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("epsilon", "delta", "noise_multiplier"), "{:.3g}".format),
    **dict.fromkeys(("num_rounds", "num_tokens", "tokens_per_s"), "{:,.0f}".format),
    **dict.fromkeys(("details_rate", "train_details_rate", "train_exact_match", "accuracy", "label_accuracy"), "{:.1%}".format),
    "memory": "{:.1f}".format,
    "memory_auc": "{:.2f}".format,
    "uplink_bytes": human_bytes,
    "wall_s": clock,
    "simulated_s": clock,
}
"""How a figure is written in tables; those that are not here, with three decimals."""


def figure_text(key: str, value: Any) -> str:
    """A figure of a run as it stands in tables; without one, a dash, and of epsilon that nothing is guaranteed."""
    if not is_number(value):
        return NO_GUARANTEE if key == "epsilon" else MISSING
    return FORMS.get(key, "{:.3f}".format)(value)


def value_text(value: Any) -> str:
    """The value of a setting as it stands in tables."""
    return ", ".join(map(str, value)) if isinstance(value, list) else MISSING if value in (None, "") else str(value)


def settings_text(settings: Any) -> str:
    """Settings as they stand on a command line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def listed(words: list[str]) -> str:
    """The words in one sentence: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_of(number: int, noun: str) -> str:
    """A number with its noun: `1 trial`, `3 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
