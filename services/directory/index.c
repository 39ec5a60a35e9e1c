/* Which of up to 64 workers hold which blocks.
 *
 * A block is a record of 32 bytes: its hash, and one bit per worker for each tier.  Records lie in chunks and keep their
 * numbers; a chunk also has one bit per worker and record, by which a worker's blocks are found without a look at the
 * others'.  Hashes lead to records through open-addressed slots of 8 bytes, the record's number and 32 bits of the mixed
 * hash, so that a block which nobody holds costs one line of memory.  The slots are split into many small tables that
 * grow one by one: no call waits for a large one to be copied.
 *
 * Not thread-safe; nothing blocks.  Out of memory, kvd_store leaves blocks out; nothing else allocates.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))

#define NUM_WORKERS 64
#define HASH_NBYTES 16
#define CHUNK_BITS 16
#define CHUNK_RECORDS (1u << CHUNK_BITS)
#define CHUNK_WORDS (CHUNK_RECORDS / 64)
#define NOTHING UINT32_MAX
#define MIN_SLOTS 8
#define MAX_WINDOW 32

enum { DEVICE, HOST, NUM_TIERS };

typedef struct {
    uint64_t hash[2]; /* of a free record: [0] is the number of the next free one in its chunk, or NOTHING */
    uint64_t holders[NUM_TIERS]; /* none: the record is free */
} kvd_record;

typedef struct {
    kvd_record records[CHUNK_RECORDS];
    uint64_t held[NUM_WORKERS][CHUNK_WORDS]; /* in any tier */
    uint32_t num_used, num_touched; /* records from num_touched on have never been used */
    uint32_t free;
} kvd_chunk;

/* A slot is 0, or 32 bits of the mixed hash above the record's number + 1. */
typedef struct {
    uint64_t *slots;
    uint32_t num_slots, num_used; /* a power of two, or 0 */
} kvd_table;

typedef struct {
    uint64_t seed;
    kvd_table *tables;
    uint32_t table_bits;
    kvd_chunk **chunks; /* NULL where one was given back */
    uint32_t num_chunks, open; /* no chunk before `open` has room */
    uint64_t num_held[NUM_WORKERS];
    uint32_t swept[NUM_WORKERS]; /* by kvd_drop: no chunk before holds anything of this worker */
    uint64_t num_blocks, num_slots, chunks_mapped;
} kvd_index;

typedef struct {
    uint32_t worker, num_blocks, num_on_device;
} kvd_prefix;

static kvd_record *record_at(const kvd_index *index, uint32_t number)
{
    return &index->chunks[number >> CHUNK_BITS]->records[number % CHUNK_RECORDS];
}

static uint64_t mix(const kvd_index *index, const uint64_t hash[2])
{
    __uint128_t product = (__uint128_t)(hash[0] ^ index->seed) * (hash[1] ^ 0x9E3779B97F4A7C15ull);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* The upper half of the mixed hash picks the table, the lower half the slot, and tells slots apart. */
static kvd_table *table_of(const kvd_index *index, uint64_t mixed)
{
    return &index->tables[(mixed >> 32) & ((1u << index->table_bits) - 1)];
}

static uint64_t *home_of(const kvd_table *table, uint64_t mixed)
{
    return &table->slots[(uint32_t)mixed & (table->num_slots - 1)];
}

static uint32_t number_in(uint64_t slot) { return (uint32_t)slot - 1; }

static bool same(const uint64_t a[2], const uint64_t b[2]) { return a[0] == b[0] && a[1] == b[1]; }

static uint64_t holders_of(const kvd_record *record) { return record->holders[DEVICE] | record->holders[HOST]; }

/* The slot of this very hash, or NULL. */
static uint64_t *find(const kvd_index *index, const kvd_table *table, const uint64_t hash[2], uint64_t mixed)
{
    if (!table->num_slots) return NULL;
    uint32_t mask = table->num_slots - 1;
    for (uint32_t i = (uint32_t)mixed & mask; table->slots[i]; i = (i + 1) & mask)
        if (table->slots[i] >> 32 == (uint32_t)mixed && same(record_at(index, number_in(table->slots[i]))->hash, hash))
            return &table->slots[i];
    return NULL;
}

static void place(uint64_t *slots, uint32_t mask, uint64_t slot)
{
    uint32_t i = (uint32_t)(slot >> 32) & mask;
    while (slots[i]) i = (i + 1) & mask;
    slots[i] = slot;
}

static bool resize(kvd_index *index, kvd_table *table, uint32_t num_slots)
{
    uint64_t *slots = num_slots ? calloc(num_slots, sizeof *slots) : NULL;
    if (num_slots && !slots) return false;
    for (uint32_t i = 0; i < table->num_slots; i++)
        if (table->slots[i]) place(slots, num_slots - 1, table->slots[i]);
    free(table->slots);
    index->num_slots += (uint64_t)num_slots - table->num_slots;
    table->slots = slots;
    table->num_slots = num_slots;
    return true;
}

/* Half to three quarters full, at another point in each table: all grow by and by and not at the same time. */
static bool make_room(kvd_index *index, kvd_table *table)
{
    uint32_t number = (uint32_t)(table - index->tables);
    uint64_t limit = (uint64_t)table->num_slots * (512 + number % 256) / 1024;
    if (table->num_used < limit) return true;
    if (table->num_slots > UINT32_MAX / 2) return false;
    return resize(index, table, table->num_slots ? 2 * table->num_slots : MIN_SLOTS);
}

/* Closes the gap, so that no search ends too early. */
static void erase(kvd_index *index, kvd_table *table, uint64_t *slot)
{
    uint32_t mask = table->num_slots - 1, gap = (uint32_t)(slot - table->slots);
    for (uint32_t i = (gap + 1) & mask; table->slots[i]; i = (i + 1) & mask) {
        uint32_t home = (uint32_t)(table->slots[i] >> 32) & mask;
        if (((i - home) & mask) >= ((i - gap) & mask)) {
            table->slots[gap] = table->slots[i];
            gap = i;
        }
    }
    table->slots[gap] = 0;
    table->num_used--;
    if (!table->num_used)
        resize(index, table, 0);
    else if (table->num_used < table->num_slots / 8 && table->num_slots > MIN_SLOTS)
        resize(index, table, table->num_slots / 2);
}

static bool map_chunk(kvd_index *index, uint32_t at)
{
    if (at == NOTHING >> CHUNK_BITS) return false;
    if (at == index->num_chunks) {
        kvd_chunk **chunks = realloc(index->chunks, (at + 1) * sizeof *chunks);
        if (!chunks) return false;
        index->chunks = chunks;
        index->chunks[at] = NULL;
        index->num_chunks++;
    }
    kvd_chunk *chunk = mmap(NULL, sizeof *chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (chunk == MAP_FAILED) return false;
    chunk->free = NOTHING;
    index->chunks[at] = chunk;
    index->chunks_mapped++;
    return true;
}

/* The lowest chunk with room gives the record, so that the last ones run empty.  NOTHING without memory. */
static uint32_t take_record(kvd_index *index)
{
    while (index->open < index->num_chunks && index->chunks[index->open] &&
           index->chunks[index->open]->num_used == CHUNK_RECORDS)
        index->open++;
    if ((index->open == index->num_chunks || !index->chunks[index->open]) && !map_chunk(index, index->open))
        return NOTHING;
    kvd_chunk *chunk = index->chunks[index->open];
    uint32_t at = chunk->free;
    if (at == NOTHING)
        at = chunk->num_touched++;
    else
        chunk->free = (uint32_t)chunk->records[at].hash[0];
    chunk->num_used++;
    return index->open << CHUNK_BITS | at;
}

static void give_record(kvd_index *index, uint32_t number)
{
    uint32_t at = number >> CHUNK_BITS;
    kvd_chunk *chunk = index->chunks[at];
    if (!--chunk->num_used) {
        munmap(chunk, sizeof *chunk);
        index->chunks[at] = NULL;
        index->chunks_mapped--;
    } else {
        chunk->records[number % CHUNK_RECORDS].hash[0] = chunk->free;
        chunk->free = number % CHUNK_RECORDS;
    }
    if (at < index->open) index->open = at;
}

static uint64_t *held_word(const kvd_index *index, int worker, uint32_t number)
{
    return &index->chunks[number >> CHUNK_BITS]->held[worker][number % CHUNK_RECORDS / 64];
}

/* A hash that has no slot yet gets one, and a record without holders.  NOTHING without memory. */
static uint32_t add_block(kvd_index *index, kvd_table *table, const uint64_t hash[2], uint64_t mixed)
{
    if (!make_room(index, table)) return NOTHING;
    uint32_t number = take_record(index);
    if (number == NOTHING) return NOTHING;
    kvd_record *record = record_at(index, number);
    memcpy(record->hash, hash, HASH_NBYTES);
    record->holders[DEVICE] = record->holders[HOST] = 0;
    place(table->slots, table->num_slots - 1, (uint64_t)(uint32_t)mixed << 32 | (number + 1));
    table->num_used++;
    index->num_blocks++;
    return number;
}

/* This worker, which held the block, holds it in no tier any more. */
static void forget(kvd_index *index, int worker, kvd_table *table, uint64_t *slot)
{
    uint32_t number = number_in(*slot);
    *held_word(index, worker, number) &= ~(1ull << number % 64);
    index->num_held[worker]--;
    if (holders_of(record_at(index, number))) return;
    erase(index, table, slot);
    give_record(index, number);
    index->num_blocks--;
}

EXPORT kvd_index *kvd_open(uint64_t seed, uint32_t table_bits)
{
    kvd_index *index = calloc(1, sizeof *index);
    if (!index) return NULL;
    index->seed = seed;
    index->table_bits = table_bits;
    index->tables = calloc((size_t)1 << table_bits, sizeof *index->tables);
    if (index->tables) return index;
    free(index);
    return NULL;
}

EXPORT void kvd_close(kvd_index *index)
{
    for (size_t i = 0; i < (size_t)1 << index->table_bits; i++) free(index->tables[i].slots);
    for (uint32_t i = 0; i < index->num_chunks; i++)
        if (index->chunks[i]) munmap(index->chunks[i], sizeof *index->chunks[i]);
    free(index->chunks);
    free(index->tables);
    free(index);
}

/* Takes `count` hashes, back to back, out of what Python gave, and asks for the slots that they lead to. */
static void fetch(const kvd_index *index, const char *hashes, size_t count, uint64_t (*into)[2], uint64_t *mixed)
{
    memcpy(into, hashes, count * HASH_NBYTES);
    for (size_t i = 0; i < count; i++) {
        mixed[i] = mix(index, into[i]);
        const kvd_table *table = table_of(index, mixed[i]);
        if (table->num_slots) __builtin_prefetch(home_of(table, mixed[i]));
    }
}

/* Asks for the record that the first slot with these bits names: in nearly all cases the one looked for. */
static void fetch_record(const kvd_index *index, uint64_t mixed)
{
    const kvd_table *table = table_of(index, mixed);
    if (!table->num_slots) return;
    uint32_t mask = table->num_slots - 1;
    for (uint32_t i = (uint32_t)mixed & mask; table->slots[i]; i = (i + 1) & mask)
        if (table->slots[i] >> 32 == (uint32_t)mixed) {
            __builtin_prefetch(record_at(index, number_in(table->slots[i])));
            return;
        }
}

/* This worker holds these blocks in this tier, whether or not it did before.  At most `room` blocks that it held in no
 * tier are added; returns how many were left out. */
EXPORT size_t kvd_store(kvd_index *index, int worker, int tier, const char *hashes, size_t count, size_t room)
{
    uint64_t hash[MAX_WINDOW][2], mixed[MAX_WINDOW], bit = 1ull << worker;
    size_t num_left_out = 0;
    for (size_t from = 0; from < count; from += MAX_WINDOW) {
        size_t n = count - from < MAX_WINDOW ? count - from : MAX_WINDOW;
        fetch(index, hashes + from * HASH_NBYTES, n, hash, mixed);
        for (size_t i = 0; i < n; i++) fetch_record(index, mixed[i]);
        for (size_t i = 0; i < n; i++) {
            kvd_table *table = table_of(index, mixed[i]);
            uint64_t *slot = find(index, table, hash[i], mixed[i]);
            if (slot && holders_of(record_at(index, number_in(*slot))) & bit) {
                record_at(index, number_in(*slot))->holders[tier] |= bit;
                continue;
            }
            uint32_t number = NOTHING;
            if (room) number = slot ? number_in(*slot) : add_block(index, table, hash[i], mixed[i]);
            if (number == NOTHING) {
                num_left_out++;
                continue;
            }
            record_at(index, number)->holders[tier] |= bit;
            *held_word(index, worker, number) |= 1ull << number % 64;
            index->num_held[worker]++;
            room--;
        }
    }
    return num_left_out;
}

/* This worker does not hold these blocks in this tier, whether or not it did before. */
EXPORT void kvd_remove(kvd_index *index, int worker, int tier, const char *hashes, size_t count)
{
    uint64_t hash[MAX_WINDOW][2], mixed[MAX_WINDOW], bit = 1ull << worker;
    for (size_t from = 0; from < count; from += MAX_WINDOW) {
        size_t n = count - from < MAX_WINDOW ? count - from : MAX_WINDOW;
        fetch(index, hashes + from * HASH_NBYTES, n, hash, mixed);
        for (size_t i = 0; i < n; i++) fetch_record(index, mixed[i]);
        for (size_t i = 0; i < n; i++) {
            kvd_table *table = table_of(index, mixed[i]);
            uint64_t *slot = find(index, table, hash[i], mixed[i]);
            if (!slot) continue;
            kvd_record *record = record_at(index, number_in(*slot));
            if (!(record->holders[tier] & bit)) continue;
            record->holders[tier] &= ~bit;
            if (!(holders_of(record) & bit)) forget(index, worker, table, slot);
        }
    }
}

static void drop_one(kvd_index *index, int worker, uint32_t number)
{
    kvd_record *record = record_at(index, number);
    record->holders[DEVICE] &= ~(1ull << worker);
    record->holders[HOST] &= ~(1ull << worker);
    uint64_t mixed = mix(index, record->hash);
    kvd_table *table = table_of(index, mixed);
    forget(index, worker, table, find(index, table, record->hash, mixed));
}

/* Drops about `max` blocks of this worker, or all that it holds, and returns how many.  Until it holds none, nothing may
 * be stored for it. */
EXPORT size_t kvd_drop(kvd_index *index, int worker, size_t max)
{
    size_t num_dropped = 0;
    uint32_t at = index->swept[worker];
    for (; index->num_held[worker] && num_dropped < max; at++)
        for (uint32_t word = 0; word < CHUNK_WORDS && num_dropped < max; word++) {
            kvd_chunk *chunk = index->chunks[at];
            if (!chunk) break; /* or given back with the last of its blocks */
            uint64_t held = chunk->held[worker][word];
            for (uint64_t rest = held; rest; rest &= rest - 1) {
                uint64_t mixed = mix(index, chunk->records[word * 64 + __builtin_ctzll(rest)].hash);
                __builtin_prefetch(home_of(table_of(index, mixed), mixed));
            }
            for (uint64_t rest = held; rest; rest &= rest - 1, num_dropped++)
                drop_one(index, worker, at << CHUNK_BITS | (word * 64 + (uint32_t)__builtin_ctzll(rest)));
        }
    index->swept[worker] = !index->num_held[worker] || !at ? 0 : at - 1; /* the last chunk may hold more */
    return num_dropped;
}

/* Writes hashes that this worker holds in this tier, `max` at most, from record *cursor on, and moves it.  Returns how
 * many; fewer than `max` when there are no more. */
EXPORT size_t kvd_list(const kvd_index *index, int worker, int tier, uint32_t *cursor, char *hashes, size_t max)
{
    size_t count = 0;
    for (uint32_t at = *cursor >> CHUNK_BITS; at < index->num_chunks; at++) {
        const kvd_chunk *chunk = index->chunks[at];
        if (!chunk) continue;
        uint32_t first = at == *cursor >> CHUNK_BITS ? *cursor % CHUNK_RECORDS : 0;
        for (uint32_t word = first / 64; word < CHUNK_WORDS; word++) {
            uint64_t rest = chunk->held[worker][word];
            if (word == first / 64) rest &= ~0ull << first % 64;
            for (; rest; rest &= rest - 1) {
                uint32_t i = word * 64 + (uint32_t)__builtin_ctzll(rest);
                if (!(chunk->records[i].holders[tier] >> worker & 1)) continue;
                if (count == max) {
                    *cursor = at << CHUNK_BITS | i;
                    return count;
                }
                memcpy(hashes + count++ * HASH_NBYTES, chunk->records[i].hash, HASH_NBYTES);
            }
        }
    }
    *cursor = index->num_chunks << CHUNK_BITS;
    return count;
}

/* For each of `workers` that holds the chain's first block: how many leading blocks it holds, and how many of these on its
 * device.  Returns how many such workers there are.
 *
 * Looks up few blocks at first and then ever more at a time, whose lines of memory come at once. */
EXPORT size_t kvd_match(const kvd_index *index, uint64_t workers, const char *hashes, size_t count, kvd_prefix *prefixes)
{
    uint64_t hash[MAX_WINDOW][2], mixed[MAX_WINDOW], holding = workers, any = 0;
    uint32_t num_held[NUM_WORKERS], num_elsewhere[NUM_WORKERS] = {0};
    size_t window = 1, num_prefixes = 0;
    for (size_t from = 0; from < count && holding; from += window, window = window < MAX_WINDOW ? 2 * window : window) {
        size_t n = count - from < window ? count - from : window;
        fetch(index, hashes + from * HASH_NBYTES, n, hash, mixed);
        for (size_t i = 0; i < n; i++) fetch_record(index, mixed[i]);
        for (size_t i = 0; i < n && holding; i++) {
            uint64_t *slot = find(index, table_of(index, mixed[i]), hash[i], mixed[i]);
            const kvd_record *record = slot ? record_at(index, number_in(*slot)) : NULL;
            uint64_t holders = record ? holders_of(record) & holding : 0;
            if (!from && !i) any = holders;
            for (uint64_t lost = holding & ~holders; lost; lost &= lost - 1)
                num_held[__builtin_ctzll(lost)] = (uint32_t)(from + i);
            holding = holders;
            for (uint64_t rest = record ? holding & ~record->holders[DEVICE] : 0; rest; rest &= rest - 1)
                num_elsewhere[__builtin_ctzll(rest)]++;
        }
    }
    for (uint64_t rest = holding & any; rest; rest &= rest - 1) num_held[__builtin_ctzll(rest)] = (uint32_t)count;
    for (; any; any &= any - 1) {
        uint32_t worker = (uint32_t)__builtin_ctzll(any);
        prefixes[num_prefixes++] = (kvd_prefix){worker, num_held[worker], num_held[worker] - num_elsewhere[worker]};
    }
    return num_prefixes;
}

EXPORT uint64_t kvd_num_held(const kvd_index *index, int worker) { return index->num_held[worker]; }

EXPORT uint64_t kvd_num_blocks(const kvd_index *index) { return index->num_blocks; }

/* Address space; what was never written of it takes no memory. */
EXPORT uint64_t kvd_nbytes(const kvd_index *index)
{
    return sizeof *index + (sizeof *index->tables << index->table_bits) + index->num_slots * sizeof(uint64_t) +
           index->num_chunks * sizeof *index->chunks + index->chunks_mapped * sizeof(kvd_chunk);
}

/* What does not add up, or NULL. */
EXPORT const char *kvd_fault(const kvd_index *index)
{
    uint64_t num_used = 0, num_slots = 0, held[NUM_WORKERS] = {0};
    for (uint32_t t = 0; t < 1u << index->table_bits; t++) {
        const kvd_table *table = &index->tables[t];
        uint32_t in_table = 0;
        for (uint32_t i = 0; i < table->num_slots; i++) {
            if (!table->slots[i]) continue;
            in_table++;
            uint32_t number = number_in(table->slots[i]);
            if (number >> CHUNK_BITS >= index->num_chunks || !index->chunks[number >> CHUNK_BITS])
                return "a slot leads to no record";
            const kvd_record *record = record_at(index, number);
            uint64_t mixed = mix(index, record->hash), holders = holders_of(record);
            if (!holders) return "a block without holders was kept";
            if (find(index, table_of(index, mixed), record->hash, mixed) != &table->slots[i])
                return "a block is not found, or found twice";
            for (int w = 0; w < NUM_WORKERS; w++) {
                if ((*held_word(index, w, number) >> number % 64 & 1) != (holders >> w & 1))
                    return "a block and a worker differ on whether it is held";
                held[w] += holders >> w & 1;
            }
        }
        if (in_table != table->num_used) return "a table's count is wrong";
        num_used += in_table;
        num_slots += table->num_slots;
    }
    if (num_used != index->num_blocks) return "the number of blocks is wrong";
    if (num_slots != index->num_slots) return "the number of slots is wrong";
    uint64_t in_chunks = 0, mapped = 0;
    for (uint32_t at = 0; at < index->num_chunks; at++) {
        const kvd_chunk *chunk = index->chunks[at];
        if (!chunk) {
            if (at < index->open) return "a chunk that was given back is never taken again";
            continue;
        }
        mapped++;
        in_chunks += chunk->num_used;
        if (!chunk->num_used) return "an empty chunk was kept";
        if (at < index->open && chunk->num_used < CHUNK_RECORDS) return "a chunk's room is never taken";
        uint32_t num_free = 0;
        for (uint32_t i = chunk->free; i != NOTHING && num_free <= CHUNK_RECORDS; i = (uint32_t)chunk->records[i].hash[0])
            num_free++;
        if (chunk->num_used + num_free != chunk->num_touched) return "a record was lost";
        for (int w = 0; w < NUM_WORKERS; w++)
            for (uint32_t word = 0; word < CHUNK_WORDS; word++) held[w] -= (uint64_t)__builtin_popcountll(chunk->held[w][word]);
    }
    if (in_chunks != num_used) return "records and blocks differ in number";
    if (mapped != index->chunks_mapped) return "the number of chunks is wrong";
    for (int w = 0; w < NUM_WORKERS; w++)
        if (held[w]) return "a worker holds a block that there is not";
    return NULL;
}
