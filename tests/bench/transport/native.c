/* What Python is too slow for: the limit, and the eye that sees when bytes arrive. */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t); /* the clock of time.monotonic_ns, the same in every process */
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

void scattered(char *to, const char *from, const uint64_t *to_offsets, const uint64_t *from_offsets, uint64_t n,
               uint64_t nbytes)
{
    for (uint64_t i = 0; i < n; i++) memcpy(to + to_offsets[i], from + from_offsets[i], nbytes);
}

/* Spins until the word holds the value and returns when that was, or 0 after timeout_ns. */
uint64_t watch(_Atomic uint64_t *word, uint64_t value, uint64_t timeout_ns)
{
    for (uint64_t end = now_ns() + timeout_ns;;) {
        int seen = atomic_load_explicit(word, memory_order_acquire) == value;
        uint64_t now = now_ns();
        if (seen) return now;
        if (now > end) return 0;
#if defined(__x86_64__)
        __builtin_ia32_pause(); /* a neighbour on the same core is to be measured, not this */
#endif
    }
}
