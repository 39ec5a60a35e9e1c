/* The CUDA driver's calls that transport/cuda.py makes, over the host's memory: what a GPU would hold lies where UCX and the
 * tests can see it.  Calls that need a current context fail without one, as the driver's do. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static __thread int current;
int fake_allocated, fake_retained, fake_capacity = 64 << 20;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 0 || ordinal > 1 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(intptr_t)(device + 1); fake_retained++; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; fake_retained--; return 0; }
int cuCtxPushCurrent_v2(void *context) { current += context != 0; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = 0; current--; return 0; }
int cuCtxSynchronize(void) { return current ? 0 : 201; }

int cuMemAlloc_v2(uint64_t *address, size_t nbytes)
{
    if (!current) return 201;
    if (nbytes > (size_t)fake_capacity) return 2;
    void *memory;
    if (posix_memalign(&memory, 4096, nbytes)) return 2;
    memset(memory, 0xff, nbytes);
    *address = (uint64_t)memory;
    fake_allocated++;
    return 0;
}

int cuMemFree_v2(uint64_t address)
{
    if (!current) return 201;
    free((void *)address);
    fake_allocated--;
    return 0;
}

int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t n)
{
    if (!current) return 201;
    memset((void *)address, value, n);
    return 0;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n)
{
    if (!current) return 201;
    memcpy((void *)to, from, n);
    return 0;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream)
{
    if (!current || !stream) return 201;
    memcpy(to, (void *)from, n);
    return 0;
}

int cuStreamCreate(void **stream, unsigned flags) { *stream = &current; return current && flags == 1 ? 0 : 201; }
int cuStreamSynchronize(void *stream) { return current && stream ? 0 : 201; }
int cuStreamDestroy_v2(void *stream) { return current && stream ? 0 : 201; }
/* Within one process, where the real ones go from one to another. */
typedef struct { char reserved[64]; } handle_t;
int cuIpcGetMemHandle(handle_t *handle, uint64_t address)
{
    memset(handle, 0, sizeof *handle);
    memcpy(handle->reserved, &address, sizeof address);
    return current ? 0 : 201;
}
int cuIpcOpenMemHandle_v2(uint64_t *address, handle_t handle, unsigned flags)
{
    memcpy(address, handle.reserved, sizeof *address);
    return !current || flags != 1 ? 201 : *address ? 0 : 1;
}
int cuGetErrorString(int status, const char **text) { *text = status == 101 ? "invalid device ordinal" : "error"; return 0; }
