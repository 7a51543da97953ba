"""The host's side of sampling: it assigns completions to slots.

The engine admits waiting prompts into free slots, lets the device decode until there is something
to decide, harvests finished completions, and repeats. When no prompt waits, the live completions
move into a smaller batch, so that the long tail does not pay for finished rows. It knows token ids
only, no text; rollouts, evaluation and `generate` all go through it.

With several processes, each one feeds the slots of its own devices and reads their completions. The
devices tell all processes which slots are free and how long completions are. Every decision follows
from these data, so processes decide alike without communication.

Beside the axes of `structs.py`, S are shards of the slots here, A prompts on their way into them.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from grpo_jax import keys
from grpo_jax.devices import by_shard as by_shard_lib
from grpo_jax.devices import compiling, sharding, transfer
from grpo_jax.devices.compiling import Call
from grpo_jax.sampling import appending, decode, shapes
from grpo_jax.sampling import layouts as layouts_lib
from grpo_jax.sampling.board import NO_MORE, Board, Drawn, Queues, Source, Turn
from grpo_jax.sampling.collected import Collected, OnGroup
from grpo_jax.sampling.early_stop import FirstGroups, steps_between
from grpo_jax.sampling.kept import Chunks, Kept
from grpo_jax.sampling.publish import Publisher
from grpo_jax.structs import Array, Params, Rollouts

_NEVER = 2**30
NO_LAYOUT = -1, 1  # (slots, lanes): no smaller layout


class Engine:
    """Continuous batching over `num_slots` completions at once."""

    def __init__(
        self,
        decoder: decode.Decoder,
        *,
        num_slots: int = 0,
        compact: bool = True,
        num_read: int = 0,
    ):
        """`num_slots`: completions decoded at once; 0: all of a call.

        `compact`: live completions move into a smaller batch once no prompt waits. `num_read`: most
        prompts prefilled at once; 0: as many as there are slots.
        """
        self.decoder = decoder
        self.num_slots = num_slots
        self.compact = compact
        self.num_read = num_read
        self.shards = sharding.num_slot_shards(decoder.mesh) * decoder.parts
        self.shapes: set[tuple[int, int, int]] = set()  # used: slots, lanes, tokens of prompts
        by_shard = functools.partial(by_shard_lib.by_slot_shard, decoder.mesh)
        with_decoder = lambda f: functools.partial(  # noqa: E731
            compiling.exact(decoder.dtype, f), decoder
        )

        def empty_slots(slots: int, lanes: int, prompt_tokens: int) -> decode.Slots:
            slots *= decoder.parts
            return by_shard(lambda: decode.empty(decoder, slots, lanes, prompt_tokens), 0)()

        shortest = layouts_lib.padded(1)
        placed = shapes.slot_shardings(decoder, jax.eval_shape(lambda: empty_slots(1, 1, shortest)))
        self.empty = jax.jit(empty_slots, static_argnums=(0, 1, 2), out_shardings=placed)
        jit = functools.partial(
            jax.jit,
            out_shardings=placed,
            compiler_options=compiling.options_of_decoding(decoder.mesh),
        )
        self.admit = jit(by_shard(with_decoder(decode.admit), 2), donate_argnums=2)
        self.decode = jit(by_shard(with_decoder(decode.decode), 5), donate_argnums=6)
        keeping = functools.partial(with_decoder(decode.decode), keeps=True)
        self.decode_kept = jit(by_shard(keeping, 5), donate_argnums=6)
        self.compact_slots = jit(by_shard(with_decoder(decode.compact), 0))
        self.put_back = jit(by_shard(with_decoder(decode.put_back), 0), donate_argnums=0)
        self.align = jit(by_shard(with_decoder(appending.align), 0), donate_argnums=0)
        self.append = jit(by_shard(with_decoder(appending.append), 4), donate_argnums=4)
        self.publish = Publisher(decoder)

    @functools.cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that decoding must read, for `roofline.rollout`; scales included."""
        return shapes.traffic(self.decoder, self.publish)

    def admitting(self, params, temperature, slots: decode.Slots, prompts: tuple) -> Call:
        return Call(self.admit, (params, temperature, slots, *prompts))

    def decoding(
        self,
        params,
        temperature,
        following: tuple[int, int],
        enough_S,
        slots: decode.Slots,
        keeps: bool,
        looks: bool = False,
    ) -> Call:
        """`looks`: the host looks at what is finished every few steps, as `FirstGroups` needs."""
        program = self.decode_kept if keeps else self.decode
        most = np.int32(steps_between(self.decoder)) if looks else None
        return Call(program, (params, temperature, *following, most, enough_S, slots))

    def appending(
        self, params, temperature, column, age, slots: decode.Slots, lanes: tuple
    ) -> Call:
        return Call(self.append, (params, temperature, column, age, slots, *lanes))

    def generate(
        self,
        params: Params,
        prompts: list[list[int]],
        *,
        group: int,
        key: Array,
        temperature: float,
        on_group: OnGroup | None = None,
        first: FirstGroups | None = None,
        meanwhile: Callable[[], None] | None = None,
        on_harvest: Callable[[], None] = lambda: None,
    ) -> Rollouts:
        """`group` completions of every prompt (token ids), as host arrays padded to the limits.

        `params` come from `publish`. Completion g of prompt p draws with `fold_in(key, p * group +
        g)`, whatever the slots. `on_group(p, completions)` is called with the token ids of prompt
        p's completions once all have finished, while the device decodes the others; `meanwhile()`
        is called once, when the first prompts are on the device; `on_harvest()` whenever some
        completions have finished. `first`: decoding ends once it has its groups. What is returned
        of the other groups has no meaning, and `on_group` is not called for them.

        With several processes, each one gets the completions and log-probabilities of the prompts
        that its devices decoded, zeros for the others, and all lengths. `on_group` is called for a
        prompt on one process only.
        """
        places = self.places(len(prompts))
        found = Collected(places, group, self.decoder.max_tokens, on_group, first)
        key_B2 = self.keys(key, len(prompts) * group)
        for drawn in self.first_turns(
            params, prompts, group, key_B2, temperature, first=first, meanwhile=meanwhile
        ):
            on_harvest()
            found.add(drawn)
        return found.rollouts(prompts, self.padded(max(map(len, prompts))))

    def keys(self, key: Array, num_rows: int) -> np.ndarray:
        """The data of the random key of each completion, uint32 [B, 2]."""
        return keys.row_keys(key, num_rows)

    def places(self, num_prompts: int) -> tuple[np.ndarray, np.ndarray]:
        """Which prompts' completions this process holds, and which it alone reports; bool [P]."""
        # All processes of a shard hold all of its parts.
        shard_P = self._shard_of(num_prompts) // self.decoder.parts
        held_P = transfer.shards_held(self.decoder.mesh)[shard_P]
        return held_P, transfer.shard_owners(self.decoder.mesh)[shard_P] == jax.process_index()

    def first_turns(
        self,
        params: Params,
        prompts: Sequence[list[int]],
        group: int,
        key_B2: np.ndarray,
        temperature: float,
        *,
        limit: int | None = None,
        kept: Kept | None = None,
        first: FirstGroups | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[Drawn]:
        """`group` completions of every prompt, as they finish, each of at most `limit` tokens.

        `key_B2`: from `keys`; `first`, `meanwhile`: as for `generate`. `limit` None: that of
        completions. `kept`: takes the slots afterwards, if they hold all completions at once.
        """
        layouts = self.layouts(len(prompts), group)
        limit = limit or self.decoder.max_tokens
        queues = self._queues(prompts, group, layouts[0][1], limit)
        width = self.padded(max(map(len, prompts)))
        if max(map(len, queues)) > layouts[0][0]:
            kept = None
        beside = {"meanwhile": meanwhile, "kept": kept, "first": first}
        yield from self._drawn(params, queues, layouts, width, key_B2, temperature, **beside)

    def later_turns(
        self,
        params: Params,
        turns: Sequence[Turn],
        num_prompts: int,
        group: int,
        width: int,
        key_B2: np.ndarray,
        temperature: float,
        *,
        expected: int = 0,
        source: Source = NO_MORE,
        kept: Kept | None = None,
    ) -> Iterator[Drawn]:
        """Turns of single completions that go on, as they finish.

        `num_prompts` and `group` are those of `first_turns`, whose slots bound those used here.
        `width`: tokens of the longest prefix, from `layouts.turn_width`. `source` gives further
        turns of at most that length, `expected` of them at once with those in `turns`. If `kept`
        holds these completions, only what is new is computed; else it may take the slots.
        """
        if kept is not None and kept.holds([turn.rows[0] for turn in turns]):
            yield from self._gone_on(params, turns, kept, key_B2, temperature)
            return
        queues = self._no_queues()
        for shard, turn in zip(self.shards_of(turns, num_prompts, group), turns):
            queues[shard].append(turn)
        needed = max(*map(len, queues), -(-(len(turns) + expected) // self.shards))
        first = self.layouts(num_prompts, group)[0]
        layouts = layouts_lib.of_turns(first, needed, compact=self.compact)
        kept = kept if kept is not None and kept.again and needed <= layouts[0][0] else None
        how = params, queues, layouts, width, key_B2, temperature
        yield from self._drawn(*how, source=source, kept=kept)

    def _gone_on(
        self, params, turns: Sequence[Turn], kept: Kept, key_B2, temperature: float
    ) -> Iterator[Drawn]:
        """Turns that go on in the lanes in which the last ones ended."""
        slots, board, layouts = self._shrink(*kept.taken(turns))
        chunks = Chunks.of(board, turns, self.decoder.max_tokens)
        place = functools.partial(transfer.shard_rows, self.decoder.mesh, axis="slots")
        if chunks.shift_RW.any():
            slots = self.align(slots, place(chunks.shift_RW))
        after = np.float32(temperature) if temperature else None, np.int32(chunks.column)
        for ids_RWM, age in chunks.pieces:
            lanes = place((ids_RWM, *chunks.of_lanes))
            slots = self.appending(params, *after, np.int32(age), slots, lanes)()
        yield from self._drawn(
            *(params, self._no_queues(), layouts, kept.width, key_B2, temperature),
            begun=(slots, board),
            kept=kept,
        )

    def shards_of(self, turns: Sequence[Turn], num_prompts: int, group: int) -> np.ndarray:
        """The shard of each turn: with several processes that of its first turn."""
        if jax.process_count() == 1:
            return self._shard_of(len(turns))
        return self._shard_of(num_prompts)[[turn.rows[0] // group for turn in turns]]

    def _shard_of(self, number: int) -> np.ndarray:
        """The shard of each of `number` items: in blocks, as the rows of a batch are split."""
        return np.arange(number) * self.shards // number

    def padded(self, longest: int) -> int:
        """The padded length of prompts of at most `longest` tokens."""
        return layouts_lib.padded(longest)

    def read_at_once(self, num_slots: int) -> int:
        """Prompts that a shard with `num_slots` free slots prefills at once."""
        return min(-(-self.num_read // self.shards) or num_slots, num_slots)

    def layouts(self, num_prompts: int, group: int) -> list[layouts_lib.Layout]:
        """The first layout of a shard, and the smaller ones to move to; see `layouts.of_groups`."""
        return layouts_lib.of_groups(
            num_prompts,
            group,
            num_slots=self.num_slots,
            shards=self.shards,
            compact=self.compact,
        )

    def _drawn(
        self,
        params,
        waiting: Queues,
        layouts: list[tuple[int, int]],
        width: int,
        key_B2: np.ndarray,
        temperature: float,
        *,
        begun: tuple[decode.Slots, Board] | None = None,
        meanwhile: Callable[[], None] | None = None,
        source: Source = NO_MORE,
        kept: Kept | None = None,
        first: FirstGroups | None = None,
    ) -> Iterator[Drawn]:
        """Completions as they finish.

        `begun`: slots in which some are decoded already. `kept`: takes the slots at the end.
        `first`: what remains is given up once it has its groups.
        """
        whole, (num_slots, lanes) = layouts, layouts[0]
        if begun is None:
            board = Board.empty(self.shards, num_slots, lanes)
            slots = self.empty(num_slots, lanes, width)
        else:
            slots, board = begun
        temperature = np.float32(temperature) if temperature else None
        at_once = self.read_at_once(num_slots)
        # Refills wait until a quarter of the slots is free: each one interrupts all lanes.
        refill = max(1, num_slots // 4)
        least = 1 if first is None else refill  # `first` returns to the host more often
        finished: list[Drawn] = []
        while first is None or not first.is_met:
            if source.pending:
                is_idle = not any(waiting) and not board.is_busy
                if is_idle:
                    yield from finished  # further turns may follow from these
                    finished = []
                for shard, turn in source.take(is_idle):
                    waiting[shard].append(turn)
            if not any(waiting) and not board.is_busy:
                break
            size = at_once if board.free_SR.all() else min(refill, at_once)
            while board.takes(waiting, least):
                placed = self._placed(board, waiting, size, width, key_B2)
                slots = self.admitting(params, temperature, slots, placed)()
            if meanwhile is not None:  # the device has something to do
                meanwhile()
                meanwhile = None
            finished.append(self._harvest(slots, board, first))  # of one token
            is_last = not any(waiting) and not source.pending
            if is_last:
                slots, board, layouts = self._shrink(slots, board, layouts, kept)
            if not board.is_busy or (first is not None and first.is_met):
                continue
            self.shapes.add((*board.row_SRW.shape[1:], width))
            moves = is_last and len(layouts) > 1 and first is None  # else shards keep step
            following = layouts[1] if moves else NO_LAYOUT
            enough_S = self._enough(waiting, board, refill, source.pending)
            how = kept is not None, first is not None
            slots = self.decoding(params, temperature, following, enough_S, slots, *how)()
            yield from finished  # processed while the device decodes
            finished = [self._harvest(slots, board, first)]
        if first is not None:
            live_RW, time_RW = board.row_RW >= 0, transfer.to_host(slots.time_RW)
            first.cut(board.row_RW[live_RW], time_RW[live_RW] + 1)
        if kept is not None:
            kept.keep(*self._widened(slots, board, kept), whole, width)
        yield from finished

    def _queues(self, prompts: Sequence[list[int]], group: int, lanes: int, limit: int) -> Queues:
        """The queue of each shard: the rows of a group, or of a part of a group wider than a slot.

        Shards get equally many parts. A group must stay on one process, which rewards it, and in
        the shard that trains on it. With several processes its parts are therefore kept together if
        an equal division might separate them.
        """
        num_prompts = len(prompts)
        parts = [
            Turn(range(p * group + g, p * group + min(g + lanes, group)), ids, 0, limit)
            for p, ids in enumerate(prompts)
            for g in range(0, group, lanes)
        ]
        shard_of = self._shard_of(len(parts))
        if jax.process_count() > 1 and num_prompts % sharding.num_row_shards(self.decoder.mesh):
            shard_of = self._shard_of(num_prompts).repeat(len(parts) // num_prompts)
        queues = self._no_queues()
        for shard, turn in zip(shard_of, parts):
            queues[shard].append(turn)
        return queues

    def _no_queues(self) -> Queues:
        return [collections.deque() for _ in range(self.shards)]

    def _enough(self, waiting: Queues, board: Board, refill: int, more_come: bool) -> Array:
        """The number of free slots at which each shard returns to the host, if any prompt waits.

        A shard without waiting prompts may decode as long as the others: its present free slots do
        not count. So it is for all where `more_come`.
        """
        free_S = board.free_SR.sum(axis=1)
        enough_S = np.full(self.shards, _NEVER, np.int32)
        if any(waiting) or more_come:
            for s, queue in enumerate(waiting):
                enough_S[s] = min(refill, len(queue)) if queue else free_S[s] + refill
        return transfer.shard_rows(self.decoder.mesh, enough_S, "slots")

    def _placed(self, board: Board, waiting: Queues, size: int, width: int, key_B2) -> tuple:
        """Arguments of `decode.admit` for up to `size` turns a shard, on the device."""
        rows = board.place(waiting, size, width, key_B2)
        return transfer.shard_rows(self.decoder.mesh, rows, "slots")

    def _harvest(
        self, slots: decode.Slots, board: Board, first: FirstGroups | None = None
    ) -> Drawn:
        """Completions finished since the last harvest; tokens only if this process holds them.

        Their lanes are free afterwards, and `first` knows of them.
        """
        live_RW, row_RW = transfer.to_host(slots.live_RW), board.row_RW
        done = (row_RW >= 0) & ~live_RW
        if not done.any():
            return Drawn(row_RW[done], *[np.zeros((0,))] * 4)
        token_BC, logp_BC = (
            x[done] for x in transfer.rows_held((slots.completion_RWC, slots.logp_RWC))
        )
        time_RW, stopped_RW = transfer.to_host((slots.time_RW, slots.stopped_RW))
        rows, begin_B = board.ended(done, time_RW)
        if begin_B.any():  # what is before was told in earlier turns
            at_BC = (begin_B[:, None] + np.arange(token_BC.shape[1])) % token_BC.shape[1]
            token_BC, logp_BC = (np.take_along_axis(x, at_BC, 1) for x in (token_BC, logp_BC))
        length_B = time_RW[done] + 1 - begin_B
        drawn = Drawn(rows, token_BC, logp_BC, length_B, stopped_RW[done])
        if first is not None:
            first.take(drawn)
        return drawn

    def _shrink(
        self,
        slots: decode.Slots,
        board: Board,
        layouts: list[layouts_lib.Layout],
        kept: Kept | None = None,
    ) -> tuple[decode.Slots, Board, list[layouts_lib.Layout]]:
        """Moves the live completions to the smallest layout that holds them.

        With `kept` the others stay where they are.
        """
        live_SR = (board.row_SRW >= 0).sum(axis=2)
        fitting = [
            i for i, (r, w) in enumerate(layouts) if i and (-(-live_SR // w)).sum(1).max() <= r
        ]
        if not fitting or not live_SR.any():
            return slots, board, layouts
        if kept is not None:
            slots, board = self._widened(slots, board, kept)
        new, moves = board.moved(layouts[fitting[-1]])
        placed = transfer.shard_rows(self.decoder.mesh, moves, "slots")
        if kept is not None:
            kept.shelf = slots, board, placed
        return self.compact_slots(slots, *placed), new, layouts[fitting[-1] :]

    def _widened(self, slots: decode.Slots, board: Board, kept: Kept) -> tuple[decode.Slots, Board]:
        """The slots that `_shrink` has left, with what the moved completions have got since."""
        if kept.shelf is None:
            return slots, board
        (wide, wide_board, placed), kept.shelf = kept.shelf, None
        wide_board.put_back(board)
        return self.put_back(wide, slots, *placed), wide_board
