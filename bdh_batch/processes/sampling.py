"""Samples the whole server every other second, whatever processes it has, for those who watch it."""

from __future__ import annotations

import asyncio
import logging
import time

from bdh_batch.http.serving import Serving
from bdh_batch.http.watch.details import details
from bdh_batch.http.watch.feed import SECONDS
from bdh_batch.observability.samples import Comparing, tenants_of

log = logging.getLogger(__name__)


async def sample(serving: Serving) -> None:
    """Adds samples to the server's feed until it is cancelled. What is for operators is made only while one looks."""
    comparing = Comparing()
    while True:
        try:
            await _sample(serving, comparing)
        except Exception:  # the server goes on, and so does what follows of this
            log.exception("the server could not be sampled")
        await asyncio.sleep(SECONDS - time.time() % SECONDS)  # all front ends at the same moments


async def _sample(serving: Serving, comparing: Comparing) -> None:
    feed, now = serving.feed, round(time.time(), 3)
    figures = await serving.metrics.watched.all_figures()
    feed.tenants = tenants_of(figures.values())
    if (found := comparing.sample(now, figures)) is not None:
        feed.add(now, found)
    if feed.watched_by_operators:
        feed.show(await details(serving.gate, serving.admission, feed))
