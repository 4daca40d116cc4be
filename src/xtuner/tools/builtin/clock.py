"""The time."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


def clock(timezone: str = "") -> str:
    """Tell the current date and time.

    Args:
        timezone: A time zone such as Asia/Shanghai. Default: that of this machine.
    """
    if not timezone:
        now = datetime.now().astimezone()
    else:
        try:
            now = datetime.now(ZoneInfo(timezone))
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"unknown time zone {timezone!r}") from error
    return now.strftime("%A, %Y-%m-%d %H:%M:%S %Z").strip()


TOOL = clock
