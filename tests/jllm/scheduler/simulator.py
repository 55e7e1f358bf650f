"""A deterministic simulator of arrivals, faults and a device, driving the scheduler.

One seed is one run: a small scheduler with random limits, random arrivals by a fake
clock, aborts, forks, priorities, salts, shared prefixes, preemptions and rows that are
not finite. The fake device keeps a pool of its own and samples a hash of the whole
context as it reads it through its block tables; a wrong block, stale content, a missing
copy or a wrong position changes the tokens. Half of the models have cache groups with
windows, whose blocks each token reads back to its window, and leaves a hash of that
behind for those after it. Half of the devices are pipelines: a token is on the device
only when its step has come out of the last stage. The invariants hold after every step.

    python tests/jllm/scheduler/simulator.py --seeds 10000
    python tests/jllm/scheduler/simulator.py --seed 123
"""

import argparse
import collections
import random

from jllm.config import SchedulerConfig, WindowPool
from jllm.scheduler.plan import NO_BLOCK
from jllm.scheduler.request import Request, RequestStatus
from jllm.scheduler.scheduler import Scheduler

NUM_STEPS = 200
VOCABULARY = 40
POISON = -1
COUNTED = (
    "steps",
    "rows",
    "copies",
    "tokens",
    "ends",
    "passed",
    "window hits",
    "preemptions",
    "hits",
)
PATIENCE = 4
"""Steps within which something must advance."""


# --- the device --------------------------------------------------------------


def entry_of(token, position, previous):
    """What a slot holds: depends on the token, its place and the context before it."""
    return hash((token, position, previous)) | 1


def seen(entries):
    """What a token leaves behind of the entries within its windows."""
    return hash(tuple(entries))


def sample(seed, entries, seen_before):
    """The token that follows a context."""
    return hash((seed, tuple(entries), tuple(seen_before))) % VOCABULARY


def root_of(request):
    """What stands before the first token: adapters and salts must not mix."""
    return hash((request.adapter == "b", request.cache_salt == "a"))


def tokens_alone(request, seed, windows):
    """What the request generates when nothing else is in the run."""
    entries, seen_before, output = [], [], []

    def compute(token):
        previous = entries[-1] if entries else root_of(request)
        entries.append(entry_of(token, len(entries), previous))
        seen_before.append(seen([e for w in windows for e in entries[-w:]]))

    for token in request.prompt_token_ids:
        compute(token)
    while len(output) < request.max_tokens:
        token = sample(seed, entries, seen_before)
        output.append(token)
        if token in request.stop_token_ids and len(output) >= request.min_tokens:
            break
        compute(token)
    return output


class Row:
    """A row of the device table."""

    def __init__(self, seed, root, num_groups):
        self.seed = seed
        self.root = root
        self.tables = [[] for _ in range(num_groups)]
        self.position = 0
        self.last_token = None


class Device:
    """Executes plans in order, knowing only what they say."""

    def __init__(self, config, start_of):
        self.block_size = config.block_size
        self.windows = [pool.window for pool in config.window_pools]
        sizes = [config.num_blocks, *(pool.num_blocks for pool in config.window_pools)]
        self.pools = [[[0] * self.block_size for _ in range(size)] for size in sizes]
        # What each token saw within its windows; lies where the whole context lies.
        self.seen = [[0] * self.block_size for _ in range(config.num_blocks)]
        self.rows = {}
        self.start_of = start_of
        nothing = (None, None, [])
        self.stages = collections.deque([nothing] * (config.num_stages - 1))
        self.drawn = []

    def execute(self, plan, faults):
        """Runs a plan; rows in `faults` are not finite and leave poison behind.

        Returns the token of each row, and the places of those that are not finite.
        """
        self._apply_copies(plan)
        for item in plan.rows:
            self._apply_update(item)
        # First all writes, then all reads, as attention does.
        starts = [self._write(item, faults) for item in plan.rows]
        for item, start in zip(plan.rows, starts, strict=True):
            self._attend(item, start)
        results = [self._sample(item) for item in plan.rows]
        failed = {i for i, (_, finite) in enumerate(results) if not finite}
        return [token for token, _ in results], failed

    def _apply_copies(self, plan):
        copied = [(item.copy, *item.window_copies) for item in plan.rows if item.copy]
        for group, pool in enumerate(self.pools):
            copy_blocks(pool, [copies[group] for copies in copied])
        copy_blocks(self.seen, [copies[0] for copies in copied])

    def _apply_update(self, item):
        if item.starts:
            start = self.start_of[item.sequence_id]
            row = self.rows[item.row] = Row(*start, len(self.pools))
            row.position = item.position
            assert item.first_block == 0
        row = self.rows[item.row]
        if item.new_blocks:
            appended = (item.new_blocks, *item.window_blocks)
            for table, blocks in zip(row.tables, appended, strict=True):
                assert item.first_block == len(table), "tables are append-only"
                assert len(blocks) == len(item.new_blocks), "tables differ in length"
                table += blocks
        assert row.position == item.position
        assert len(item.tokens) in {0, item.num_tokens}

    def _write(self, item, faults):
        row, size = self.rows[item.row], self.block_size
        tokens = item.tokens or (row.last_token,)
        previous, start = row.root, row.position
        if start:
            previous = self._read(row, 0, start - 1)
        for token in tokens:
            position = row.position
            if item.sequence_id in faults or previous == POISON:
                previous = POISON
            else:
                previous = entry_of(token, position, previous)
            for pool, table in zip(self.pools, row.tables, strict=True):
                assert table[position // size] != NO_BLOCK
                pool[table[position // size]][position % size] = previous
            row.position += 1
        return start

    def _read(self, row, group, position):
        index, place = divmod(position, self.block_size)
        block = row.tables[group][index]
        assert block != NO_BLOCK, "a token sees a block that was given back"
        return self.pools[group][block][place]

    def _attend(self, item, start):
        row, size = self.rows[item.row], self.block_size
        for position in range(start, row.position):
            block = row.tables[0][position // size]
            self.seen[block][position % size] = seen(
                self._read(row, group, place)
                for group, window in enumerate(self.windows, 1)
                for place in range(max(0, position - window + 1), position + 1)
            )

    def _sample(self, item):
        row = self.rows[item.row]
        entries, seen_before = [], []
        for block in row.tables[0]:
            entries += self.pools[0][block]
            seen_before += self.seen[block]
        del entries[row.position :], seen_before[row.position :]
        finite = POISON not in entries
        token = 0
        if item.samples:
            row.last_token = None
            token = sample(row.seed, entries, seen_before)
        self.drawn.append((row, item.samples, token))
        return token, finite

    @property
    def is_busy(self):
        """Whether a step with rows has not come out yet."""
        return any(results for _, results, _ in self.stages)

    def execute_stage(self, plan, faults):
        """Begins a plan; what comes out is the plan of `num_stages - 1` steps before.

        A row that has started anew since is another one, and gets nothing.
        """
        self.drawn = []
        results = self.execute(plan, faults) if plan.num_rows else None
        self.stages.append((plan, results, self.drawn))
        plan, results, drawn = self.stages.popleft()
        for row, samples, token in drawn:
            if samples:
                row.last_token = token
        return (plan, results) if results else None


def copy_blocks(pool, copies):
    """Copies whole blocks at once."""
    contents = [list(pool[copy.source]) for copy in copies]
    targets = {copy.target for copy in copies}
    assert len(targets) == len(copies), "two copies to one block"
    assert not targets & {copy.source for copy in copies}, "a target is a source"
    for copy, content in zip(copies, contents, strict=True):
        pool[copy.target] = content


# --- the run -----------------------------------------------------------------


class Simulation:
    """One run: everything that happens follows from the seed."""

    def __init__(self, seed, num_steps=NUM_STEPS):
        self.seed = seed
        self.num_steps = num_steps
        self.random = rng = random.Random(seed)
        block_size, longest = rng.choice([1, 2, 3, 4, 8]), rng.randint(4, 48)
        # From half of the longest context to room for four.
        pool_tokens = round(longest * rng.uniform(0.5, 4))
        token_budget = rng.choice([1, 4, 8, 16, 32, 64])
        num_stages = random.Random(f"stages {seed}").choice([1, 1, 2, 4])
        widest, num_windows = max(1, longest // 2), rng.choice([0, 0, 1, 2])
        windows = [rng.randint(1, widest) for _ in range(num_windows)]
        self.config = SchedulerConfig(
            max_num_seqs=rng.choice([1, 2, 3, 4, 6, 8]),
            token_budget=token_budget,
            window_pools=tuple(
                WindowPool(
                    window,
                    round(
                        min(
                            -(-longest // block_size),
                            most_in_window(
                                window, token_budget, block_size, num_stages
                            ),
                        )
                        * rng.choice([1, 1.4, 3])
                    ),
                )
                for window in windows
            ),
            block_size=block_size,
            num_blocks=max(2, pool_tokens // block_size),
            max_model_len=longest,
            max_block_appends=rng.choice([1, 4, 16, 64]),
            max_block_copies=rng.choice([1, 2, 8]),
            enable_prefix_caching=rng.random() < 0.8,
            max_preemptions=rng.choice([0, 1, 2, 8]),
            num_stages=num_stages,
        )
        self.overlap = rng.random() < 0.7
        self.arrival_rate = rng.choice([0.2, 1.0, 2.0])
        self.most_open = rng.choice([4, 8, 12])
        self.abort_rate = rng.choice([0, 0.02, 0.1])
        self.fault_rate = rng.choice([0, 0, 0.01, 0.05])
        self.preempt_rate = rng.choice([0, 0, 0.1])
        self.reset_rate = rng.choice([0, 0, 0.05])
        self.templates = [
            tuple(rng.choices(range(VOCABULARY), k=40))
            for _ in range(rng.randint(1, 3))
        ]
        self.scheduler = Scheduler(self.config)
        self.start_of = {}
        self.device = Device(self.config, self.start_of)
        self.clock = 0.0
        self.next_arrival = 0.0
        self.in_flight = None
        self.requests = []
        self.open = {}
        self.faulted = set()
        self.num_ends = {}
        self.idle_steps = 0
        self.counts = dict.fromkeys(COUNTED, 0)

    def run(self):
        """Runs the steps, then lets everything end."""
        for _ in range(self.num_steps):
            self._happen()
            self._step()
        for _ in range(self._patience()):
            is_busy = self.in_flight is not None or self.device.is_busy
            if not self.scheduler.has_unfinished and not is_busy:
                break
            self._step()
        check_everything_ended(self)
        self.counts["preemptions"] = self.scheduler.num_preemptions
        self.counts["hits"] = self.scheduler.num_prefix_hits
        return self.counts

    def _patience(self):
        """Steps that all open requests take at the very most, one token at a time."""
        longest = (self.config.max_model_len + PATIENCE) * self.config.num_stages
        return longest * (self.config.max_preemptions + 2) * len(self.open) + PATIENCE

    def _happen(self):
        rng = self.random
        while self.next_arrival <= self.clock:
            if len(self.open) < self.most_open:
                self._arrive()
            self.next_arrival += rng.expovariate(self.arrival_rate)
        if self.open and rng.random() < self.abort_rate:
            request = rng.choice(list(self.open.values()))
            if rng.random() < 0.5:
                aborted = self.scheduler.abort(request.request_id)
                assert request in aborted
            else:
                self.scheduler.abort_sequence(request)
                aborted = [request]
            for one in aborted:
                assert one.finish_reason == "abort"
                self._end(one)
        if self.scheduler.running and rng.random() < self.preempt_rate:
            self.scheduler.preempt(rng.choice(self.scheduler.running))
        if rng.random() < self.reset_rate:
            idle = not self.scheduler.num_running
            assert self.scheduler.reset_prefix_cache() == idle

    def _arrive(self):
        rng, config = self.random, self.config
        room = min(config.max_model_len, config.num_blocks * config.block_size)
        length = rng.randint(1, min(room - 1, 30))
        shared = rng.choice([0, length, rng.randint(0, length)])
        own = rng.choices(range(VOCABULARY), k=length - shared)
        prompt = rng.choice(self.templates)[:shared] + tuple(own)
        max_tokens = rng.randint(1, min(room - length, 20))
        stops = frozenset(rng.sample(range(VOCABULARY), k=rng.choice([0, 0, 1, 3])))
        minimum = rng.randint(0, max_tokens)
        priority = rng.choice([0, 0, 0, -1, 5])
        salt = rng.choice([None, None, "a"])
        adapter = rng.choice([None, None, None, "b"])
        most = None if rng.random() < 0.8 else rng.randrange(len(prompt))
        parent = None
        first_id = len(self.requests)
        for index in range(rng.choice([1, 1, 1, 2, 4])):
            request = Request(
                sequence_id=first_id + index,
                request_id=f"request {first_id}",
                index=index,
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                min_tokens=minimum,
                stop_token_ids=stops,
                priority=priority,
                arrival=first_id,
                cache_salt=salt,
                adapter=adapter,
                max_cached_tokens=most,
                fork_of=parent,
            )
            seed = hash((self.seed, first_id, index))
            self.start_of[request.sequence_id] = seed, root_of(request)
            self.requests.append(request)
            self.open[request.sequence_id] = request
            self.scheduler.add(request)
            parent = parent or request

    def _step(self):
        self.clock += 1
        waiting = list(self.open.values())
        ready = [one for one in waiting if can_start(self.scheduler, one)]
        plan = self.scheduler.schedule()
        launched = None
        if plan is not None:
            self.counts["steps"] += 1
            self.counts["rows"] += len(plan.rows)
            self.counts["copies"] += sum(row.copy is not None for row in plan.rows)
            self.counts["window hits"] += sum(
                row.starts and NO_BLOCK in blocks
                for row in plan.rows
                for blocks in row.window_blocks
            )
            if plan.num_rows:
                check_budget(self, plan)
            check_order(self, plan, ready)
            check_no_shared_write(self, plan)
            faults = {
                row.sequence_id
                for row in plan.rows
                if self.fault_rate and self.random.random() < self.fault_rate
            }
            self.faulted |= faults
            launched = self.device.execute_stage(plan, faults)
        if self.overlap:
            launched, self.in_flight = self.in_flight, launched
        if launched is not None:
            self._commit(*launched)
        check_progress(self, plan)
        check_blocks(self)
        check_windows(self)
        check_reservations(self)
        check_states(self)

    def _commit(self, plan, results):
        for update in self.scheduler.commit(plan, *results).one_by_one():
            request = update.request
            assert plan.rows[update.plan_index].sequence_id == request.sequence_id
            if update.token_id is not None:
                self.counts["tokens"] += 1
                assert request.token_ids[-1] == update.token_id
            if update.finish_reason is not None:
                self._end(request)

    def _end(self, request):
        identity = request.sequence_id
        del self.open[identity]  # a second end is a KeyError
        self.counts["ends"] += 1
        check_tokens(self, request)


def most_in_window(window, token_budget, block_size, num_stages):
    """Most blocks of a sequence in a group, with all steps that may be under way."""
    under_way = (num_stages + 1) * token_budget
    return -(-(max(window, block_size) + under_way) // block_size) + 2


def can_start(scheduler, request):
    """Whether nothing but room keeps a sequence from running."""
    if request.status is RequestStatus.RUNNING or scheduler.num_pending(request):
        return False
    parent = request.fork_of
    if parent is None:
        return True
    forks = scheduler._sequences._forks.get(parent.sequence_id, ())
    return request.sequence_id not in forks


# --- the invariants ----------------------------------------------------------


def check_blocks(run):
    """1: every block is free, cached or owned; references equal the tables."""
    for group, pool in enumerate(run.scheduler.pools):
        counts = [0] * pool.num_blocks
        for request in run.open.values():
            for block in request.tables[group].blocks:
                if block != NO_BLOCK:
                    counts[block] += 1
        assert pool._references == counts
        owned = sum(count > 0 for count in counts)
        free, evictable = set(pool._free), set(pool._evictable)
        assert len(free) + len(evictable) + owned == pool.num_blocks
        assert (
            len(free | evictable)
            == len(free) + len(evictable)
            == len(pool._free) + len(pool._evictable)
        )
    run.scheduler.check_integrity()


def check_windows(run):
    """1b: blocks outside of a window have gone back, and those inside have not."""
    config, size = run.config, run.config.block_size
    for group, pool in enumerate(config.window_pools, 1):
        most = most_in_window(pool.window, config.token_budget, size, config.num_stages)
        for request in run.open.values():
            table = request.tables[group].blocks
            assert len(table) == len(request.block_ids)
            assert NO_BLOCK not in request.block_ids
            assert sum(block != NO_BLOCK for block in table) <= most
            run.counts["passed"] += NO_BLOCK in table
            # Those whose step is complete; single tokens are looked after when a
            # block is full.
            at_once = not run.overlap and config.num_stages == 1
            if at_once and request.status is RequestStatus.RUNNING:
                position = run.scheduler.num_computed_tokens(request)
                needed = max(0, position - max(pool.window, size) + 1) // size
                assert NO_BLOCK not in table[needed:]
                assert set(table[: max(0, needed - 1)]) <= {NO_BLOCK}


def check_reservations(run):
    """1c: who has blocks reserved has all that it can ever need, in every group."""
    for request in run.open.values():
        length = -(-request.max_length // run.config.block_size)
        for group, table in zip(
            run.scheduler._tables.groups, request.tables, strict=True
        ):
            if table.is_reserving:
                held = len(table.blocks) - table.blocks.count(NO_BLOCK)
                assert held + table.num_reserved == group.most_held(length)


def check_budget(run, plan):
    """2: limits of the step; no row is ahead of its tokens; decode rows have one."""
    config, rows = run.config, plan.rows
    assert 0 < sum(row.num_tokens for row in rows) == plan.num_tokens
    assert plan.num_tokens <= config.token_budget
    assert sum(len(row.new_blocks) for row in rows) <= config.max_block_appends
    assert sum(row.copy is not None for row in rows) <= config.max_block_copies
    for row in rows:
        assert len(row.window_blocks) == len(config.window_pools)
        assert len(row.window_copies) == (
            len(config.window_pools) if row.copy is not None else 0
        )
    assert len({row.row for row in rows}) == len(rows) <= config.max_num_seqs
    for row in rows:
        request = run.open[row.sequence_id]
        known = request.num_tokens + run.scheduler.num_pending(request)
        end = row.position + row.num_tokens
        assert 0 <= run.scheduler.num_computed_tokens(request) == end
        assert end + row.samples <= known
        assert row.num_tokens >= 1
        assert row.tokens or row.num_tokens == 1
        assert known <= request.max_length
        if row.tokens:
            assert row.tokens == tuple(request.token_ids[row.position : end])
        if plan.is_decode:
            assert len(row.new_blocks) <= 1


def check_states(run):
    """3: each sequence is in exactly one state, and leaves exactly once."""
    running = [one for one in run.open.values() if one.status is RequestStatus.RUNNING]
    assert sorted(running, key=lambda one: one.order) == run.scheduler.running
    for request in run.open.values():
        assert request.finish_reason is None
        assert request.status is not RequestStatus.FINISHED
        assert (request.row >= 0) == (request.status is RequestStatus.RUNNING)
    assert len(running) == run.scheduler.num_running
    assert len(run.open) == run.scheduler.num_running + run.scheduler.num_waiting


def check_progress(run, plan):
    """4a: something is computed every few steps, and preemptions are bounded."""
    busy = run.scheduler.has_unfinished
    run.idle_steps = run.idle_steps + 1 if busy and plan is None else 0
    assert run.idle_steps <= PATIENCE, "nothing advances"
    limit = run.config.max_preemptions
    assert all(one.num_preemptions <= limit for one in run.open.values())


def check_order(run, plan, ready):
    """4b: nobody who waits is overtaken by a later one."""
    started = {row.sequence_id for row in plan.rows if row.starts}
    if started:
        last = max(run.open[one].order for one in started)
        for request in ready:
            if request.sequence_id not in started:
                assert request.order > last, "overtaken"


def check_tokens(run, request):
    """5: the tokens of a sequence are those it generates alone."""
    seed, _ = run.start_of[request.sequence_id]
    alone = tokens_alone(request, seed, run.device.windows)
    output = request.output_token_ids
    parent = request.fork_of
    if request.finish_reason == "error":
        family = {request.sequence_id, parent.sequence_id if parent else -1}
        assert family & run.faulted, "failed without a fault of its own"
    if request.finish_reason in {"error", "abort"}:
        assert output == alone[: len(output)]
    else:
        assert output == alone
        stopped = output[-1] in request.stop_token_ids
        stopped = stopped and len(output) >= request.min_tokens
        assert request.finish_reason == ("stop" if stopped else "length")


def check_no_shared_write(run, plan):
    """6: no block is written that another table or the cache holds."""
    size = run.config.block_size
    for row in plan.rows:
        end = row.position + row.num_tokens
        written = slice(row.position // size, (end - 1) // size + 1)
        tables = run.open[row.sequence_id].tables
        for pool, table in zip(run.scheduler.pools, tables, strict=True):
            for block in table.blocks[written]:
                assert pool.references(block) == 1, "a shared block is written"
                assert block not in pool._cache, "a cached block is written"


def check_everything_ended(run):
    """7: when all sequences have ended, nothing is left of them."""
    assert not run.open, f"{len(run.open)} sequences never end"
    assert run.in_flight is None
    scheduler = run.scheduler
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.num_free_blocks == run.config.num_blocks
    sequences = scheduler._sequences
    assert not sequences._by_request
    assert not sequences._unfinished
    assert not any(sequences._forks.values())
    assert sequences._waiting.peek() is None
    assert not sequences._waiting._heap
    assert not scheduler._launched
    assert scheduler.reset_prefix_cache()
    for pool in scheduler.pools:
        assert len(pool._cache) == 0
        assert len(pool._free) == pool.num_blocks


# --- many runs ---------------------------------------------------------------


def run_seeds(first, count, num_steps=NUM_STEPS):
    """Runs seeds in turn; returns the sums of their counts, or raises with the seed."""
    totals = {}
    for seed in range(first, first + count):
        try:
            counts = Simulation(seed, num_steps).run()
        except Exception as error:
            command = f"python tests/jllm/scheduler/simulator.py --seed {seed}"
            error.add_note(f"seed {seed} fails; reproduce it with: {command}")
            raise
        for key, value in counts.items():
            totals[key] = totals.get(key, 0) + value
    return totals


def main():
    """Runs the seeds that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    first, count = options.first_seed, options.seeds
    if options.seed is not None:
        first, count = options.seed, 1
    print(run_seeds(first, count, options.steps))


if __name__ == "__main__":
    main()
