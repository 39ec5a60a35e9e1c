/* The choice of an instruction set, and the memory and the plan of a step. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

struct kvf_kernels {
    kvf_work *step;
    kvf_draw *draw;
    kvf_pool *pool;
    void *memory; /* what steps work in; grows with the largest step */
    size_t nbytes;
};

static const struct {
    const char *name;
    kvf_work *step;
    kvf_draw *draw;
} variants[] = {
#if defined(__x86_64__)
    {"avx512bf16", kvf_step_avx512bf16, kvf_draw_avx512bf16},
    {"avx512", kvf_step_avx512, kvf_draw_avx512},
    {"avx2", kvf_step_avx2, kvf_draw_avx2},
#endif
    {"portable", kvf_step_portable, kvf_draw_portable},
};

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

/* One draw, outside of steps; the caller has room for num_logprobs.  -1 without memory. */
int kvf_draw_row(const char *instruction_set, const float *row, long num, const kvf_sampling *by, kvf_drawn *drawn,
                 int64_t *top, double *top_logprobs)
{
    kvf_candidate *order = malloc(num * sizeof *order);
    if (!order) return -1;
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (!strcmp(variants[i].name, instruction_set)) variants[i].draw(row, num, by, drawn, top, top_logprobs, order);
    free(order);
    return 0;
}

kvf_kernels *kvf_kernels_open(const char *instruction_set, int num_threads)
{
    kvf_kernels *kernels = calloc(1, sizeof *kernels);
    if (!kernels) return NULL;
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (!strcmp(variants[i].name, instruction_set)) {
            kernels->step = variants[i].step;
            kernels->draw = variants[i].draw;
        }
    kernels->pool = kvf_pool_open(num_threads);
    if (kernels->pool) return kernels;
    free(kernels);
    return NULL;
}

void kvf_kernels_close(kvf_kernels *kernels)
{
    kvf_pool_close(kernels->pool);
    free(kernels->memory);
    free(kernels);
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
    step->token_ids = take(memory, &at, rows * sizeof(int64_t));
    step->tiles = take(memory, &at, step->num_tiles * sizeof(kvf_tile));
    step->slot_tile = take(memory, &at, step->num_slots * sizeof(int32_t));
    step->row_sequence = take(memory, &at, rows * sizeof(int32_t));
    step->first_tile = take(memory, &at, step->batch->num_sequences * sizeof(int32_t));
    step->hidden = take(memory, &at, rows * padded(model->hidden_size, 32) * sizeof(float));
    step->last_hidden = take(memory, &at, step->batch->num_sampled * padded(model->hidden_size, 32) * sizeof(float));
    step->wide = take(memory, &at, (rows * widest + 16) * sizeof(float));
    step->inputs = take(memory, &at, rows * inputs * sizeof(uint32_t));
    step->groups = take(memory, &at, rows * inputs / GROUP * 2 * sizeof(int32_t));
    step->rows = take(memory, &at, num_threads * inputs * sizeof(float));
    step->room = take(memory, &at, num_threads * inputs / 2 * 4 * 32);
    step->turns = take(memory, &at, rows * model->head_dim * sizeof(float));
    step->partials = take(memory, &at, step->num_partials * (model->head_dim + PARTIAL_HEAD) * sizeof(float));
    step->logits = step->batch->logits;
    if (!step->logits) step->logits = take(memory, &at, step->batch->num_sampled * model->head.num_rows * sizeof(float));
    if (step->batch->sampling)
        step->candidates = take(memory, &at, num_threads * model->vocab_size * sizeof(kvf_candidate));
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
                             step->num_partials, 0};
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
    for (int i = 0; step->tiles && i < batch->num_sampled; i++) {
        long row = batch->sampled[i], sequence = step->row_sequence[row];
        long first = (row - batch->qo_indptr[sequence]) * sharing, end = first + sharing;
        for (long tile = first / QUERIES; tile * QUERIES < end; tile++)
            step->tiles[step->first_tile[sequence] + tile].is_sampled = 1;
    }
    return total_chunks;
}

int kvf_compute(kvf_kernels *kernels, kvf_step *step, const int64_t *drawn_before, long num_drawn_before)
{
    int num_threads = kvf_pool_size(kernels->pool);
    const kvf_batch *batch = step->batch;
    step->draw = kernels->draw;
    long max_chunks = plan(step, INT32_MAX) * step->model->num_kv_heads / (4 * num_threads);
    plan(step, max_chunks);
    size_t nbytes = lay_out(step, NULL, num_threads);
    if (nbytes > kernels->nbytes) {
        free(kernels->memory);
        kernels->nbytes = 0;
        kernels->memory = aligned_alloc(64, nbytes);
        if (!kernels->memory) return -1;
        kernels->nbytes = nbytes;
    }
    lay_out(step, kernels->memory, num_threads);
    plan(step, max_chunks);
    for (long i = 0; i < batch->num_tokens; i++) {
        int64_t token = batch->token_ids[i], number = -1 - token;
        if (token < 0) token = number < num_drawn_before ? drawn_before[number] : 0;
        step->token_ids[i] = token;
    }
    kvf_pool_run(kernels->pool, kernels->step, step);
    return 0;
}
