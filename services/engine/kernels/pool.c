/* Threads that run one function together, phase by phase.
 *
 * A phase of a decode step takes microseconds, so whoever waits spins; a wait that lasts is a sign that the others have
 * no processor, or that there is nothing to do, and then it sleeps on a futex.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* As long as it takes to wake a thread that sleeps and to get it to another processor: with less, each of two threads was
 * asleep whenever the other arrived, for the rest of a step, and steps took up to five times as long. */
#define SPIN_NS 100000
#define SPINS_A_LOOK 32
#define TURN_NS 300000
#define MAX_PARTS 8 /* whoever has nothing left to do looks at all of them */

struct kvf_pool {
    int num_threads, num_parts, part_size; /* of the threads: part_size to each, and fewer to the last */
    kvf_work *work; /* NULL: end */
    void *argument;
    pthread_t *threads;
    atomic_int *cpus; /* where each was seen last */
    /* Each on a line of its own: they change hands all the time. */
    _Alignas(64) atomic_int round; /* how many barriers there were */
    atomic_int num_sleeping;
    _Alignas(64) atomic_int num_arrived;
    struct {
        _Alignas(64) atomic_long num_claimed;
    } parts[MAX_PARTS];
};

typedef struct {
    kvf_pool *pool;
    int number;
} member;

static _Thread_local int own_number; /* a pool's callers: 0 */

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The system likes to wake a thread on the processor of whoever wakes it.  As we take turns in spinning and sleeping, each
 * of the two looks idle to the other, and both stay on one processor while another has nothing to do.  So whoever wakes up
 * beside another of the pool goes to a processor that has none, if it may. */
static void leave_others(kvf_pool *pool)
{
    int own = sched_getcpu(), is_shared = 0;
    cpu_set_t allowed, free_of_others;
    for (int i = 0; i < pool->num_threads; i++)
        is_shared |= i != own_number && atomic_load_explicit(&pool->cpus[i], memory_order_relaxed) == own;
    if (!is_shared || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    free_of_others = allowed;
    for (int i = 0; i < pool->num_threads; i++)
        if (i != own_number) CPU_CLR(atomic_load(&pool->cpus[i]), &free_of_others); /* where it was itself is free again */
    if (!CPU_COUNT(&free_of_others)) return;
    if (!sched_setaffinity(0, sizeof allowed, &free_of_others)) sched_setaffinity(0, sizeof allowed, &allowed);
    atomic_store_explicit(&pool->cpus[own_number], sched_getcpu(), memory_order_relaxed);
}

int64_t kvf_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void wait_for_round(kvf_pool *pool, int round)
{
    const int64_t until_ns = kvf_now_ns() + SPIN_NS;
    for (int i = 1; i % SPINS_A_LOOK || kvf_now_ns() < until_ns; i++) {
        if (atomic_load_explicit(&pool->round, memory_order_acquire) != round) return;
        relax();
    }
    atomic_fetch_add(&pool->num_sleeping, 1);
    while (atomic_load(&pool->round) == round)
        syscall(SYS_futex, &pool->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
    atomic_fetch_sub(&pool->num_sleeping, 1);
    leave_others(pool);
}

long kvf_claim(kvf_pool *pool, long total, long *end)
{
    int own = own_number / pool->part_size;
    for (int i = 0; i < pool->num_parts; i++) {
        long part = (own + i) % pool->num_parts, num_threads = pool->num_threads;
        long member = part * pool->part_size, end_member = member + pool->part_size;
        if (end_member > num_threads) end_member = num_threads;
        long first = total * member / num_threads, size = total * end_member / num_threads - first, count;
        long begin = atomic_load_explicit(&pool->parts[part].num_claimed, memory_order_relaxed);
        do {
            if (begin >= size) break;
            count = (size - begin) / (2 * pool->part_size);
            count = count > 1 ? count : 1;
        } while (!atomic_compare_exchange_weak_explicit(&pool->parts[part].num_claimed, &begin, begin + count,
                                                        memory_order_relaxed, memory_order_relaxed));
        if (begin >= size) continue;
        *end = first + begin + count;
        return first + begin;
    }
    return total;
}

void kvf_barrier(kvf_pool *pool)
{
    int round = atomic_load_explicit(&pool->round, memory_order_relaxed);
    atomic_store_explicit(&pool->cpus[own_number], sched_getcpu(), memory_order_relaxed);
    if (atomic_fetch_add(&pool->num_arrived, 1) + 1 < pool->num_threads) {
        wait_for_round(pool, round);
        return;
    }
    atomic_store_explicit(&pool->num_arrived, 0, memory_order_relaxed);
    for (int i = 0; i < pool->num_parts; i++)
        atomic_store_explicit(&pool->parts[i].num_claimed, 0, memory_order_relaxed);
    atomic_store(&pool->round, round + 1);
    /* Whoever counts itself sleeping after this load looks at the round once more before it sleeps. */
    if (atomic_load(&pool->num_sleeping)) syscall(SYS_futex, &pool->round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* The system lets whoever computes go on for 3 ms when somebody else, who has waited for a message, wakes up.  With shorter
 * turns, which Linux 6.12 and newer give to whoever asks, a loop beside us gets a processor when it needs one. */
void kvf_take_short_turns(void)
{
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes = {.size = sizeof attributes};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0)) return;
    attributes.runtime = TURN_NS;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
}

static void *serve(void *argument)
{
    member self = *(member *)argument;
    free(argument);
    kvf_take_short_turns();
    own_number = self.number;
    for (;;) {
        kvf_barrier(self.pool); /* the caller has set the work */
        if (!self.pool->work) return NULL;
        self.pool->work(self.pool->argument, self.pool, self.number);
        kvf_barrier(self.pool);
    }
}

void kvf_pool_run(kvf_pool *pool, kvf_work *work, void *argument)
{
    pool->work = work;
    pool->argument = argument;
    kvf_barrier(pool);
    if (work) {
        work(argument, pool, 0);
        kvf_barrier(pool);
    }
}

int kvf_pool_size(const kvf_pool *pool) { return pool->num_threads; }

kvf_pool *kvf_pool_open(int num_threads)
{
    kvf_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool) return NULL;
    *pool = (kvf_pool){.num_threads = num_threads, .threads = calloc(num_threads, sizeof(pthread_t)),
                       .cpus = calloc(num_threads, sizeof(atomic_int))};
    pool->part_size = (num_threads + MAX_PARTS - 1) / MAX_PARTS;
    pool->num_parts = (num_threads + pool->part_size - 1) / pool->part_size;
    int started = 1;
    for (; pool->threads && pool->cpus && started < num_threads; started++) {
        member *self = malloc(sizeof *self);
        if (!self) break;
        *self = (member){pool, started};
        if (pthread_create(&pool->threads[started], NULL, serve, self)) {
            free(self);
            break;
        }
    }
    if (pool->threads && pool->cpus && started == num_threads) return pool;
    while (atomic_load(&pool->num_arrived) + 1 < started) relax(); /* the first barrier is shared by those there are */
    pool->num_threads = started;
    kvf_pool_close(pool);
    return NULL;
}

void kvf_pool_close(kvf_pool *pool)
{
    kvf_pool_run(pool, NULL, NULL);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool->cpus);
    free(pool);
}
