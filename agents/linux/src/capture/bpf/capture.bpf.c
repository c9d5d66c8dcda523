/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Capture of block writes at `block_rq_issue`: the kernel half of the `bpf-rq` backend.
 *
 * What it does. When the block layer hands a request to a driver, `hf_issue` looks the disk up in `targets`; for a write of
 * a protected disk it copies the data, page by page, into `ring`, one ring for all disks, so that the order of reservation
 * is one total order over the whole host. `hf_complete` adds a record when the driver is done. Nothing here can delay or fail
 * a request: what does not fit is marked in `dirty` and counted.
 *
 * Why the order is right. If write B depends on write A, A had completed before B was issued, so all of A lies in the ring
 * before any of B. Writes in flight together may come in either order, as they may on the disk.
 *
 * Losses are told in band. Every record carries `lost`, the number of losses so far. A loss is marked dirty first and
 * counted after, so whoever sees a record with a new count finds the mark. A write that depends on a lost one is issued after
 * the lost one completed, hence after the count: no record that depends on a loss carries the old count. A write that was
 * never seen (attached too late, recursion guard) still shows a completion without an issue, and that one too comes before
 * anything that depends on it.
 *
 * A disk in MODE_MARKS has its writes marked and not copied: once at their issue and once at their completion, so that who takes the
 * marks and reads the disk at any moment is told again of what reached it after. These marks are not counted as losses: they are looked
 * for by who set the mode. Completions are still recorded, for the writes that were issued before the mode changed.
 *
 * Written for `-mcpu=v2` and kernels from 5.8 on: no atomic fetch, no global functions, helpers by number, own declarations
 * of the kernel's types (CO-RE relocates them), no header of any package. What the verifier needs is remarked where it stands.
 * `event` and `layout.rs` describe the same bytes; change both.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]

/* The licence of this program only; the kernel lends its tracing helpers to GPL-compatible programs. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* ---- helpers, by their stable numbers ---- */
static void *(*const map_lookup)(const void *map, const void *key) = (void *)1;
static u64 (*const ktime_ns)(void) = (void *)5;
static long (*const map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const map_delete)(void *map, const void *key) = (void *)3;
static long (*const read_kernel)(void *to, u32 len, const void *from) = (void *)113;
static void *(*const ring_reserve)(void *ring, u64 len, u64 flags) = (void *)131;
static void (*const ring_submit)(void *rec, u64 flags) = (void *)132;
/* Never wake the reader: a wake-up per record doubles the cost in the host's I/O path. The reader polls on a timer. */
#define NO_WAKEUP 1

/* ---- the kernel's types, as far as they are read ---- */
#define CORE __attribute__((preserve_access_index))
struct gendisk {
	i32 major, first_minor;
} CORE;
struct block_device {
	struct gendisk *bd_disk;
} CORE;
struct request_queue {
	struct gendisk *disk; /* since 5.15; before, the request itself points at the disk */
} CORE;
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size, bi_idx, bi_bvec_done;
} CORE;
struct page;
struct bio_vec {
	struct page *bv_page;
	u32 bv_len, bv_offset;
} CORE;
struct bio {
	struct bio *bi_next;
	struct bio_vec *bi_io_vec;
	struct bvec_iter bi_iter;
	u32 bi_opf;
	u8 bi_status;
	struct block_device *bi_bdev; /* since 5.12; before, the bio itself points at the disk */
} CORE;
struct bio___old {
	struct gendisk *bi_disk;
} CORE;
struct request {
	struct request_queue *q;
	struct bio *bio;
	u64 __sector;
	u32 cmd_flags, __data_len;
} CORE;
struct request___old {
	struct gendisk *rq_disk;
} CORE;

/*
 * Reads one field; zero when the memory is not there. The pointer is taken out of the relocated expression: inside it, fields of
 * our own structs on the way to the pointer would be looked up in the kernel too.
 */
#define READ(ptr, field)                                                                                              \
	({                                                                                                            \
		typeof(ptr) __p = (ptr);                                                                              \
		typeof(__p->field) __v = 0;                                                                           \
		read_kernel(&__v, sizeof(__v), __builtin_preserve_access_index(&__p->field));                         \
		__v;                                                                                                  \
	})
#define FIELD_EXISTS(type, field) __builtin_preserve_field_info(((type *)0)->field, 2)

/* ---- constants set by the loader, from the kernel's BTF and from calibration ---- */
const volatile u32 rq_arg = 0;		/* which argument of block_rq_issue is the request: 0, or 1 where the queue comes first */
const volatile u32 bio_arg = 0;		/* the same of block_bio_queue */
const volatile u32 bio_done_arg = 1;	/* the same of block_bio_complete */
const volatile u32 fua_bit = 17, preflush_bit = 18;
const volatile u64 page_struct_size = 64;
const volatile u64 vmemmap_base = 0;	/* where struct page 0 would lie */
const volatile u64 direct_base = 0;	/* where the kernel maps all memory one to one */
const volatile u64 calib_magic = 0;	/* first word of the page that is being looked for */
const volatile u64 calib_pfn = 0;	/* its page frame number */
const volatile u64 calib_sector = 0;	/* where on the disk it is read from: tells our read from everybody else's */
const volatile u64 calib_skip_gib = 0;	/* where to begin looking, below the request's own address */

/* ---- records ---- */
struct event {
	u64 mono_ns;	/* CLOCK_MONOTONIC when the record was reserved */
	u64 sector;	/* of the whole disk, 512 bytes each */
	u64 rq;		/* pairs chunks and completion; means nothing else */
	u32 len;	/* bytes of this chunk, of the whole range when there is no data, or completed */
	u32 total;	/* bytes of the whole request */
	u32 lost;	/* losses so far, see above */
	u32 target;	/* `id` of the target */
	u32 flags;	/* E_*, and the operation from bit 16 on */
	i32 error;	/* completion: 0, or an errno or blk_status_t, by kernel */
};
#define E_DATA 1	/* `len` bytes of data follow */
#define E_FIRST 2
#define E_LAST 4	/* all of the request has been seen */
#define E_FUA 8
#define E_PREFLUSH 16
#define E_COMPLETE 32
#define E_FAULT 64	/* a page could not be read: `len` bytes at `sector` must be read again */
#define E_MARKED 128	/* completion in MODE_MARKS: its range is marked, whether its issue was recorded or not */
#define E_OP_SHIFT 16

#define OP_WRITE 1
#define OP_FLUSH 2
#define OP_DISCARD 3
#define OP_SECURE_ERASE 5
#define OP_WRITE_ZEROES 9
#define OP_DRIVER_FIRST 32 /* from here on: commands passed through to the device */

/*
 * Data goes into records of one of two sizes: a run of 64 KiB in one piece of memory into a large one, all else page by page. The
 * kernel wants a record's size to be a constant.
 */
#define CHUNK 4096
#define LARGE_SHIFT 16
#define LARGE (1 << LARGE_SHIFT)
/* 1.5 MiB of single pages; the agent keeps `queue/max_sectors_kb` at 1024 or less. What is longer is marked dirty. */
#define MAX_STEPS 384
/* An NVMe discard has at most 256 ranges. */
#define MAX_DISCARDS 256

/* ---- maps ---- */
struct {
	__uint(type, 27); /* RINGBUF; the loader sets the size */
	__uint(max_entries, 1 << 26);
} ring SEC(".maps");

#define MODE_DATA 0
#define MODE_MARKS 1	/* writes are not copied: their ranges are marked when they are issued and again when they complete */
#define MAX_TARGETS 64	/* protected disks of one host */
#define MAX_RANGES 8	/* protected partitions of one disk */
#define MAX_SKIPS 256	/* extents of our own spool files on one disk; a power of two */
#define SKIPS_SHIFT 8
struct span {
	u64 start, end;	/* sectors, end exclusive */
};
struct target {
	u32 id;		/* never given twice while the maps live; modulo MAX_TARGETS its place in `counters` */
	u32 ranges_len, skips_len;
	u32 first_chunk;	/* of the dirty map */
	u64 granules;
	u32 by_bio;		/* has no request queue: captured by its bios */
	u32 mode;		/* MODE_* */
	struct span ranges[MAX_RANGES];	/* only these are captured */
	struct span skips[MAX_SKIPS];	/* a request wholly inside one of these is not; sorted, apart from each other */
};
struct {
	__uint(type, 1); /* HASH; key: major << 32 | first minor of the whole disk */
	__uint(max_entries, MAX_TARGETS);
	__type(key, u64);
	__type(value, struct target);
} targets SEC(".maps");

/*
 * Dirty map: one byte per 64 KiB, so that a plain store is enough on kernels without atomic OR. Byte cells lie in maps of
 * 512 KiB (32 GiB of disk each), which lie in an outer map: a disk can be added without making anything anew.
 */
#define GRANULE_SHIFT 16
#define CELLS_PER_CHUNK 65536		/* of 8 granules */
#define GRANULES_PER_CHUNK_SHIFT 19
#define MAX_MARKED 66			/* granules marked in one go: 4 MiB and two edges; longer ranges go to `big` */
struct dirty_chunk {
	__uint(type, 2); /* ARRAY */
	__uint(map_flags, 1 << 10); /* MMAPABLE */
	__uint(max_entries, CELLS_PER_CHUNK);
	__type(key, u32);
	__type(value, u64);
};
struct {
	__uint(type, 12); /* ARRAY_OF_MAPS */
	__uint(max_entries, 32768);
	__type(key, u32);
	__array(values, struct dirty_chunk);
} dirty SEC(".maps");

/* Long ranges that were lost (a discard of gigabytes): a small ring per CPU, counted, never reset. */
#define BIG_LEN 512 /* twice the ranges of one discard */
struct big {
	u64 count;
	struct {
		u64 target, sector, sectors;
	} range[BIG_LEN];
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY */
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct big);
} big SEC(".maps");

struct counters {
	u64 requests, bytes, drops, drop_bytes, faults, truncated, passthrough, unknown;
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by `id` modulo */
	__uint(max_entries, MAX_TARGETS);
	__type(key, u32);
	__type(value, struct counters);
} counters SEC(".maps");

/* The agent reads it with each poll, by a mapping and not by a call. */
struct {
	__uint(type, 2); /* ARRAY: [0] losses so far */
	__uint(map_flags, 1 << 10); /* MMAPABLE */
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} losses SEC(".maps");

/* Written by the agent only: what a later agent must know to go on with the pinned maps. */
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 16);
	__type(key, u32);
	__type(value, u64);
} meta SEC(".maps");

/*
 * Bios under way of disks without a request queue: what has been advanced, split or passed on no longer shows where it
 * began when it completes.
 */
#define MAX_BIOS 16384
struct bio_state {
	u64 disk; /* key in `targets` */
	u64 sector;
	u32 len, pad;
};
struct {
	__uint(type, 1); /* HASH; key: address of the bio */
	__uint(max_entries, MAX_BIOS);
	__type(key, u64);
	__type(value, struct bio_state);
} bios SEC(".maps");

/*
 * Where the walk over a request stands. In a map and not on the stack: the verifier forgets what a map holds, so all rounds
 * of the loop look alike to it and it does not count them out one by one.
 */
struct cursor {
	u64 bio, vecs, sector, rq, now;
	u32 index, done, in_bio, left, flags, total, target, lost;
	u32 single, pad; /* one bio, whatever follows it in some list */
};
#define NESTING 4 /* an interrupt may issue a request while one is being copied on the same CPU */
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by nesting */
	__uint(max_entries, NESTING);
	__type(key, u32);
	__type(value, struct cursor);
} cursors SEC(".maps");
struct {
	__uint(type, 6); /* PERCPU_ARRAY */
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} depth SEC(".maps");

struct calibration {
	u64 hits, page, direct, offset;
};
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct calibration);
} calibration SEC(".maps");

/* ---- finding the disk ---- */
INLINE struct gendisk *disk_of(struct request *rq)
{
	if (FIELD_EXISTS(struct request___old, rq_disk))
		return READ((struct request___old *)rq, rq_disk);
	struct request_queue *q = READ(rq, q);
	return READ(q, disk);
}

/* The argument of a tracepoint that is the first or the second of its arguments, by kernel. */
INLINE u64 argument(u64 *ctx, u32 second)
{
	u64 arg;
	/* Two loads of the context at constant offsets; merged into one at a computed offset the verifier of 5.10 refuses them. */
	if (second) {
		arg = ctx[1];
		asm volatile("" : "+r"(arg));
	} else {
		arg = ctx[0];
		asm volatile("" : "+r"(arg));
		asm volatile("r0 = 0" ::: "r0");
	}
	return arg;
}

INLINE struct request *request_of(u64 *ctx)
{
	return (struct request *)argument(ctx, rq_arg);
}

/* Key in `targets`; 0, which no disk has, for none. */
INLINE u64 key_of(struct gendisk *disk)
{
	return ((u64)(u32)READ(disk, major) << 32) | (u32)READ(disk, first_minor);
}

INLINE struct target *target_of(struct request *rq)
{
	u64 key = key_of(disk_of(rq));
	return map_lookup(&targets, &key);
}

INLINE u64 key_of_bio(struct bio *bio)
{
	if (FIELD_EXISTS(struct bio___old, bi_disk))
		return key_of(READ((struct bio___old *)bio, bi_disk));
	struct block_device *bdev = READ(bio, bi_bdev);
	return key_of(READ(bdev, bd_disk));
}

/* Whether any of the sectors is protected, and not all of them our own spool. */
INLINE int wanted(struct target *t, u64 start, u64 end)
{
	int hit = 0;
	for (u32 i = 0; i < MAX_RANGES; i++) {
		if (i >= t->ranges_len)
			break;
		if (start < t->ranges[i].end && end > t->ranges[i].start)
			hit = 1;
	}
	if (!hit)
		return 0;
	u32 low = 0, high = t->skips_len;
	for (int i = 0; i <= SKIPS_SHIFT; i++) {
		if (low >= high)
			break;
		/* The mask tells the verifier what the agent made sure of. */
		u32 middle = ((low + high) >> 1) & (MAX_SKIPS - 1);
		if (start >= t->skips[middle].end)
			low = middle + 1;
		else
			high = middle;
	}
	/* The first that ends behind `start`. */
	if (low >= t->skips_len)
		return 1;
	low &= MAX_SKIPS - 1;
	return !(start >= t->skips[low].start && end <= t->skips[low].end);
}

/* ---- losses ---- */
INLINE u32 losses_now(void)
{
	u32 zero = 0;
	u64 *n = map_lookup(&losses, &zero);
	return n ? (u32)*n : 0;
}

/* Counts a loss; always after it was marked, see above. */
INLINE void count_loss(void)
{
	u32 zero = 0;
	u64 *n = map_lookup(&losses, &zero);
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* A lost range as such, of any length. */
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

/*
 * A lost range, by marks; when it is too long for that, as such. One call per program: the verifier walks it each time. `quiet`: marked
 * and not counted, for whoever looks at the marks without being told.
 */
INLINE void lose(struct target *t, u64 sector, u64 bytes, u32 quiet)
{
	u64 at = (sector << 9) >> GRANULE_SHIFT, end = ((sector << 9) + bytes + 65535) >> GRANULE_SHIFT;
	if (end - at > MAX_MARKED) {
		lose_range(t, sector, bytes);
		return;
	}
	for (u32 i = 0; i < MAX_MARKED; i++) {
		if (at >= end || at >= t->granules)
			break;
		u32 chunk = t->first_chunk + (u32)(at >> GRANULES_PER_CHUNK_SHIFT);
		void *cells = map_lookup(&dirty, &chunk);
		if (cells) {
			u32 cell = (u32)(at >> 3) & (CELLS_PER_CHUNK - 1);
			u8 *byte = map_lookup(cells, &cell);
			if (byte)
				byte[at & 7] = 1;
		}
		at++;
	}
	if (!quiet)
		count_loss();
}

/* ---- one record without data ---- */
INLINE int put(struct target *t, struct counters *c, u64 rq, u64 sector, u32 len, u32 total, u32 flags, i32 error)
{
	struct event *e = ring_reserve(&ring, sizeof(*e), 0);
	if (!e) {
		c->drops++;
		c->drop_bytes += len;
		return 0;
	}
	e->mono_ns = ktime_ns();
	e->sector = sector;
	e->rq = rq;
	e->len = len;
	e->total = total;
	e->lost = losses_now();
	e->target = t->id;
	e->flags = flags;
	e->error = error;
	ring_submit(e, NO_WAKEUP);
	return 1;
}

/* ---- data ---- */
/* The end of the chain is no special case: every read of a field of NULL gives zero, and with it nothing left to copy. */
INLINE void enter_bio(struct cursor *c)
{
	struct bio *bio = (struct bio *)c->bio;
	c->vecs = (u64)READ(bio, bi_io_vec);
	c->index = READ(bio, bi_iter.bi_idx);
	c->done = READ(bio, bi_iter.bi_bvec_done);
	c->in_bio = READ(bio, bi_iter.bi_size);
}

/*
 * 1 when a < b. Without a branch: the verifier may hold 8192 branches open, each round of the copy loop adds its own, and there are
 * MAX_STEPS rounds. The barrier keeps clang from making branches of it again. For values below 2^63.
 */
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

struct chunk {
	struct event e;
	u8 data[CHUNK];
};
struct large_chunk {
	struct event e;
	u8 data[LARGE];
};

/* The rest of a step, once the data is in its record. */
INLINE void describe(struct event *e, struct cursor *c, struct counters *n, u64 len, u64 fault)
{
	n->faults += fault;
	n->bytes += len;
	c->left -= len;
	e->mono_ns = c->now;
	e->sector = c->sector;
	e->rq = c->rq;
	e->len = len;
	e->total = c->total;
	e->lost = c->lost;
	e->target = c->target;
	/* E_DATA, or shifted by 6 E_FAULT; E_LAST when nothing is left. */
	e->flags = c->flags | E_DATA << (fault * 6) | E_LAST * less(c->left, 1);
	e->error = 0;
}

/* Copies the next chunk; non-zero when there is none or it did not fit. */
INLINE int step(struct cursor *c, struct counters *n)
{
	struct {
		u64 page;
		u32 len, offset;
	} vec; /* struct bio_vec: the same in every kernel from 2.6 on; the loader checks its size against BTF */

	/* Zeroes when it cannot be read. */
	read_kernel(&vec, sizeof(vec), (void *)(c->vecs + (u64)c->index * sizeof(vec)));
	u64 len = min(vec.len - c->done, c->in_bio);
	u64 from = (vec.page - vmemmap_base) / page_struct_size * 4096 + direct_base + vec.offset + c->done;
	if (len >= LARGE) {
		len = LARGE;
		struct large_chunk *r = ring_reserve(&ring, sizeof(struct large_chunk), 0);
		if (!r)
			return 1;
		u64 fault = (u64)read_kernel(r->data, LARGE, (void *)from) >> 63;
		describe(&r->e, c, n, len, fault);
		ring_submit(r, NO_WAKEUP);
	} else {
		len = min(len, CHUNK);
		/* The verifier does not follow the arithmetic above; the mask and the last test give it the bound. */
		asm volatile("" : "+r"(len));
		len &= 0x1fff;
		if (len > CHUNK)
			len = CHUNK;
		if (len == 0)
			return 1;
		struct chunk *r = ring_reserve(&ring, sizeof(struct chunk), 0);
		if (!r)
			return 1;
		u64 fault = (u64)read_kernel(r->data, len, (void *)from) >> 63;
		describe(&r->e, c, n, len, fault);
		ring_submit(r, NO_WAKEUP);
	}
	c->flags &= ~E_FIRST;
	c->sector += len >> 9;
	c->in_bio -= len;
	c->done += len;
	u64 over = less(vec.len, (u64)c->done + 1);
	c->index += over;
	c->done &= (u32)(over - 1);
	if (c->in_bio == 0) {
		c->bio = c->single ? 0 : (u64)READ((struct bio *)c->bio, bi_next);
		enter_bio(c);
	}
	return 0;
}

/* Copies a write's data, of one bio or of a request's chain of them; answers how many bytes at its end were not. */
INLINE u32 copy(struct target *t, struct counters *n, u64 rq, struct bio *bio, u32 single, u64 sector, u32 total, u32 flags)
{
	u32 zero = 0;
	u32 *d = map_lookup(&depth, &zero);
	if (!d)
		return total;
	u32 level = *d;
	struct cursor *c = map_lookup(&cursors, &level);
	if (!c) {
		/* Nested deeper than there are cursors. */
		n->drops++;
		n->drop_bytes += total;
		return total;
	}
	*d = level + 1;
	c->bio = (u64)bio;
	c->single = single;
	c->left = total;
	c->total = total;
	c->sector = sector;
	c->flags = flags | E_FIRST;
	c->rq = rq;
	c->target = t->id;
	c->lost = losses_now();
	c->now = ktime_ns();
	enter_bio(c);
	int stopped = 0;
	for (int i = 0; i < MAX_STEPS; i++) {
		if (step(c, n)) {
			stopped = 1;
			break;
		}
	}
	u32 left = c->left;
	if (left) {
		/* Ring full (stopped), or longer than we walk. */
		if (stopped) {
			n->drops++;
			n->drop_bytes += left;
		} else {
			n->truncated++;
		}
	}
	*d = level;
	return left;
}

/* A merged discard is several ranges: one record for each. */
INLINE void discards(struct target *t, struct counters *n, struct request *rq, u32 total, u32 flags)
{
	struct bio *bio = READ(rq, bio);
	flags |= E_FIRST;
	for (int i = 0; i < MAX_DISCARDS; i++) {
		if (!bio)
			break;
		u64 sector = READ(bio, bi_iter.bi_sector);
		u32 size = READ(bio, bi_iter.bi_size);
		bio = READ(bio, bi_next);
		if (!put(t, n, (u64)rq, sector, size, total, flags | (bio ? 0 : E_LAST), 0))
			lose_range(t, sector, size);
		flags &= ~E_FIRST;
	}
}

SEC("raw_tp/block_rq_issue")
int hf_issue(u64 *ctx)
{
	struct request *rq = request_of(ctx);
	struct target *t = target_of(rq);
	if (!t)
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	u32 cmd = READ(rq, cmd_flags), op = cmd & 0xff;
	if (op >= OP_DRIVER_FIRST) {
		if (op & 1)
			n->passthrough++;
		return 0;
	}
	if (op == OP_FLUSH) {
		n->requests++;
		/* One that does not fit changes nothing on the disk. */
		put(t, n, (u64)rq, 0, 0, 0, E_FIRST | E_LAST | op << E_OP_SHIFT, 0);
		return 0;
	}
	if (!(op & 1))
		return 0;
	u64 sector = READ(rq, __sector);
	u32 total = READ(rq, __data_len);
	if (op != OP_DISCARD && op != OP_SECURE_ERASE && !wanted(t, sector, sector + ((total + 511) >> 9)))
		return 0;
	u32 flags = op << E_OP_SHIFT;
	if (cmd & (1u << fua_bit))
		flags |= E_FUA;
	if (cmd & (1u << preflush_bit))
		flags |= E_PREFLUSH;
	n->requests++;
	u32 lost = 0; /* bytes at the end of the request */
	u32 quiet = op == OP_WRITE && t->mode == MODE_MARKS;
	if (quiet) {
		lost = total;
	} else if (op == OP_WRITE) {
		lost = copy(t, n, (u64)rq, READ(rq, bio), 0, sector, total, flags);
	} else if (op == OP_WRITE_ZEROES) {
		if (!put(t, n, (u64)rq, sector, total, total, flags | E_FIRST | E_LAST, 0))
			lost = total;
	} else if (op == OP_DISCARD || op == OP_SECURE_ERASE) {
		discards(t, n, rq, total, flags);
	} else {
		/* WRITE SAME of old kernels, zones, something new: the range is read again. */
		n->unknown++;
		lost = total;
	}
	if (lost)
		lose(t, sector + ((total - lost) >> 9), lost, quiet);
	return 0;
}

SEC("raw_tp/block_rq_complete")
int hf_complete(u64 *ctx)
{
	/* request, error (an errno or a blk_status_t, by kernel; 0 is success in both), bytes */
	struct request *rq = (struct request *)ctx[0];
	i32 error = (i32)ctx[1];
	u32 bytes = (u32)ctx[2];
	struct target *t = target_of(rq);
	if (!t)
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	u32 op = READ(rq, cmd_flags) & 0xff;
	if (!bytes || op >= OP_DRIVER_FIRST || op == OP_FLUSH || !(op & 1))
		return 0;
	u64 sector = READ(rq, __sector);
	if (op != OP_DISCARD && op != OP_SECURE_ERASE && !wanted(t, sector, sector + ((bytes + 511) >> 9)))
		return 0;
	u32 flags = E_COMPLETE | op << E_OP_SHIFT, quiet = op == OP_WRITE && t->mode == MODE_MARKS;
	if (quiet)
		flags |= E_MARKED;
	if (!put(t, n, (u64)rq, sector, bytes, READ(rq, __data_len), flags, error) || quiet)
		lose(t, sector, bytes, quiet);
	return 0;
}

/*
 * The same for disks without a request queue: what they are handed is bios. `block_bio_queue` comes before the driver sees the bio, and
 * before it is split; `block_bio_complete` once, for all of it. A bio that depends on another one is queued after that one completed,
 * so the order holds. A bio that a driver above passes on as it is (md raid0) shows only there: `disks` refuses such.
 */
SEC("raw_tp/block_bio_queue")
int hf_bio_queue(u64 *ctx)
{
	struct bio *bio = (struct bio *)argument(ctx, bio_arg);
	u64 disk = key_of_bio(bio);
	struct target *t = map_lookup(&targets, &disk);
	if (!t || !t->by_bio)
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	u32 cmd = READ(bio, bi_opf), op = cmd & 0xff;
	u64 sector = READ(bio, bi_iter.bi_sector), key = (u64)bio;
	u32 total = READ(bio, bi_iter.bi_size);
	if (!(op & 1) || op >= OP_DRIVER_FIRST)
		return 0;
	if (!total) {
		/* A flush, in this world a write of nothing. */
		n->requests++;
		put(t, n, key, 0, 0, 0, E_FIRST | E_LAST | OP_FLUSH << E_OP_SHIFT, 0);
		return 0;
	}
	if (!wanted(t, sector, sector + ((total + 511) >> 9)))
		return 0;
	u32 flags = op << E_OP_SHIFT;
	if (cmd & (1u << fua_bit))
		flags |= E_FUA;
	if (cmd & (1u << preflush_bit))
		flags |= E_PREFLUSH;
	n->requests++;
	struct bio_state state = { .disk = disk, .sector = sector, .len = total };
	/* With no room its completion will not be seen: it is waited for until it is given up and read again. */
	if (map_update(&bios, &key, &state, 0))
		n->drops++;
	u32 lost = 0;
	u32 quiet = op == OP_WRITE && t->mode == MODE_MARKS;
	if (quiet) {
		lost = total;
	} else if (op == OP_WRITE) {
		lost = copy(t, n, key, bio, 1, sector, total, flags);
	} else if (op == OP_WRITE_ZEROES || op == OP_DISCARD || op == OP_SECURE_ERASE) {
		if (!put(t, n, key, sector, total, total, flags | E_FIRST | E_LAST, 0))
			lost = total;
	} else {
		n->unknown++;
		lost = total;
	}
	if (lost)
		lose(t, sector + ((total - lost) >> 9), lost, quiet);
	return 0;
}

SEC("raw_tp/block_bio_complete")
int hf_bio_complete(u64 *ctx)
{
	struct bio *bio = (struct bio *)argument(ctx, bio_done_arg);
	u64 key = (u64)bio;
	/* By its address and not by its disk: a multipath head has sent it to another one meanwhile. */
	struct bio_state *kept = map_lookup(&bios, &key);
	struct bio_state state = { 0 };
	u32 op = READ(bio, bi_opf) & 0xff;
	if (kept)
		state = *kept;
	else
		state.disk = key_of_bio(bio);
	struct target *t = map_lookup(&targets, &state.disk);
	if (!t || !t->by_bio || !(op & 1) || op >= OP_DRIVER_FIRST)
		return 0;
	u32 place = t->id & (MAX_TARGETS - 1);
	struct counters *n = map_lookup(&counters, &place);
	if (!n)
		return 0;
	if (kept) {
		map_delete(&bios, &key);
	} else {
		/* Queued before capture began, or a flush, which has no length and needs no completion. */
		state.sector = READ(bio, bi_iter.bi_sector);
		state.len = READ(bio, bi_iter.bi_size);
		if (!state.len || !wanted(t, state.sector, state.sector + ((state.len + 511) >> 9)))
			return 0;
	}
	u32 flags = E_COMPLETE | op << E_OP_SHIFT, quiet = op == OP_WRITE && t->mode == MODE_MARKS;
	if (quiet)
		flags |= E_MARKED;
	if (!put(t, n, key, state.sector, state.len, state.len, flags, (i32)READ(bio, bi_status)) || quiet)
		lose(t, state.sector, state.len, quiet);
	return 0;
}

/*
 * Calibration. The agent reads one block of a disk into a page that holds a magic word and whose frame number it knows. Here
 * the request shows that page's `struct page`, and with it where the array of them begins; and the one-to-one map of all
 * memory begins at the multiple of 1 GiB below the request's own address where the magic word is found.
 */
INLINE int calibrate(u64 near, struct bio *bio)
{
	u32 zero = 0;
	struct calibration *c = map_lookup(&calibration, &zero);
	if (!bio || !c || c->hits)
		return 0;
	struct {
		u64 page;
		u32 len, offset;
	} vec;
	if (read_kernel(&vec, sizeof(vec), (void *)READ(bio, bi_io_vec)))
		return 0;
	if (vec.len != 4096 || vec.offset != 0)
		return 0;
	u64 base = (near & ~((1ull << 30) - 1)) - (calib_skip_gib << 30);
	for (int i = 0; i < 2048; i++) {
		u64 word = 0;
		if (!read_kernel(&word, 8, (void *)(base + (calib_pfn << 12))) && word == calib_magic) {
			c->page = vec.page;
			c->direct = base;
			c->offset = vec.offset;
			c->hits = 1;
			return 0;
		}
		base -= 1ull << 30;
	}
	return 0;
}

SEC("raw_tp/block_rq_issue")
int hf_calibrate(u64 *ctx)
{
	struct request *rq = request_of(ctx);
	if (!target_of(rq))
		return 0;
	if ((READ(rq, cmd_flags) & 0xff) != 0 || READ(rq, __sector) != calib_sector || READ(rq, __data_len) != 4096)
		return 0;
	return calibrate((u64)rq, READ(rq, bio));
}

SEC("raw_tp/block_bio_queue")
int hf_bio_calibrate(u64 *ctx)
{
	struct bio *bio = (struct bio *)argument(ctx, bio_arg);
	u64 disk = key_of_bio(bio);
	if (!map_lookup(&targets, &disk))
		return 0;
	if ((READ(bio, bi_opf) & 0xff) != 0 || READ(bio, bi_iter.bi_sector) != calib_sector || READ(bio, bi_iter.bi_size) != 4096)
		return 0;
	/* The bio may lie on the reader's stack, which is not part of the one-to-one map; its disk does. */
	struct block_device *bdev = READ(bio, bi_bdev);
	return calibrate((u64)bdev, bio);
}

/* Self-test: the same, the other way round. The page of the request must read as the magic word by the formula of `step`. */
INLINE int self_test(struct bio *bio)
{
	u32 zero = 0;
	struct calibration *c = map_lookup(&calibration, &zero);
	if (!bio || !c)
		return 0;
	struct {
		u64 page;
		u32 len, offset;
	} vec;
	if (read_kernel(&vec, sizeof(vec), (void *)READ(bio, bi_io_vec)))
		return 0;
	u64 word = 0;
	u64 from = (vec.page - vmemmap_base) / page_struct_size * 4096 + direct_base + vec.offset;
	if (!read_kernel(&word, 8, (void *)from) && (word & ~0xffffull) == calib_magic) {
		/* The low bits number the page: each of the agent's test pages must be seen. */
		u32 bit = (u32)word & 63;
		c->page |= 1ull << bit;
		c->hits++;
	}
	return 0;
}

SEC("raw_tp/block_rq_issue")
int hf_selftest(u64 *ctx)
{
	struct request *rq = request_of(ctx);
	if (!target_of(rq))
		return 0;
	return self_test(READ(rq, bio));
}

SEC("raw_tp/block_bio_queue")
int hf_bio_selftest(u64 *ctx)
{
	struct bio *bio = (struct bio *)argument(ctx, bio_arg);
	u64 disk = key_of_bio(bio);
	if (!map_lookup(&targets, &disk))
		return 0;
	return self_test(bio);
}
