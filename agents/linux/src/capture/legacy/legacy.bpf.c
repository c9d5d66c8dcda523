/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Capture of block writes at `block_rq_issue` on kernels without BPF ring buffer and without type information: the kernel half of
 * `bpf-legacy`. What it captures and what it promises is what `capture.bpf.c` does and promises; here is only what differs.
 *
 * What old kernels lack, and what stands in its place:
 *   type information       offsets in `config`, found by calibration (offsets.rs)
 *   read-only constants    `config`
 *   ring buffer            a perf buffer per CPU; every record has the time its program began, user space merges by it
 *   loops                  everything is unrolled; long walks go on by tail calls
 *   mappable arrays        the dirty map is read by calls; there are two of each piece, `flip` says which one is marked
 *   errors of the output   before 5.1 the kernel does not say that a perf buffer is full: the agent tells in `credit` what it has freed
 *   nested outputs         before 5.2 an interrupt that sends while the code it interrupted is sending would spoil that record:
 *                          `busy` keeps it from it, and the record waits in `deferred` for the interrupted program
 *
 * The proof of order. A program first counts itself in (`enter`, a locked addition: a full barrier), then takes the time, then sends, then
 * counts itself out (`exit`). Whoever reads the clock, then both counts, and finds them equal knows that whatever this CPU sends later
 * has a later time. See perf.rs.
 *
 * Written for kernels from 4.18 on: helpers known there (map access, probe_read, ktime, tail_call, smp_processor_id, perf_event_output),
 * `-mcpu=v2`, each program below 4096 instructions, no backward jump.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
/* Maps are described by sizes and never by types: see `without_types` in mod.rs. */
#define __uint(name, val) int(*name)[val]
#define __array(name, val) typeof(val) *name[]
#define UNROLL _Pragma("clang loop unroll(full)")

/* The licence of this program only; the kernel lends its tracing helpers to GPL-compatible programs. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";

static void *(*const map_lookup)(const void *map, const void *key) = (void *)1;
static long (*const probe_read)(void *to, u32 len, const void *from) = (void *)4;
static u64 (*const ktime_ns)(void) = (void *)5;
static u32 (*const this_cpu)(void) = (void *)8;
static long (*const tail_call)(void *ctx, const void *map, u32 index) = (void *)12;
static long (*const perf_output)(void *ctx, const void *map, u64 flags, void *data, u64 len) = (void *)25;
#define CURRENT_CPU 0xffffffffull

/* ---- what the agent tells ---- */
struct config {
	u64 vmemmap, direct, page_size;	/* as in capture.bpf.c */
	u64 ring_bytes;			/* of each CPU's buffer */
	u32 sector, len, cmd, bio;	/* offsets in struct request */
	u32 iter, vec;			/* in struct bio: bi_iter, bi_io_vec; bi_next is its first word */
	u32 disk, by_queue;		/* of the pointer to the disk: in the request, or in its queue */
	/* calibration */
	u64 want_sector, magic, pfn, skip_gib;
	u32 hops, hop[3];		/* offsets to follow from the request */
	u32 from;			/* added at the end */
	u32 pad;
};
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct config));
} config SEC(".maps");

/* ---- records: as in capture.bpf.c and layout.rs ---- */
struct event {
	u64 mono_ns, sector, rq;
	u32 len, total, lost, target, flags;
	i32 error;
};
#define E_DATA 1
#define E_FIRST 2
#define E_LAST 4
#define E_FUA 8
#define E_PREFLUSH 16
#define E_COMPLETE 32
#define E_FAULT 64
#define E_OP_SHIFT 16

#define OP_WRITE 1
#define OP_FLUSH 2
#define OP_DISCARD 3
#define OP_SECURE_ERASE 5
#define OP_WRITE_ZEROES 9
#define OP_DRIVER_FIRST 32
#define FUA_BIT 17
#define PREFLUSH_BIT 18

#define CHUNK 4096
/* Per program; the kernel allows 32 tail calls after the first: 264 pieces in all, 1 MiB of single pages and some. */
#define STEPS 8
#define NESTING 4
#define DEFERRED 8

struct chunk {
	struct event e;
	u8 data[CHUNK];
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by nesting */
	__uint(max_entries, NESTING);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct chunk));
} scratch SEC(".maps");

struct {
	__uint(type, 4); /* PERF_EVENT_ARRAY, by CPU */
	__uint(max_entries, 0);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} events SEC(".maps");

/* Bytes of its buffer that the agent has freed, by CPU. */
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u64));
} credit SEC(".maps");

struct state {
	u64 enter, exit, produced;
	u32 busy, depth;
	u64 waiting;
	struct event deferred[DEFERRED];
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct state));
} state SEC(".maps");

struct cursor {
	u64 bio, vecs, sector, rq, now, target;
	u32 index, done, in_bio, left, flags, total, id, lost;
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by nesting */
	__uint(max_entries, NESTING);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct cursor));
} cursors SEC(".maps");

struct {
	__uint(type, 3); /* PROG_ARRAY: [0] hf_copy, [1] hf_ranges */
	__uint(max_entries, 2);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} tails SEC(".maps");
#define TAIL_COPY 0
#define TAIL_RANGES 1

/* ---- targets, losses, counters: as in capture.bpf.c ---- */
#define MAX_TARGETS 64
#define MAX_RANGES 8
#define MAX_SKIPS 256
#define SKIPS_SHIFT 8
struct span {
	u64 start, end;
};
struct target {
	u32 id, ranges_len, skips_len, first_chunk;
	u64 granules;
	u32 by_bio, pad;
	struct span ranges[MAX_RANGES];
	struct span skips[MAX_SKIPS];
};
struct {
	__uint(type, 1); /* HASH; key: major << 32 | first minor of the whole disk */
	__uint(max_entries, MAX_TARGETS);
	__uint(key_size, sizeof(u64));
	__uint(value_size, sizeof(struct target));
} targets SEC(".maps");

/* One byte per 64 KiB, 4096 of them in a cell: 256 MiB of disk are read by one call. Place: chunk * 2 + flip. */
#define GRANULE_SHIFT 16
#define CELL_SHIFT 12
#define CELL_BYTES (1 << CELL_SHIFT)
#define CELLS_PER_CHUNK 128
#define CHUNK_SHIFT 19
#define MAX_MARKED 18 /* 1 MiB and both edges; longer ranges go to `big` */
struct cell {
	u8 granule[CELL_BYTES];
};
struct dirty_chunk {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, CELLS_PER_CHUNK);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct cell));
};
struct {
	__uint(type, 12); /* ARRAY_OF_MAPS */
	__uint(max_entries, 65536);
	__uint(key_size, sizeof(u32));
	__array(values, struct dirty_chunk);
/* A long name: the loader calls the inner map by it and ".inner", cut off at 15, and kernels before 5.2 take no dot. */
} dirty_map_pieces SEC(".maps");

#define BIG_LEN 512
struct big {
	u64 count;
	struct {
		u64 target, sector, sectors;
	} range[BIG_LEN];
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct big));
} big SEC(".maps");

struct counters {
	u64 requests, bytes, drops, drop_bytes, faults, truncated, passthrough, unknown;
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by id modulo */
	__uint(max_entries, MAX_TARGETS);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct counters));
} counters SEC(".maps");

/* [0] losses so far; [1] which of the two dirty maps is marked. */
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 2);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u64));
} losses SEC(".maps");

/* ---- reading the kernel ---- */
INLINE u64 quad_at(u64 from)
{
	u64 v = 0;
	probe_read(&v, sizeof(v), (void *)from);
	return v;
}
INLINE u32 word_at(u64 from)
{
	u32 v = 0;
	probe_read(&v, sizeof(v), (void *)from);
	return v;
}
INLINE struct config *told(void)
{
	u32 zero = 0;
	return map_lookup(&config, &zero);
}
INLINE struct target *target_of(struct config *cfg, u64 rq)
{
	u64 at = rq;
	if (cfg->by_queue)
		at = quad_at(rq);
	/* struct gendisk begins with major and first minor. */
	u64 disk = quad_at(at + cfg->disk);
	u64 numbers = quad_at(disk);
	u64 key = numbers << 32 | numbers >> 32;
	return map_lookup(&targets, &key);
}

INLINE int wanted(struct target *t, u64 start, u64 end)
{
	int hit = 0;
	UNROLL
	for (u32 i = 0; i < MAX_RANGES; i++) {
		if (i < t->ranges_len && start < t->ranges[i].end && end > t->ranges[i].start)
			hit = 1;
	}
	if (!hit)
		return 0;
	u32 low = 0, high = t->skips_len;
	UNROLL
	for (int i = 0; i <= SKIPS_SHIFT; i++) {
		if (low < high) {
			u32 middle = ((low + high) >> 1) & (MAX_SKIPS - 1);
			if (start >= t->skips[middle].end)
				low = middle + 1;
			else
				high = middle;
		}
	}
	if (low >= t->skips_len)
		return 1;
	low &= MAX_SKIPS - 1;
	return !(start >= t->skips[low].start && end <= t->skips[low].end);
}

/* ---- losses ---- */
INLINE u64 cell_of(u32 i)
{
	u64 *n = map_lookup(&losses, &i);
	return n ? *n : 0;
}
INLINE void count_loss(void)
{
	u32 zero = 0;
	u64 *n = map_lookup(&losses, &zero);
	if (n)
		__sync_fetch_and_add(n, 1);
}
INLINE void lose_range(struct target *t, u64 sector, u64 bytes)
{
	u32 zero = 0;
	struct big *b = map_lookup(&big, &zero);
	if (b) {
		u64 i = b->count & (BIG_LEN - 1);
		b->range[i].target = t->id;
		b->range[i].sector = sector;
		b->range[i].sectors = (bytes + 511) >> 9;
		b->count++;
	}
	count_loss();
}
/* One use per program: it is some 500 instructions. */
INLINE void lose(struct target *t, u64 sector, u64 bytes)
{
	u64 at = (sector << 9) >> GRANULE_SHIFT, end = ((sector << 9) + bytes + 65535) >> GRANULE_SHIFT;
	if (end - at > MAX_MARKED) {
		lose_range(t, sector, bytes);
		return;
	}
	u32 flip = (u32)cell_of(1) & 1;
	UNROLL
	for (u32 i = 0; i < MAX_MARKED; i++) {
		if (at < end && at < t->granules) {
			u32 chunk = (t->first_chunk + (u32)(at >> CHUNK_SHIFT)) * 2 + flip;
			void *cells = map_lookup(&dirty_map_pieces, &chunk);
			if (cells) {
				u32 cell = (u32)(at >> CELL_SHIFT) & (CELLS_PER_CHUNK - 1);
				struct cell *c = map_lookup(cells, &cell);
				if (c) {
					u64 g = at & (CELL_BYTES - 1);
					asm volatile("" : "+r"(g));
					g &= CELL_BYTES - 1;
					c->granule[g] = 1;
				}
			}
			at++;
		}
	}
	count_loss();
}

/* ---- in and out ---- */
INLINE struct state *enter(void)
{
	u32 zero = 0;
	struct state *st = map_lookup(&state, &zero);
	if (st)
		__sync_fetch_and_add(&st->enter, 1);
	return st;
}
/* Puts a record into this CPU's buffer, if there is room and nobody is at it. */
INLINE int sent(void *ctx, struct config *cfg, struct state *st, void *data, u64 len, u64 need)
{
	u32 cpu = this_cpu();
	u64 *freed = map_lookup(&credit, &cpu);
	/* The kernel wants a byte to stay free. */
	if (!freed || st->busy || st->produced + need - *freed >= cfg->ring_bytes)
		return 0;
	st->busy = 1;
	long failed = perf_output(ctx, &events, CURRENT_CPU, data, len);
	/* Before others may send again. */
	if (!failed)
		st->produced += need;
	st->busy = 0;
	return !failed;
}
/* What a record takes: its head, the length, and the data, rounded up. */
#define NEED(len) (8 + (((len) + 4 + 7) & ~7ull))
INLINE void drain(void *ctx, struct config *cfg, struct state *st)
{
	if (st->busy)
		return;
	UNROLL
	for (u32 i = 0; i < DEFERRED; i++) {
		if (i < st->waiting) {
			/* With no room the completion is lost: the request then ends when its memory is used again or its disk rests. */
			sent(ctx, cfg, st, &st->deferred[i], sizeof(struct event), NEED(sizeof(struct event)));
		}
	}
	st->waiting = 0;
}
/* Counts out; the outermost program sends what interrupts left first. */
INLINE void leave(void *ctx, struct config *cfg, struct state *st)
{
	if (st->depth == 0 && st->waiting)
		drain(ctx, cfg, st);
	__sync_fetch_and_add(&st->exit, 1);
}

/* ---- data ---- */
INLINE u64 less(u64 a, u64 b)
{
	u64 d = a - b;
	asm volatile("" : "+r"(d));
	return d >> 63;
}
INLINE u64 min(u64 a, u64 b)
{
	u64 mask = 0 - less(a, b);
	asm volatile("" : "+r"(mask));
	return (a & mask) | (b & ~mask);
}
INLINE void enter_bio(struct config *cfg, struct cursor *c)
{
	struct {
		u32 size, index, done;
	} it = { 0 };
	c->vecs = quad_at(c->bio + cfg->vec);
	/* struct bvec_iter: sector, size, index, done; packed like that since 3.14. */
	probe_read(&it, sizeof(it), (void *)(c->bio + cfg->iter + 8));
	c->index = it.index;
	c->done = it.done;
	c->in_bio = it.size;
}
INLINE int step(void *ctx, struct config *cfg, struct state *st, struct cursor *c, struct counters *n, struct chunk *r)
{
	struct {
		u64 page;
		u32 len, offset;
	} vec = { 0 };
	probe_read(&vec, sizeof(vec), (void *)(c->vecs + (u64)c->index * sizeof(vec)));
	u64 len = min(min(vec.len - c->done, c->in_bio), CHUNK);
	asm volatile("" : "+r"(len));
	len &= 0x1fff;
	if (len > CHUNK)
		len = CHUNK;
	if (len == 0)
		return 1;
	u64 from = (vec.page - cfg->vmemmap) / cfg->page_size * 4096 + cfg->direct + vec.offset + c->done;
	u64 fault = (u64)probe_read(r->data, len, (void *)from) >> 63;
	r->e.mono_ns = c->now;
	r->e.sector = c->sector;
	r->e.rq = c->rq;
	r->e.len = len;
	r->e.total = c->total;
	r->e.lost = c->lost;
	r->e.target = c->id;
	r->e.flags = c->flags | E_DATA << (fault * 6) | E_LAST * less(c->left - len, 1);
	r->e.error = 0;
	if (!sent(ctx, cfg, st, r, sizeof(struct event) + len, NEED(sizeof(struct event) + len)))
		return 1;
	n->faults += fault;
	n->bytes += len;
	c->left -= len;
	c->flags &= ~E_FIRST;
	c->sector += len >> 9;
	c->in_bio -= len;
	c->done += len;
	u64 over = less(vec.len, (u64)c->done + 1);
	c->index += over;
	c->done &= (u32)(over - 1);
	if (c->in_bio == 0) {
		c->bio = quad_at(c->bio);
		enter_bio(cfg, c);
	}
	return 0;
}

/* Everything that a tail call needs again; 0 when something is missing, which cannot be. */
struct all {
	struct config *cfg;
	struct state *st;
	struct cursor *c;
	struct chunk *r;
	struct target *t;
	struct counters *n;
};
INLINE int again(struct all *a)
{
	u32 zero = 0;
	a->cfg = told();
	a->st = map_lookup(&state, &zero);
	if (!a->cfg || !a->st)
		return 0;
	u32 level = a->st->depth - 1;
	a->c = map_lookup(&cursors, &level);
	a->r = map_lookup(&scratch, &level);
	if (!a->c || !a->r)
		return 0;
	u64 key = a->c->target;
	a->t = map_lookup(&targets, &key);
	u32 place = a->c->id & (MAX_TARGETS - 1);
	a->n = map_lookup(&counters, &place);
	return a->t && a->n;
}
INLINE void end(void *ctx, struct config *cfg, struct state *st)
{
	st->depth--;
	leave(ctx, cfg, st);
}
/* A disk that was taken out while a request of it was being copied. */
INLINE int dropped(void *ctx)
{
	u32 zero = 0;
	struct state *st = map_lookup(&state, &zero);
	struct config *cfg = told();
	if (st && cfg)
		end(ctx, cfg, st);
	return 0;
}

SEC("raw_tp/hf_copy")
int hf_copy(u64 *ctx)
{
	struct all a;
	if (!again(&a))
		return dropped(ctx);
	int stopped = 0;
	UNROLL
	for (int i = 0; i < STEPS; i++) {
		if (!stopped)
			stopped = step(ctx, a.cfg, a.st, a.c, a.n, a.r);
	}
	if (!stopped && a.c->left)
		tail_call(ctx, &tails, TAIL_COPY);
	u32 left = a.c->left;
	if (left) {
		if (stopped) {
			a.n->drops++;
			a.n->drop_bytes += left;
		} else {
			a.n->truncated++;
		}
		lose(a.t, a.c->sector, left);
	}
	end(ctx, a.cfg, a.st);
	return 0;
}

/* A merged discard is several ranges: one record for each. */
SEC("raw_tp/hf_ranges")
int hf_ranges(u64 *ctx)
{
	struct all a;
	if (!again(&a))
		return dropped(ctx);
	UNROLL
	for (int i = 0; i < STEPS; i++) {
		u64 bio = a.c->bio;
		if (bio) {
			struct {
				u64 sector;
				u32 size, pad;
			} it = { 0 };
			probe_read(&it, sizeof(it), (void *)(bio + a.cfg->iter));
			bio = quad_at(bio);
			a.c->bio = bio;
			a.r->e.mono_ns = a.c->now;
			a.r->e.sector = it.sector;
			a.r->e.rq = a.c->rq;
			a.r->e.len = it.size;
			a.r->e.total = a.c->total;
			a.r->e.lost = a.c->lost;
			a.r->e.target = a.c->id;
			a.r->e.flags = a.c->flags | (bio ? 0 : E_LAST);
			a.r->e.error = 0;
			a.c->flags &= ~E_FIRST;
			if (!sent(ctx, a.cfg, a.st, a.r, sizeof(struct event), NEED(sizeof(struct event)))) {
				a.n->drops++;
				a.n->drop_bytes += it.size;
				lose_range(a.t, it.sector, it.size);
			}
		}
	}
	if (a.c->bio)
		tail_call(ctx, &tails, TAIL_RANGES);
	/* More than 264 ranges: what is left out is told as a request whose end was lost, when it completes. */
	end(ctx, a.cfg, a.st);
	return 0;
}

/* ---- the tracepoints ---- */
INLINE int issue(u64 *ctx, u64 rq)
{
	struct config *cfg = told();
	if (!cfg)
		return 0;
	struct target *t = target_of(cfg, rq);
	if (!t)
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	u32 cmd = word_at(rq + cfg->cmd), op = cmd & 0xff;
	if (op >= OP_DRIVER_FIRST) {
		if (op & 1)
			n->passthrough++;
		return 0;
	}
	if (op != OP_FLUSH && !(op & 1))
		return 0;
	u64 sector = quad_at(rq + cfg->sector);
	u32 total = word_at(rq + cfg->len);
	if (op == OP_FLUSH) {
		sector = 0;
		total = 0;
	} else if (op != OP_DISCARD && op != OP_SECURE_ERASE && !wanted(t, sector, sector + ((total + 511) >> 9))) {
		return 0;
	}
	struct state *st = enter();
	if (!st)
		return 0;
	n->requests++;
	u32 lost = total, level = st->depth;
	struct cursor *c = map_lookup(&cursors, &level);
	struct chunk *r = map_lookup(&scratch, &level);
	if (c && r) {
		st->depth = level + 1;
		u32 flags = op << E_OP_SHIFT | E_FIRST;
		if (cmd & (1u << FUA_BIT))
			flags |= E_FUA;
		if (cmd & (1u << PREFLUSH_BIT))
			flags |= E_PREFLUSH;
		c->rq = rq;
		c->bio = quad_at(rq + cfg->bio);
		u64 key = 0;
		{
			u64 at = rq;
			if (cfg->by_queue)
				at = quad_at(rq);
			u64 numbers = quad_at(quad_at(at + cfg->disk));
			key = numbers << 32 | numbers >> 32;
		}
		c->target = key;
		c->id = t->id;
		c->left = total;
		c->total = total;
		c->sector = sector;
		c->flags = flags;
		c->lost = (u32)cell_of(0);
		c->now = ktime_ns();
		if (op == OP_WRITE) {
			enter_bio(cfg, c);
			tail_call(ctx, &tails, TAIL_COPY);
			n->drops++;
			n->drop_bytes += lost;
		} else if (op == OP_DISCARD || op == OP_SECURE_ERASE) {
			tail_call(ctx, &tails, TAIL_RANGES);
			n->drops++;
			n->drop_bytes += lost;
		} else if (op == OP_WRITE_ZEROES || op == OP_FLUSH) {
			r->e.mono_ns = c->now;
			r->e.sector = sector;
			r->e.rq = rq;
			r->e.len = total;
			r->e.total = total;
			r->e.lost = c->lost;
			r->e.target = t->id;
			r->e.flags = flags | E_LAST;
			r->e.error = 0;
			if (sent(ctx, cfg, st, r, sizeof(struct event), NEED(sizeof(struct event)))) {
				lost = 0;
			} else {
				n->drops++;
				n->drop_bytes += lost;
			}
		} else {
			n->unknown++;
		}
		st->depth = level;
	} else {
		/* Nested deeper than there is room for. */
		n->drops++;
		n->drop_bytes += lost;
	}
	if (lost)
		lose(t, sector, lost);
	leave(ctx, cfg, st);
	return 0;
}

/* Which argument the request is, is found by what the kernel lets be attached: it refuses a program that reads past the arguments. */
SEC("raw_tp/block_rq_issue")
int hf_issue_first(u64 *ctx)
{
	return issue(ctx, ctx[0]);
}
SEC("raw_tp/block_rq_issue")
int hf_issue_second(u64 *ctx)
{
	return issue(ctx, ctx[1]);
}

SEC("raw_tp/block_rq_complete")
int hf_complete(u64 *ctx)
{
	u64 rq = ctx[0];
	i32 error = (i32)ctx[1];
	u32 bytes = (u32)ctx[2];
	struct config *cfg = told();
	if (!cfg)
		return 0;
	struct target *t = target_of(cfg, rq);
	if (!t)
		return 0;
	u32 op = word_at(rq + cfg->cmd) & 0xff;
	if (!bytes || op >= OP_DRIVER_FIRST || op == OP_FLUSH || !(op & 1))
		return 0;
	u64 sector = quad_at(rq + cfg->sector);
	if (op != OP_DISCARD && op != OP_SECURE_ERASE && !wanted(t, sector, sector + ((bytes + 511) >> 9)))
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	struct state *st = enter();
	if (!st)
		return 0;
	u32 total = word_at(rq + cfg->len);
	struct event e = {
		.mono_ns = ktime_ns(),
		.sector = sector,
		.rq = rq,
		.len = bytes,
		.total = total,
		.lost = (u32)cell_of(0),
		.target = t->id,
		.flags = E_COMPLETE | op << E_OP_SHIFT,
		.error = error,
	};
	int told_it;
	u64 waiting = st->waiting;
	if (st->busy) {
		told_it = waiting < DEFERRED;
		if (told_it) {
			st->deferred[waiting & (DEFERRED - 1)] = e;
			st->waiting = waiting + 1;
		}
	} else {
		told_it = sent(ctx, cfg, st, &e, sizeof(e), NEED(sizeof(e)));
	}
	if (!told_it) {
		n->drops++;
		n->drop_bytes += bytes;
		lose(t, sector, bytes);
	}
	leave(ctx, cfg, st);
	return 0;
}

/* ---- calibration ---- */
#define LOOK_WORDS 32
#define PEEK_BYTES 512
struct peek {
	u64 hits, page, direct, pad;
	u64 request[LOOK_WORDS];
	u8 data[PEEK_BYTES];
};
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct peek));
} peeked SEC(".maps");

/* Whether this is the agent's own request: one of its words is the sector. Leaves its first words in `peeked`. */
INLINE struct peek *ours(struct config *cfg, u64 rq)
{
	u32 zero = 0;
	struct peek *p = map_lookup(&peeked, &zero);
	if (!p || p->hits)
		return 0;
	u64 want = cfg->want_sector, hit = 0;
	UNROLL
	for (int i = 4; i < LOOK_WORDS / 2; i++) {
		if (quad_at(rq + i * 8) == want)
			hit = 1;
	}
	if (!hit || probe_read(p->request, sizeof(p->request), (void *)rq))
		return 0;
	return p;
}

/* Follows pointers from the request, and copies what is at the end. */
INLINE int look(u64 *ctx, u64 rq)
{
	struct config *cfg = told();
	if (!cfg)
		return 0;
	struct peek *p = ours(cfg, rq);
	if (!p)
		return 0;
	u64 at = rq;
	if (cfg->hops > 0)
		at = quad_at(at + cfg->hop[0]);
	if (cfg->hops > 1)
		at = quad_at(at + cfg->hop[1]);
	if (cfg->hops > 2)
		at = quad_at(at + cfg->hop[2]);
	/* What cannot be read is shown as zeroes. */
	probe_read(p->data, PEEK_BYTES, (void *)(at + cfg->from));
	p->hits = 1;
	return 0;
}
SEC("raw_tp/block_rq_issue")
int hf_look_first(u64 *ctx)
{
	return look(ctx, ctx[0]);
}
SEC("raw_tp/block_rq_issue")
int hf_look_second(u64 *ctx)
{
	return look(ctx, ctx[1]);
}

#define SEARCH_GIB 64
/* Where the one-to-one map of all memory begins: see capture.bpf.c. */
INLINE int direct(u64 *ctx, u64 rq)
{
	struct config *cfg = told();
	if (!cfg)
		return 0;
	struct peek *p = ours(cfg, rq);
	if (!p)
		return 0;
	u64 base = (rq & ~((1ull << 30) - 1)) - (cfg->skip_gib << 30), found = 0;
	UNROLL
	for (int i = 0; i < SEARCH_GIB; i++) {
		if (!found && quad_at(base + (cfg->pfn << 12)) == cfg->magic)
			found = base;
		base -= 1ull << 30;
	}
	p->direct = found;
	p->hits = 1;
	return 0;
}
SEC("raw_tp/block_rq_issue")
int hf_direct_first(u64 *ctx)
{
	return direct(ctx, ctx[0]);
}
SEC("raw_tp/block_rq_issue")
int hf_direct_second(u64 *ctx)
{
	return direct(ctx, ctx[1]);
}
