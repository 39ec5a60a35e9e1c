#include <stddef.h>

/* As memcpy, but past the cache; other processors may see it late until copy_fence. */
void copy_streaming(void *to, const void *from, size_t n);
/* Every byte of the copies before is seen before anything stored after. */
void copy_fence(void);
