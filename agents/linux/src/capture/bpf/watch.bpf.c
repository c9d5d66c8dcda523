/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Where a volume was written: the kernel half of `watch.rs`.
 *
 * `hf_watch_queue` sees each bio that is handed to a watched device before the device's driver does, and marks its place: one byte per
 * 64 KiB, set to the number of the current epoch. `hf_watch_complete` counts it as over. Counts are kept by epoch, so that the agent can
 * tell when every write that marked in an epoch has completed. No data is copied, nothing is sent, nothing is waited for.
 *
 * Order: counted as queued first, marked after. So whoever sees a mark and then reads the counts finds its write counted. Plain stores: on
 * a processor that reorders those (not x86_64) this would need a barrier.
 *
 * Written for `-mcpu=v2` as `capture.bpf.c` is, with its own few declarations. `watch.rs` describes the same bytes; change both.
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
static long (*const map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const map_delete)(void *map, const void *key) = (void *)3;
static long (*const read_kernel)(void *to, u32 len, const void *from) = (void *)113;

/* ---- the kernel's types, as far as they are read ---- */
#define CORE __attribute__((preserve_access_index))
struct gendisk {
	i32 major, first_minor;
} CORE;
struct block_device {
	struct gendisk *bd_disk;
} CORE;
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
} CORE;
struct bio {
	struct bvec_iter bi_iter;
	u32 bi_opf;
	struct block_device *bi_bdev; /* since 5.12; before, the bio itself points at the disk */
} CORE;
struct bio___old {
	struct gendisk *bi_disk;
} CORE;

#define READ(ptr, field)                                                                                              \
	({                                                                                                            \
		typeof(ptr) __p = (ptr);                                                                              \
		typeof(__p->field) __v = 0;                                                                           \
		read_kernel(&__v, sizeof(__v), __builtin_preserve_access_index(&__p->field));                         \
		__v;                                                                                                  \
	})
#define FIELD_EXISTS(type, field) __builtin_preserve_field_info(((type *)0)->field, 2)

/* Which arguments of the two tracepoints are the bio; set by the loader. */
const volatile u32 bio_arg = 0;
const volatile u32 bio_done_arg = 1;

/* ---- maps ---- */
#define MAX_WATCHED 64
#define EPOCHS 4 /* whose counts are kept apart: an epoch's number modulo this */
struct watched {
	u32 slot;	/* place in `counts` */
	u32 epoch;	/* what is marked with: 4 to 255 */
	u32 first_chunk;	/* of `dirty` */
	u32 pad;
	u64 granules;
	u64 kept[4];	/* the agent's own notes */
};
struct {
	__uint(type, 1); /* HASH; key: major << 32 | first minor */
	__uint(max_entries, MAX_WATCHED);
	__type(key, u64);
	__type(value, struct watched);
} watched SEC(".maps");

#define GRANULE_SHIFT 16
#define CELLS_PER_CHUNK 65536		/* of 8 granules */
#define GRANULES_PER_CHUNK_SHIFT 19
#define CELLS_PER_CHUNK_SHIFT 16
#define MAX_MARKED 66			/* granules marked one by one: 4 MiB and two edges */
#define MAX_CELLS 512			/* longer ranges are marked by eights, up to 256 MiB; past that the whole device counts as written */
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

struct counts {
	u64 queued[EPOCHS], done[EPOCHS], whole;
};
struct {
	__uint(type, 6); /* PERCPU_ARRAY, by `slot` */
	__uint(max_entries, MAX_WATCHED);
	__type(key, u32);
	__type(value, struct counts);
} counts SEC(".maps");

/* Written by the agent only. */
struct {
	__uint(type, 2); /* ARRAY */
	__uint(max_entries, 4);
	__type(key, u32);
	__type(value, u64);
} meta SEC(".maps");

/* Under way. One that finds no room is never counted as done: the agent then waits for a moment with nothing under way at all. */
struct under_way {
	u32 slot, epoch;
};
struct {
	__uint(type, 1); /* HASH; key: address of the bio */
	__uint(max_entries, 32768);
	__type(key, u64);
	__type(value, struct under_way);
} bios SEC(".maps");

/* Two loads of the context at constant offsets; merged into one at a computed offset the verifier of 5.10 refuses them. */
INLINE u64 argument(u64 *ctx, u32 second)
{
	u64 arg;
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

INLINE u64 key_of(struct gendisk *disk)
{
	return ((u64)(u32)READ(disk, major) << 32) | (u32)READ(disk, first_minor);
}

INLINE u64 key_of_bio(struct bio *bio)
{
	if (FIELD_EXISTS(struct bio___old, bi_disk))
		return key_of(READ((struct bio___old *)bio, bi_disk));
	struct block_device *bdev = READ(bio, bi_bdev);
	return key_of(READ(bdev, bd_disk));
}

INLINE u64 *cell_of(struct watched *w, u64 cell)
{
	u32 chunk = w->first_chunk + (u32)(cell >> CELLS_PER_CHUNK_SHIFT);
	void *cells = map_lookup(&dirty, &chunk);
	if (!cells)
		return 0;
	u32 at = (u32)cell & (CELLS_PER_CHUNK - 1);
	return map_lookup(cells, &at);
}

INLINE void mark(struct watched *w, struct counts *n, u32 epoch, u64 sector, u64 bytes)
{
	u64 at = (sector << 9) >> GRANULE_SHIFT, end = ((sector << 9) + bytes + 65535) >> GRANULE_SHIFT;
	if (end - at <= MAX_MARKED) {
		for (u32 i = 0; i < MAX_MARKED; i++) {
			if (at >= end || at >= w->granules)
				break;
			u8 *bytes_of_cell = (u8 *)cell_of(w, at >> 3);
			if (bytes_of_cell)
				bytes_of_cell[at & 7] = (u8)epoch;
			at++;
		}
		return;
	}
	u64 cell = at >> 3, last = (end + 7) >> 3;
	if (last - cell > MAX_CELLS) {
		__sync_fetch_and_add(&n->whole, 1);
		return;
	}
	u64 all = (u64)(epoch & 0xff) * 0x0101010101010101ull;
	for (u32 i = 0; i < MAX_CELLS; i++) {
		if (cell >= last || cell << 3 >= w->granules)
			break;
		u64 *place = cell_of(w, cell);
		if (place)
			*place = all;
		cell++;
	}
}

SEC("raw_tp/block_bio_queue")
int hf_watch_queue(u64 *ctx)
{
	struct bio *bio = (struct bio *)argument(ctx, bio_arg);
	u64 disk = key_of_bio(bio);
	struct watched *w = map_lookup(&watched, &disk);
	if (!w)
		return 0;
	/* Odd operations carry something to the device: writes, zeroes, discards, and what is not known yet. */
	u32 op = READ(bio, bi_opf) & 0xff, bytes = READ(bio, bi_iter.bi_size);
	if (!(op & 1) || !bytes)
		return 0;
	u32 slot = w->slot, epoch = w->epoch;
	struct counts *n = map_lookup(&counts, &slot);
	if (!n)
		return 0;
	__sync_fetch_and_add(&n->queued[epoch & (EPOCHS - 1)], 1);
	u64 key = (u64)bio;
	struct under_way state = { .slot = slot, .epoch = epoch };
	map_update(&bios, &key, &state, 0);
	mark(w, n, epoch, READ(bio, bi_iter.bi_sector), bytes);
	return 0;
}

SEC("raw_tp/block_bio_complete")
int hf_watch_complete(u64 *ctx)
{
	u64 key = argument(ctx, bio_done_arg);
	struct under_way *state = map_lookup(&bios, &key);
	if (!state)
		return 0;
	u32 slot = state->slot, epoch = state->epoch;
	map_delete(&bios, &key);
	struct counts *n = map_lookup(&counts, &slot);
	if (n)
		__sync_fetch_and_add(&n->done[epoch & (EPOCHS - 1)], 1);
	return 0;
}
