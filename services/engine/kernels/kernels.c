/* What Python calls: the choice of an instruction set, and the memory and the plan of a step. */
#include "step.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    kvf_work *step;
    kvf_pool *pool;
    void *memory; /* what steps work in; grows with the largest step */
    size_t nbytes;
} kvf_engine;

static const struct {
    const char *name;
    kvf_work *step;
} variants[] = {
#if defined(__x86_64__)
    {"avx512bf16", kvf_step_avx512bf16},
    {"avx512", kvf_step_avx512},
    {"avx2", kvf_step_avx2},
#endif
    {"portable", kvf_step_portable},
};

#define MAX_STEPS 255
#define NUM_VARIANTS ((int)(sizeof variants / sizeof *variants))

static int supports(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512bf16"))
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    return !strcmp(name, "portable");
}

/* The name of the number-th instruction set that this processor has, the fastest first; NULL behind the last. */
const char *kvf_instruction_set(int number)
{
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (supports(variants[i].name) && !number--) return variants[i].name;
    return NULL;
}

/* instruction_set: one that this processor has.  NULL when memory or threads cannot be had. */
kvf_engine *kvf_open(const char *instruction_set, int num_threads)
{
    kvf_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (!strcmp(variants[i].name, instruction_set)) engine->step = variants[i].step;
    engine->pool = kvf_pool_open(num_threads);
    if (engine->pool) return engine;
    free(engine);
    return NULL;
}

/* Not while a step runs. */
void kvf_close(kvf_engine *engine)
{
    kvf_pool_close(engine->pool);
    free(engine->memory);
    free(engine);
}

static long padded(long n, long to) { return (n + to - 1) / to * to; }
static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }

/* Gives a part its place; without memory it only counts. */
static void *take(char *memory, size_t *at, size_t nbytes)
{
    void *place = memory ? memory + *at : NULL;
    *at += padded(nbytes, 64);
    return place;
}

/* Lays the parts of a step out in memory; returns how many bytes they take. */
static size_t lay_out(kvf_step *step, char *memory, int num_threads)
{
    const kvf_model *model = step->model;
    const kvf_layer *layer = model->layers;
    size_t at = 0, rows = step->batch->num_tokens;
    long widest = most(layer->qkv.num_rows, layer->gate_up.num_rows);
    long inputs = most(most(layer->qkv.num_columns, layer->output.num_columns), layer->down.num_columns);
    step->row_stride = inputs;
    step->tiles = take(memory, &at, step->num_tiles * sizeof(kvf_tile));
    step->slot_tile = take(memory, &at, step->num_slots * sizeof(int32_t));
    step->row_sequence = take(memory, &at, rows * sizeof(int32_t));
    step->first_tile = take(memory, &at, step->batch->num_sequences * sizeof(int32_t));
    step->hidden = take(memory, &at, rows * padded(model->hidden_size, 32) * sizeof(float));
    step->wide = take(memory, &at, (rows * widest + 16) * sizeof(float));
    step->inputs = take(memory, &at, rows * inputs * sizeof(uint32_t));
    step->groups = take(memory, &at, rows * inputs / GROUP * sizeof(kvf_group));
    step->rows = take(memory, &at, num_threads * inputs * sizeof(float));
    step->turns = take(memory, &at, rows * model->head_dim * sizeof(float));
    step->partials = take(memory, &at, step->num_partials * (model->head_dim + PARTIAL_HEAD) * sizeof(float));
    return at;
}

/* Counts tiles, slots and chunks; fills in what the step has room for. */
static long plan(kvf_step *step, long max_chunks)
{
    const kvf_model *model = step->model;
    const kvf_batch *batch = step->batch;
    long sharing = model->num_heads / model->num_kv_heads, total_chunks = 0;
    step->num_tiles = step->num_slots = step->num_partials = 0;
    for (int s = 0; s < batch->num_sequences; s++) {
        long first_row = batch->qo_indptr[s], num_rows = batch->qo_indptr[s + 1] - first_row;
        if (step->tiles) {
            step->first_tile[s] = step->num_tiles;
            for (long row = 0; row < num_rows; row++) step->row_sequence[first_row + row] = s;
        }
        for (long first = 0; first < num_rows * sharing; first += QUERIES) {
            long count = least(num_rows * sharing - first, QUERIES);
            long begin = batch->positions[first_row] + first / sharing;
            long end = batch->positions[first_row] + (first + count - 1) / sharing;
            begin = model->window ? most(0, begin + 1 - model->window) : 0;
            kvf_tile tile = {s, first, count, begin / CHUNK, end / CHUNK - begin / CHUNK + 1, step->num_slots, 1,
                             step->num_partials};
            /* A context that is more than its share would keep one thread busy while the others wait. */
            if (tile.num_chunks > max_chunks) tile.num_slots = tile.num_chunks;
            if (step->tiles) {
                step->tiles[step->num_tiles] = tile;
                for (long i = 0; i < tile.num_slots; i++) step->slot_tile[tile.slot + i] = step->num_tiles;
            }
            step->num_tiles++;
            step->num_slots += tile.num_slots;
            step->num_partials += tile.num_slots * model->num_kv_heads * count;
            total_chunks += tile.num_chunks;
        }
    }
    return total_chunks;
}

static int is_multiple(float rise, float per_step, float tolerance)
{
    float steps = rise * per_step, whole = (steps + 12582912.0f) - 12582912.0f; /* rounds */
    return steps - whole <= tolerance && whole - steps <= tolerance;
}

/* How many steps lie between the least and the greatest of a group: as few as have every weight at a step, which is how
 * files that were quantized are met; MAX_STEPS where nothing does. */
static int count_steps(const float *weights, float least, float span)
{
    float per_span = 1 / span;
    for (int count = 1; count < MAX_STEPS; count++) {
        int i = 0;
        while (i < GROUP && is_multiple(weights[i] - least, count * per_span, count * 0x1p-14f)) i++;
        if (i == GROUP) return count;
    }
    return MAX_STEPS;
}

/* to: [num_groups][3], of each group of weights the least, how far the greatest is above it, and the number of steps.  The
 * least is NaN where a weight is not finite. */
void kvf_count_steps(const float *weights, long num_groups, float *to)
{
    for (; num_groups; num_groups--, weights += GROUP, to += 3) {
        float least = weights[0], greatest = weights[0], finite = 0;
        for (int i = 0; i < GROUP; i++) {
            finite += weights[i] * 0.0f;
            least = weights[i] < least ? weights[i] : least;
            greatest = weights[i] > greatest ? weights[i] : greatest;
        }
        to[0] = least + finite;
        to[1] = greatest - least;
        to[2] = greatest > least ? count_steps(weights, least, greatest - least) : 0;
    }
}

/* Computes a step; blocks.  One caller at a time.  -1 when there is no memory, and then nothing was done. */
int kvf_run(kvf_engine *engine, const kvf_model *model, kvf_batch *batch)
{
    int num_threads = kvf_pool_size(engine->pool);
    kvf_step step = {.model = model, .batch = batch};
    long max_chunks = plan(&step, INT32_MAX) * model->num_kv_heads / (4 * num_threads);
    plan(&step, max_chunks);
    size_t nbytes = lay_out(&step, NULL, num_threads);
    if (nbytes > engine->nbytes) {
        free(engine->memory);
        engine->nbytes = 0;
        engine->memory = aligned_alloc(64, nbytes);
        if (!engine->memory) return -1;
        engine->nbytes = nbytes;
    }
    lay_out(&step, engine->memory, num_threads);
    plan(&step, max_chunks);
    kvf_pool_run(engine->pool, engine->step, &step);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    batch->ended_ns = now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
    return 0;
}
