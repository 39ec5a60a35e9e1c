#include <stddef.h>
#include <stdint.h>

/* As memcpy, but past the cache; other processors may see it late until copy_fence. */
void copy_streaming(void *to, const void *from, size_t n);
/* Every byte of the copies before is seen before anything stored after. */
void copy_fence(void);
/* n pieces of one size by memcpy: what transfers are measured against. */
#pragma GCC visibility push(default)
void kvf_memcpy(char *to, const char *from, const uint64_t *offsets, uint64_t n, uint64_t size);
/* The same past the cache; seen by every processor when it returns. */
void kvf_stream(char *to, const char *from, const uint64_t *offsets, uint64_t n, uint64_t size);
#pragma GCC visibility pop
