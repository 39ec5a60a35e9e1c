/* Threads that run one function together, phase by phase. */
#pragma once

#include <stdint.h>

typedef struct kvf_pool kvf_pool;
typedef void kvf_work(void *argument, kvf_pool *pool, int thread);

/* num_threads counts the caller of kvf_pool_run.  NULL when threads cannot be had. */
kvf_pool *kvf_pool_open(int num_threads);
/* Ends the threads and waits for them.  Not while a run is under way. */
void kvf_pool_close(kvf_pool *pool);
int kvf_pool_size(const kvf_pool *pool);
/* Calls work on every thread, the caller being number 0, and returns when all have.  One caller at a time. */
void kvf_pool_run(kvf_pool *pool, kvf_work *work, void *argument);

/* Within work: some of the numbers 0 to total - 1 that nobody else gets, the first of them returned and what is behind the
 * last put into end; total when there are none.  Starts over at each barrier.  A thread gets those of its own part first, the
 * same share of any total (of more than 8 threads some have a part together), and then helps with others'.  Long ranges come
 * first and short ones last, so that memory is read in order and nobody waits long. */
long kvf_claim(kvf_pool *pool, long total, long *end);
/* Within work: returns when all threads have called it; what each stored before is seen by all. */
void kvf_barrier(kvf_pool *pool);

/* By CLOCK_MONOTONIC. */
int64_t kvf_now_ns(void);
/* Of a thread that computes, once: see there. */
void kvf_take_short_turns(void);
