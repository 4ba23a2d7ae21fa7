"""How many threads torch's operators take, thread by thread."""

from __future__ import annotations

import threading

import torch

_changing = threading.Lock()


def keep_to_one_thread() -> None:
    """Has torch's operators take no other thread when the calling one calls them; for all others nothing changes.

    A thread that has helped in a loop of torch's waits for the next one on its core, for milliseconds, and kernels with
    threads of their own lack that core meanwhile. A thread that uses torch for the first time just while this function
    runs may keep to one as well: torch has a number for all new threads, which is 1 between the two calls.
    """
    with _changing:
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)  # for this thread, and for those to come
            others = threading.Thread(target=torch.set_num_threads, args=(threads,))
            others.start()
            others.join()
