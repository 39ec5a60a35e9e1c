/* Measures what this processor and its memory do at best. */
#define _GNU_SOURCE
#include "peak.h"
#include "step.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define ROUNDS 200000 /* about a millisecond */

kvf_work kvf_peak_avx512bf16, kvf_peak_avx512, kvf_peak_avx2, kvf_peak_portable;

static const struct {
    const char *name;
    kvf_work *work;
} variants[] = {
#if defined(__x86_64__)
    {"avx512bf16", kvf_peak_avx512bf16},
    {"avx512", kvf_peak_avx512},
    {"avx2", kvf_peak_avx2},
#endif
    {"portable", kvf_peak_portable},
};

static double now_s(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* The best rate of what fits into seconds, two runs at least. */
static double best(kvf_pool *pool, kvf_work *work, kvf_peak *peak, double seconds)
{
    double rate = 0, end_s = now_s() + seconds;
    for (int i = 0; i < 2 || now_s() < end_s; i++) {
        double began_s = now_s();
        kvf_pool_run(pool, work, peak);
        double elapsed_s = now_s() - began_s;
        if (elapsed_s > 0 && peak->count / elapsed_s > rate) rate = peak->count / elapsed_s;
    }
    return rate;
}

/* FLOP/s in the format, and bytes/s read from nbytes of memory, which should be more than the caches hold; on num_threads
 * threads, the caller's among them, for about seconds.  instruction_set: one that this processor has.  -1 without memory or
 * threads. */
int kvf_measure_peaks(const char *instruction_set, int format, int num_threads, long nbytes, double seconds,
                      double *flops_per_s, double *bytes_per_s)
{
    kvf_work *work = NULL;
    for (int i = 0; i < (int)(sizeof variants / sizeof *variants); i++)
        if (!strcmp(variants[i].name, instruction_set)) work = variants[i].work;
    float *sinks = calloc(num_threads, sizeof *sinks);
    char *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    kvf_pool *pool = sinks && memory != MAP_FAILED && work ? kvf_pool_open(num_threads) : NULL;
    if (pool) {
        madvise(memory, nbytes, MADV_HUGEPAGE);
        memset(memory, 1, nbytes); /* or all of it would be one page of zeros */
        kvf_peak products = {.format = format, .rounds = ROUNDS, .sinks = sinks};
        kvf_peak reads = {.memory = memory, .nbytes = nbytes, .sinks = sinks};
        *flops_per_s = best(pool, work, &products, seconds / 2);
        *bytes_per_s = best(pool, work, &reads, seconds / 2);
        kvf_pool_close(pool);
    }
    if (memory != MAP_FAILED) munmap(memory, nbytes);
    free(sinks);
    return pool ? 0 : -1;
}
