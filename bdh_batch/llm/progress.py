"""A progress bar over long lists, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

from bdh_batch.errors import InvalidRequest
from bdh_batch.llm.outputs import RequestOutput

T = TypeVar("T")

UseTqdm = bool | Callable[..., Any]  # whether there is a bar, or what makes one, as `tqdm` does
DESCRIPTION = "Processed prompts"


@contextmanager
def progress(use_tqdm: UseTqdm, total: int) -> Iterator[Callable[[Any], None]]:
    """What is to be called with each result. Where there is one prompt alone, no bar is shown.

    Raises:
        InvalidRequest
    """
    if not (isinstance(use_tqdm, bool) or callable(use_tqdm)):
        raise InvalidRequest("use_tqdm: Input should be a boolean, or what makes a progress bar.", "use_tqdm")
    if use_tqdm is False or total < 2:
        yield lambda result: None
        return
    make: Callable[..., Any] = tqdm if use_tqdm is True else use_tqdm
    bar = make(total=total, desc=DESCRIPTION, unit="prompt", dynamic_ncols=True)
    tokens = 0

    def count(result: Any) -> None:
        nonlocal tokens
        if isinstance(result, RequestOutput):
            tokens += sum(len(each.token_ids) for each in result.outputs)
            elapsed = bar.format_dict.get("elapsed") if hasattr(bar, "format_dict") else None
            if elapsed:
                bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        bar.update(1)

    try:
        yield count
    finally:
        bar.close()
