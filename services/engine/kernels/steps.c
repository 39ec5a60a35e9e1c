/* What Python calls: a thread that computes one step after the other.
 *
 * A step may be handed over while the one before it runs, with tokens that this one is still to draw: so nobody has to come
 * by between two steps, and the processor does not wait for the interpreter.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLOTS 4 /* a power of two; at most two steps are handed over and not ended, and the end behind them */

/* Steps are numbered from 1, and a counter says how many have come so far.  No lock: whoever waits for the processor with
 * one in hand would hold up the others. */
typedef struct {
    kvf_kernels *kernels;
    pthread_t thread;
    const kvf_model *models[SLOTS];
    kvf_batch *batches[SLOTS];
    atomic_int num_given, num_nearly, num_ended; /* they wrap around */
    int64_t *drawn; /* by the last step; the thread's own */
    long num_drawn, drawn_size;
} kvf_engine;

static void advance(atomic_int *counter, int to)
{
    atomic_store(counter, to);
    syscall(SYS_futex, counter, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void wait_for(atomic_int *counter, int number)
{
    for (int seen; (int)((unsigned)number - (unsigned)(seen = atomic_load(counter))) > 0;)
        syscall(SYS_futex, counter, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void nearly(void *engine_)
{
    kvf_engine *engine = engine_;
    advance(&engine->num_nearly, atomic_load(&engine->num_ended) + 1);
}

/* Keeps what was drawn for the next step; where a row failed, any token will do. */
static int keep_drawn(kvf_engine *engine, const kvf_batch *batch)
{
    long count = batch->sampling ? batch->num_sampled : 0;
    engine->num_drawn = 0;
    if (count > engine->drawn_size) {
        free(engine->drawn);
        engine->drawn = malloc(count * sizeof *engine->drawn);
        engine->drawn_size = engine->drawn ? count : 0;
        if (!engine->drawn) return -1;
    }
    for (long i = 0; i < count; i++) engine->drawn[i] = batch->drawn[i].token_id < 0 ? 0 : batch->drawn[i].token_id;
    engine->num_drawn = count;
    return 0;
}

static void *serve(void *engine_)
{
    kvf_engine *engine = engine_;
    kvf_take_short_turns();
    for (unsigned number = 1;; number++) {
        wait_for(&engine->num_given, number);
        kvf_batch *batch = engine->batches[number % SLOTS];
        if (!batch) return NULL;
        kvf_step step = {.model = engine->models[number % SLOTS], .batch = batch, .nearly = nearly, .engine = engine};
        batch->began_ns = kvf_now_ns();
        batch->failed = kvf_compute(engine->kernels, &step, engine->drawn, engine->num_drawn);
        if (batch->failed)
            engine->num_drawn = 0;
        else
            batch->failed = keep_drawn(engine, batch);
        batch->ended_ns = kvf_now_ns();
        advance(&engine->num_nearly, number);
        advance(&engine->num_ended, number);
    }
}

/* instruction_set: one that this processor has.  num_threads: that compute; they sleep between steps.  NULL when memory or
 * threads cannot be had. */
kvf_engine *kvf_open(const char *instruction_set, int num_threads)
{
    kvf_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->kernels = kvf_kernels_open(instruction_set, num_threads);
    if (engine->kernels && !pthread_create(&engine->thread, NULL, serve, engine)) return engine;
    if (engine->kernels) kvf_kernels_close(engine->kernels);
    free(engine);
    return NULL;
}

/* Hands a step over and returns its number; does not block.  The batch stays where it is until the step has ended.  At most
 * two have not ended.  One caller at a time. */
int kvf_start(kvf_engine *engine, const kvf_model *model, kvf_batch *batch)
{
    unsigned number = atomic_load(&engine->num_given) + 1u;
    engine->models[number % SLOTS] = model;
    engine->batches[number % SLOTS] = batch;
    advance(&engine->num_given, number);
    return number;
}

/* Blocks until the step is near its end (see step.c), or has ended. */
void kvf_wait_nearly(kvf_engine *engine, int number) { wait_for(&engine->num_nearly, number); }

void kvf_wait(kvf_engine *engine, int number) { wait_for(&engine->num_ended, number); }

/* Computes what was handed over, to its end; blocks. */
void kvf_close(kvf_engine *engine)
{
    kvf_start(engine, NULL, NULL);
    pthread_join(engine->thread, NULL);
    kvf_kernels_close(engine->kernels);
    free(engine->drawn);
    free(engine);
}
