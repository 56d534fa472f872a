"""How a conversation is put to a model: what its chat template is given beside the turns."""

from dataclasses import dataclass
from typing import Any

DATE = "2024-07-26"
"""The day that chat templates are told where no other is set, so that the same command gives the same adapter on every day."""


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template is given beside the turns of a conversation."""

    system_prompt: str | None = None
    """System message; None for the template's own default."""
    template_args: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the template, such as `enable_thinking`, by name."""
    date: str = DATE
    """The day, as YYYY-MM-DD, for templates that say which day it is."""


DEFAULT_CHAT = ChatFormat()
"""What a template is given where nothing is configured."""
