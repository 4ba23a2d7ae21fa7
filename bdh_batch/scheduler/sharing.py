"""In-flight prefix sharing and prefix caching: a prefix that sequences have in common is computed once.

A state is wanted where a prompt ends (but for its last token, which every sequence computes itself), where a chat's
instructions and its earlier turns do, at powers of two, where prompts were seen to part, and where a sequence waits for
it. There a chunk of prefill ends, and the sequence goes on in a copy of its state, with which the next step begins. A
fork is no more than sequences that wait for the first of them.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence as Tokens, Set

from bdh_batch.messages import FinishReason
from bdh_batch.messages.state import Warmed
from bdh_batch.scheduler.prefix_cache import End, Entry
from bdh_batch.scheduler.prefix_index import Key
from bdh_batch.scheduler.prefixes import TOKEN_BYTES, RecentPrompts, common, pack
from bdh_batch.scheduler.sequence import Prefix, Sequence, Stage
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.transfers import Load

FIRST_POWER = 256
LONG = 512  # tokens, from which on a prompt is worth a step more
MEMORY = 8  # requests, after which it is believed that conversations go on in another way
COMPARED = 64  # most sequences that one is compared with
REMEMBERED = 512  # states that were read from files


class Sharing:
    """Finds, caches and awaits the prefixes that sequences have in common.

    Args:
        cache_prefixes: whether prefixes stay for later requests; else only while a sequence waits for them.
        share_all: whether all API keys share; else each has prefixes of its own. Each salt has its own in any case.
        least: tokens from which on a prefix is worth a copy, or what it has beyond the one that a sequence began with.
    """

    def __init__(self, allocator: SlotAllocator, cache_prefixes: bool, share_all: bool, least: int) -> None:
        self.cache = allocator.cache
        self.queries = self.hits = self.cached_tokens = 0
        self._allocator = allocator
        self._cache_prefixes = cache_prefixes
        self._share_all = share_all
        self._least = least
        self._recent = RecentPrompts()
        self._waiters: dict[Sequence, dict[Sequence, int]] = {}  # by their producer; and up to which position
        self._producers: dict[Sequence, Sequence] = {}  # of the waiters
        self._completions_go_on = 0  # above 0, more of late than prompts alone did
        self._last: tuple[Tokens[int], bytes] = (), b""  # the last prompt that was packed, and as bytes
        self._read: OrderedDict[Key, None] = OrderedDict()  # states that were read from files of late
        self._uncached: list[Entry] = []  # states that were read, of which the next plans make copies for others
        # In this plan, those in their prompts, by namespace and the first tokens; and those that are not there yet.
        self._by_head: dict[tuple[str, bytes], list[Sequence]] = {}
        self._in_prompt: list[Sequence] = []

    @property
    def pending(self) -> bool:
        """Whether there are copies for the next plan."""
        return bool(self._uncached)

    def cached_prefix(self, sequence: Sequence) -> Entry | None:
        """The state that `sequence` can begin with; its last token has to be computed."""
        loaded = sequence.prefix.loaded
        if not self._may_share(sequence):
            return loaded
        prompt = self._packed(sequence)
        found = self.cache.find(sequence.prefix.namespace, prompt, len(sequence.prompt) - 1)
        return loaded if loaded is not None and (found is None or found.length < loaded.length) else found

    def is_only_use(self, sequence: Sequence, entry: Entry | None) -> bool:
        """Whether `entry` was read from a file, and nobody needs its state there once `sequence` begins in it."""
        loaded = sequence.prefix.loaded
        return loaded is not None and loaded is entry and loaded.awaited == 1 and not self._is_kept(loaded)

    def begun(self, sequence: Sequence, entry: Entry | None, alone: bool = True) -> None:
        """`sequence` has been given its slot, with the state of `entry` in it; it is `alone` where no other one
        runs."""
        loaded = entry is not None and entry is sequence.prefix.loaded
        if loaded and entry is not None:
            self._begun_in(sequence, entry)
        self.forget_loaded(sequence)
        if not self._may_share(sequence):
            return
        self._in_prompt.append(sequence)
        self.queries += len(sequence.prompt)
        found = 0 if entry is None else entry.length
        prompt, namespace = self._packed(sequence), sequence.prefix.namespace
        evicted = self._allocator.working_set.asked(namespace, prompt, len(sequence.prompt) - 1, found)
        self._observe(evicted or entry)
        cached = entry is not None and self.cache.holds(entry) and not loaded
        if entry is not None and (cached or entry.slot == sequence.slot):
            sequence.computed = entry.length
            self.hits += entry.length
            if sequence.times.scheduled is None:  # else it has lost its state, and was through this before
                sequence.prefix.cached = entry.length
            if cached:
                self.cache.use(entry, self._allocator.now)
        self.expect_no_more(sequence)
        if self._cache_prefixes:
            wanted, least = self._wanted(sequence, alone), sequence.computed + self._least
            sequence.prefix.cuts = sorted(at for at in wanted if at >= least)

    def holds_state(self, sequence: Sequence, tokens: int) -> bool:
        """Whether the state after so many tokens of the prompt, or more of them, need not be read from a file."""
        entry = self.cached_prefix(sequence)
        return entry is not None and entry.length >= tokens

    def prefix_of(self, sequence: Sequence, tokens: int) -> tuple[str, bytes]:
        """Returns the namespace of `sequence`, and the first tokens of its prompt."""
        prompt = self._packed(sequence)
        return sequence.prefix.namespace, prompt[: TOKEN_BYTES * tokens]

    def loaded(self, sequences: Iterable[Sequence], load: Load) -> None:
        """`sequences` can begin in a state that was read; it is not cached yet."""
        entry = _entry_of(load)
        for sequence in sequences:
            sequence.prefix.loaded = entry
            entry.awaited += 1

    def warmed(self, load: Load) -> Warmed | None:
        """What becomes of a state that nobody has asked for; None where it may be read."""
        if self.cache.twin(_entry_of(load)) is not None:
            return "cached"
        return None if self._cache_prefixes and self._allocator.may_warm else "no room"

    def warm(self, load: Load) -> Warmed:
        """Caches a state that was read before anyone has asked for it, if it may be."""
        self._allocator.transfers.leave(load.slot)  # from where it may be moved first
        if (how := self.warmed(load)) is not None:
            return how
        entry, slot = _entry_of(load), self._allocator.for_warming()
        self._allocator.copies.move(load.slot, slot)
        entry.slot, entry.end = slot, End.COMPLETION
        self.cache.add(entry, self._allocator.now)
        return "cached"

    def namespace_of(self, prefix: Prefix) -> str:
        """Inside which requests of a `cache_namespace` and `salt` share prefixes."""
        shared, salt = "" if self._share_all else prefix.cache_namespace, prefix.salt
        return f"{salt} {shared}" if salt else shared

    def forget_loaded(self, sequence: Sequence) -> None:
        """`sequence` has begun, or has ended before it could. Idempotent."""
        entry, sequence.prefix.loaded = sequence.prefix.loaded, None
        if entry is not None:
            self._leave(entry)

    def awaits(self, sequence: Sequence) -> Stage | None:
        """The stage in which `sequence` waits where one that runs is about to compute more of it than is cached."""
        if not self._may_share(sequence):
            return None
        producer, shared = self._producer_of(sequence)
        if producer is None:
            return None
        entry = self.cached_prefix(sequence)
        if entry is not None and shared - entry.length < self._least:
            return None
        self.expect_no_more(sequence)
        if shared not in producer.prefix.cuts:
            insort(producer.prefix.cuts, shared)
        self._waiters.setdefault(producer, {})[sequence] = shared
        self._producers[sequence] = producer
        return Stage.AWAITING_PREFIX

    def expect_no_more(self, sequence: Sequence) -> None:
        """`sequence` has begun, or has ended before it could."""
        entry, sequence.prefix.expects = sequence.prefix.expects, None
        if entry is not None:
            entry.awaited -= 1
            if not self._cache_prefixes and not entry.awaited and self.cache.holds(entry):
                self._allocator.discard(entry)

    def stop_waiting(self, waiter: Sequence) -> None:
        """`waiter` has ended, or need not wait any longer."""
        producer = self._producers.pop(waiter)
        del self._waiters[producer][waiter]
        if not self._waiters[producer]:
            del self._waiters[producer]

    def advance(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Takes the states of `prompts` that are wanted now; gives those that need not wait any longer."""
        self._by_head, self._in_prompt = {}, [*prompts]
        self._cache_loaded()
        for sequence in prompts:
            if sequence.prefix.cuts and sequence.prefix.cuts[0] <= sequence.computed:
                self._take(sequence)
        released: list[Sequence] = []
        for producer, waiting in self._waiters.items():
            gone = producer.stage is not Stage.RUNNING or not producer.prefix.cuts
            released += (waiter for waiter, at in waiting.items() if gone or at <= producer.computed)
        return released

    def bequeath(self, sequence: Sequence) -> None:
        """`sequence` has ended: its state stays as a prefix of what may be asked next, or its slot is free."""
        slot = sequence.leave_slot()
        # The next turn of one whose state is saved may come before its file is written, however short it is.
        least = 1 if sequence.save_to is not None else self._least
        complete = sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if (
            self._cache_prefixes
            and complete
            and sequence.computed >= least
            and sequence.computed > len(sequence.prompt)
        ):
            namespace, known = self.namespace_of(sequence.prefix), pack(sequence.known(0, sequence.computed))
            entry = Entry.of(namespace, known, sequence.computed, slot, End.COMPLETION)
            if self.cache.twin(entry) is None:
                self.cache.add(entry, self._allocator.now)
                self._supersede(sequence, namespace, known)
                return
        self._allocator.give(slot)

    def forget(self, slots: Set[int]) -> None:
        """`slots` hold no states."""
        for entry in [entry for entry in self.cache if entry.slot in slots]:
            self._allocator.discard(entry)

    def check(self) -> None:
        assert all(s.stage is Stage.AWAITING_PREFIX for s in self._producers), "waiters are known"
        assert all(entry.awaited >= 0 for entry in self.cache), "who waits is counted"
        if not self._cache_prefixes:
            assert all(entry.awaited > 0 for entry in self.cache), "only what is awaited is cached"

    def _begun_in(self, sequence: Sequence, loaded: Entry) -> None:
        """It begins in a state that was read from a file; that stays for others where it is not the first to do so:
        most conversations go on once from where they were, and none waits for a copy that nobody needs."""
        sequence.computed = loaded.length
        if sequence.times.scheduled is None:
            sequence.prefix.cached = loaded.length
        is_kept = self._is_kept(loaded)
        self._read[loaded.key] = None
        if len(self._read) > REMEMBERED:
            self._read.popitem(last=False)
        if is_kept:
            loaded.awaited += 1
            self._uncached.append(loaded)
            self._cache_loaded()

    def _is_kept(self, loaded: Entry) -> bool:
        """Whether a state that was read is to be cached, now that a sequence begins in it."""
        again = loaded.awaited > 1 or loaded.key in self._read
        return self._cache_prefixes and again and loaded.length >= self._least and loaded not in self._uncached

    def _cache_loaded(self) -> None:
        """Makes cached prefixes of states that were read, as far as the plan has time for copies."""
        while self._uncached and not self._allocator.full:
            loaded = self._uncached.pop(0)
            self._copy_loaded(loaded)
            self._leave(loaded)

    def _copy_loaded(self, loaded: Entry) -> None:
        if self.cache.twin(loaded) is not None:
            return
        slot = self._allocator.for_entry(self.cache.worth(loaded.length), awaited=False)
        if slot is not None:
            self._allocator.copy(loaded.slot, slot)
            entry = Entry(loaded.namespace, loaded.length, loaded.tail, loaded.digest, slot, end=End.COMPLETION)
            self.cache.add(entry, self._allocator.now)

    def _leave(self, loaded: Entry) -> None:
        """One fewer needs a state that was read, where it is now."""
        loaded.awaited -= 1
        if not loaded.awaited:
            self._allocator.transfers.leave(loaded.slot)

    def _take(self, sequence: Sequence) -> None:
        """Caches the state of `sequence`, for others to begin with, beside the one that it goes on with."""
        at = sequence.computed
        wanted = at == sequence.prefix.cuts[0]
        while sequence.prefix.cuts and sequence.prefix.cuts[0] <= at:
            sequence.prefix.cuts.pop(0)
        if not wanted or sequence.slot is None:
            return
        prompt, namespace = self._packed(sequence), sequence.prefix.namespace
        waiting = [waiter for waiter, position in self._waiters.get(sequence, {}).items() if position == at]
        new = Entry.of(namespace, prompt, at, -1, End.PROMPT if at == len(sequence.prompt) - 1 else None)
        entry = self.cache.twin(new)
        if entry is None and (self._cache_prefixes or waiting):
            slot = self._allocator.for_entry(self.cache.worth(at, len(waiting)), bool(waiting))
            if slot is None:
                self._allocator.working_set.evicted(new)
                return
            entry, new.slot = new, self._allocator.copy_aside(sequence, slot)
            self.cache.add(entry, self._allocator.now)
        for waiter in waiting:
            waiter.prefix.expects = entry
        if entry is not None:
            entry.awaited += len(waiting)

    def _observe(self, wanted: Entry | None) -> None:
        """A request begins, or would have begun, at `wanted`: that shows where the turns of conversations begin."""
        if wanted is not None and wanted.end is not None:
            vote = 1 if wanted.end is End.COMPLETION else -1
            self._completions_go_on = max(-MEMORY, min(MEMORY, self._completions_go_on + vote))

    def _supersede(self, sequence: Sequence, namespace: str, known: bytes) -> None:
        """The completion of `sequence` is cached. So nobody will begin where the turn before it ended; nor where its
        prompt did, if conversations go on from completions: not all templates repeat those as they were. What nobody
        else has used is the first to go."""
        superseded = {sequence.prefix.cached: 1}  # the uses that are its own
        if self._completions_go_on >= 0:
            superseded.setdefault(len(sequence.prompt) - 1, 0)
        for length, uses in superseded.items():
            entry = self.cache.get(namespace, known, length)
            if entry is not None and entry.end is not None and entry.uses <= uses:
                self.cache.demote(entry)

    def _wanted(self, sequence: Sequence, alone: bool) -> set[int]:
        last = len(sequence.prompt) - 1
        powers = (1 << bit for bit in range(FIRST_POWER.bit_length() - 1, last.bit_length()))
        wanted = {min(last, self._recent.parting(sequence.prefix.namespace, sequence.prefix.packed))}
        wanted.update(at for at in (*powers, *sequence.prefix.breaks) if at < last)
        if alone or len(sequence.prompt) >= LONG:  # a step more for the last token: dear beside others' steps
            wanted.add(last)
        return wanted

    def _producer_of(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        for producer in self._in_prompt:
            self._by_head.setdefault(self._head(producer), []).append(producer)
        self._in_prompt = []
        prompt = self._packed(sequence)
        best, longest, looked_at = None, self._least - 1, 0
        for producer in self._by_head.get(self._head(sequence), ()):
            if producer.stage is not Stage.RUNNING or producer.priority > sequence.priority:
                continue
            # Only one that is about to compute more than was found so far is worth comparing at length.
            more = max(longest, producer.computed) + 1
            if not producer.prefix.packed.startswith(prompt[: TOKEN_BYTES * more]):
                continue
            shared = min(common(producer.prefix.packed, prompt), len(sequence.prompt) - 1, len(producer.prompt) - 1)
            if shared > longest and producer.computed < shared:
                best, longest = producer, shared
            looked_at += 1
            if looked_at == COMPARED:
                break
        return best, longest

    def _head(self, sequence: Sequence) -> tuple[str, bytes]:
        return sequence.prefix.namespace, sequence.prefix.packed[: TOKEN_BYTES * self._least]

    def _may_share(self, sequence: Sequence) -> bool:
        return len(sequence.prompt) > self._least and not sequence.completion.needs_all

    def _packed(self, sequence: Sequence) -> bytes:
        """The prompt as bytes. Completions of one prompt come one after the other, and share them."""
        if not sequence.prefix.packed:
            if sequence.prompt is not self._last[0]:
                self._last = sequence.prompt, pack(sequence.prompt)
            sequence.prefix.packed, sequence.prefix.namespace = self._last[1], self.namespace_of(sequence.prefix)
        return sequence.prefix.packed


def _entry_of(load: Load) -> Entry:
    """The prefix whose state was, or is to be, read to a transfer slot."""
    return Entry.of(load.namespace, load.tokens, len(load.tokens) // TOKEN_BYTES, load.slot)
