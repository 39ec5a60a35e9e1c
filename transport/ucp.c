/* A thin binding to UCP's one-sided operations, driven by one thread.
 *
 * UCP wants every call on a worker to come from one thread, and a copy over shared memory happens inside the
 * posting call itself.  So one C thread owns the worker: callers hand it whole batches and never wait for bytes.
 * Completions collect in a list and raise an eventfd, which an event loop can watch without polling.
 *
 * Memory of a peer on the same host is reached through ucp_rkey_ptr: a mapping of the peer's segment into this
 * process, written by plain stores.  The mapping keeps its pages when the peer dies, so a death can neither abort nor
 * fault the survivor (CMA in UCX's default error mode does).  Everything else goes through put/get and a flush on an
 * endpoint in PEER error mode, where a death arrives as an error code.
 *
 * Compiled against the headers of the UCX in use: no struct layout is written down twice.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#define SLICE_BYTES (4u << 20) /* A job yields to the others after this much: no peer waits for another's batch. */
#define IDLE_POLL_MS 500
#define CLOSE_TIMEOUT_NS 2000000000ull

enum path { PATH_MAPPED = 1, PATH_RMA = 2 };
enum op { OP_WRITE = 0, OP_READ = 1 };

typedef struct region {
    ucp_mem_h memh;
    char *base;
    uint64_t nbytes;
    ucs_memory_type_t memory_type;
} region_t;

typedef struct peer {
    struct peer *next;
    struct ferry *ferry;
    ucp_ep_h ep;
    ucs_status_t status; /* UCS_OK until the endpoint's error handler ran */
    int notified;
    uint64_t id;
} peer_t;

typedef struct remote {
    peer_t *peer;
    ucp_rkey_h rkey;
    uint64_t base, nbytes;
    char *mapped; /* NULL unless the peer's segment is mapped here */
} remote_t;

typedef struct job {
    struct job *next;
    enum op op;
    uint64_t cookie;
    region_t *region;
    remote_t *remote;
    uint64_t n, at, nbytes;
    uint64_t *local, *away, *size;
    uint64_t t_post_ns, t_start_ns;
    ucs_status_t status;
    int cancelled;
    int outstanding; /* requests UCP still holds, the flush among them */
    int flushed;
} job_t;

typedef struct completion {
    uint64_t cookie, nbytes, t_post_ns, t_start_ns, t_end_ns;
    int32_t status, path;
} completion_t;

typedef struct done {
    struct done *next;
    completion_t c;
} done_t;

enum command { CMD_CONNECT, CMD_IMPORT, CMD_DROP_REMOTE, CMD_DISCONNECT, CMD_ALLOC, CMD_RELEASE, CMD_PACK, CMD_CANCEL };

typedef struct call { /* a synchronous call: the caller sleeps until the thread has run it */
    struct call *next;
    enum command command;
    void *in, *out;
    uint64_t a, b, length;
    ucs_status_t status;
    int finished;
} call_t;

typedef struct ferry {
    ucp_context_h context;
    ucp_worker_h worker;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t called;
    int stopping, wake_fd, event_fd, worker_fd;
    call_t *calls;
    job_t *inbox, **inbox_tail;       /* posted, not yet seen by the thread */
    job_t *active, **active_tail;     /* owned by the thread */
    done_t *done, **done_tail;
    peer_t *peers;
    uint64_t next_peer;
    void *address;
    size_t address_length;
} ferry_t;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void ring(int fd)
{
    uint64_t one = 1;
    ssize_t ignored = write(fd, &one, sizeof one);
    (void)ignored; /* a full eventfd is already readable */
}

static void hush(int fd)
{
    uint64_t count;
    ssize_t ignored = read(fd, &count, sizeof count);
    (void)ignored;
}

static void report(ferry_t *f, completion_t c)
{
    done_t *d = calloc(1, sizeof *d);
    if (!d) abort(); /* a completion that cannot be told would strand its blocks for ever */
    d->c = c;
    pthread_mutex_lock(&f->lock);
    *f->done_tail = d;
    f->done_tail = &d->next;
    pthread_mutex_unlock(&f->lock);
    ring(f->event_fd);
}

static void on_peer_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    ((peer_t *)arg)->status = status;
}

static void on_request(void *request, ucs_status_t status, void *arg)
{
    job_t *job = arg;
    if (status != UCS_OK && job->status == UCS_OK) job->status = status;
    job->outstanding--;
    ucp_request_free(request);
}

static void track(job_t *job, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_ERR(request)) {
        if (job->status == UCS_OK) job->status = UCS_PTR_STATUS(request);
    } else if (request != NULL) {
        job->outstanding++;
    }
}

/* Copies or posts up to one slice; true when nothing is left to start. */
static int start_slice(job_t *job)
{
    uint64_t budget = SLICE_BYTES;
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                             UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                             .cb.send = on_request,
                             .user_data = job,
                             .memory_type = job->region->memory_type,
                             .memh = job->region->memh};
    while (job->at < job->n && budget > 0) {
        if (job->cancelled) job->status = UCS_ERR_CANCELED;
        else if (job->remote->peer->status != UCS_OK) job->status = job->remote->peer->status;
        if (job->status != UCS_OK) {
            job->at = job->n;
            break;
        }
        uint64_t i = job->at, length = job->size[i];
        if (length > budget) length = budget;
        char *here = job->region->base + job->local[i];
        if (job->remote->mapped) {
            char *there = job->remote->mapped + job->away[i];
            if (job->op == OP_WRITE) memcpy(there, here, length);
            else memcpy(here, there, length);
        } else {
            uint64_t there = job->remote->base + job->away[i];
            track(job, job->op == OP_WRITE ? ucp_put_nbx(job->remote->peer->ep, here, length, there, job->remote->rkey, &p)
                                           : ucp_get_nbx(job->remote->peer->ep, here, length, there, job->remote->rkey, &p));
        }
        budget -= length;
        job->nbytes += length;
        job->local[i] += length;
        job->away[i] += length;
        if ((job->size[i] -= length) == 0) job->at++;
    }
    return job->at == job->n;
}

static void finish(ferry_t *f, job_t *job)
{
    if (job->remote->mapped) atomic_thread_fence(memory_order_seq_cst); /* every store is out before anybody hears of it */
    report(f, (completion_t){.cookie = job->cookie, .nbytes = job->nbytes, .t_post_ns = job->t_post_ns,
                             .t_start_ns = job->t_start_ns, .t_end_ns = now_ns(), .status = job->status,
                             .path = job->remote->mapped ? PATH_MAPPED : PATH_RMA});
    free(job->local);
    free(job);
}

/* One turn over the active jobs, a slice each.  True while some job could go on without waiting. */
static int advance(ferry_t *f)
{
    int busy = 0;
    for (job_t **link = &f->active, *job; (job = *link) != NULL;) {
        if (job->t_start_ns == 0) job->t_start_ns = now_ns();
        int started = start_slice(job);
        if (started && !job->remote->mapped && !job->flushed && job->remote->peer->status == UCS_OK) {
            ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                     .cb.send = on_request,
                                     .user_data = job};
            track(job, ucp_ep_flush_nbx(job->remote->peer->ep, &p)); /* also after a cancel: what was posted must land or fail */
            job->flushed = 1;
        }
        if (started && job->outstanding == 0) {
            if (job->status == UCS_OK) job->status = job->remote->mapped ? UCS_OK : job->remote->peer->status;
            if ((*link = job->next) == NULL) f->active_tail = link;
            finish(f, job);
        } else {
            busy |= !started;
            link = &job->next;
        }
    }
    return busy;
}

static void close_endpoint(ferry_t *f, peer_t *peer, int force)
{
    ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                             .flags = force ? UCP_EP_CLOSE_FLAG_FORCE : 0};
    ucs_status_ptr_t request = ucp_ep_close_nbx(peer->ep, &p);
    if (UCS_PTR_IS_PTR(request)) {
        uint64_t end = now_ns() + CLOSE_TIMEOUT_NS;
        while (ucp_request_check_status(request) == UCS_INPROGRESS && now_ns() < end) ucp_worker_progress(f->worker);
        ucp_request_free(request);
    }
}

static ucs_status_t run_call(ferry_t *f, call_t *c)
{
    ucs_status_t status = UCS_OK;
    switch (c->command) {
    case CMD_CONNECT: {
        peer_t *peer = calloc(1, sizeof *peer);
        if (!peer) return UCS_ERR_NO_MEMORY;
        peer->ferry = f;
        peer->id = f->next_peer++;
        ucp_ep_params_t p = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                           UCP_EP_PARAM_FIELD_ERR_HANDLER,
                             .address = c->in,
                             .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                             .err_handler = {on_peer_error, peer}};
        if ((status = ucp_ep_create(f->worker, &p, &peer->ep)) != UCS_OK) {
            free(peer);
            return status;
        }
        peer->next = f->peers;
        f->peers = peer;
        c->out = peer;
        c->a = peer->id;
        return UCS_OK;
    }
    case CMD_IMPORT: {
        remote_t *remote = calloc(1, sizeof *remote);
        if (!remote) return UCS_ERR_NO_MEMORY;
        remote->peer = c->out;
        remote->base = c->a;
        remote->nbytes = c->b;
        if ((status = ucp_ep_rkey_unpack(remote->peer->ep, c->in, &remote->rkey)) != UCS_OK) {
            free(remote);
            return status;
        }
        void *mapped = NULL;
        if (ucp_rkey_ptr(remote->rkey, remote->base, &mapped) == UCS_OK) remote->mapped = mapped;
        c->out = remote;
        return UCS_OK;
    }
    case CMD_DROP_REMOTE: {
        remote_t *remote = c->in;
        for (job_t *job = f->active; job; job = job->next)
            if (job->remote == remote) return UCS_ERR_BUSY;
        ucp_rkey_destroy(remote->rkey);
        free(remote);
        return UCS_OK;
    }
    case CMD_DISCONNECT: {
        peer_t *peer = c->in;
        for (job_t *job = f->active; job; job = job->next)
            if (job->remote->peer == peer) return UCS_ERR_BUSY;
        for (peer_t **link = &f->peers; *link; link = &(*link)->next)
            if (*link == peer) {
                *link = peer->next;
                break;
            }
        close_endpoint(f, peer, 1);
        free(peer);
        return UCS_OK;
    }
    case CMD_ALLOC: {
        region_t *region = calloc(1, sizeof *region);
        if (!region) return UCS_ERR_NO_MEMORY;
        ucp_mem_map_params_t p = {.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS |
                                                UCP_MEM_MAP_PARAM_FIELD_ADDRESS,
                                  .address = c->in,
                                  .length = c->length,
                                  .flags = c->in ? 0 : UCP_MEM_MAP_ALLOCATE};
        if ((status = ucp_mem_map(f->context, &p, &region->memh)) != UCS_OK) {
            free(region);
            return status;
        }
        ucp_mem_attr_t attr = {.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS | UCP_MEM_ATTR_FIELD_LENGTH | UCP_MEM_ATTR_FIELD_MEM_TYPE};
        ucp_mem_query(region->memh, &attr);
        region->base = attr.address;
        region->nbytes = c->length;
        region->memory_type = attr.mem_type;
        c->out = region;
        c->a = (uint64_t)region->base;
        return UCS_OK;
    }
    case CMD_RELEASE: {
        region_t *region = c->in;
        for (job_t *job = f->active; job; job = job->next)
            if (job->region == region) return UCS_ERR_BUSY;
        status = ucp_mem_unmap(f->context, region->memh);
        free(region);
        return status;
    }
    case CMD_PACK: {
        region_t *region = c->in;
        void *packed;
        size_t length;
        if ((status = ucp_rkey_pack(f->context, region->memh, &packed, &length)) != UCS_OK) return status;
        if (length > c->length) status = UCS_ERR_BUFFER_TOO_SMALL;
        else memcpy(c->out, packed, length);
        c->length = length;
        ucp_rkey_buffer_release(packed);
        return status;
    }
    case CMD_CANCEL:
        for (job_t *job = f->active; job; job = job->next)
            if (job->cookie == c->a) {
                job->cancelled = 1;
                return UCS_OK;
            }
        return UCS_ERR_NO_ELEM;
    }
    return UCS_ERR_INVALID_PARAM;
}

static void take_in(ferry_t *f)
{
    pthread_mutex_lock(&f->lock);
    if (f->inbox) {
        *f->active_tail = f->inbox;
        f->active_tail = f->inbox_tail;
        f->inbox = NULL;
        f->inbox_tail = &f->inbox;
    }
    call_t *calls = f->calls;
    f->calls = NULL;
    pthread_mutex_unlock(&f->lock);
    int any = calls != NULL;
    while (calls) {
        call_t *c = calls;
        calls = c->next;
        ucs_status_t status = run_call(f, c);
        pthread_mutex_lock(&f->lock);
        c->status = status;
        c->finished = 1;
        pthread_mutex_unlock(&f->lock);
    }
    if (any) {
        pthread_mutex_lock(&f->lock);
        pthread_cond_broadcast(&f->called);
        pthread_mutex_unlock(&f->lock);
    }
}

static void tell_failures(ferry_t *f)
{
    for (peer_t *peer = f->peers; peer; peer = peer->next)
        if (peer->status != UCS_OK && !peer->notified) {
            peer->notified = 1;
            report(f, (completion_t){.cookie = peer->id, .status = peer->status, .path = 0, .t_end_ns = now_ns()});
        }
}

static void *run(void *arg)
{
    ferry_t *f = arg;
    struct pollfd fds[2] = {{.fd = f->wake_fd, .events = POLLIN}, {.fd = f->worker_fd, .events = POLLIN}};
    for (;;) {
        take_in(f);
        int busy = advance(f);
        while (ucp_worker_progress(f->worker)) busy = 1;
        tell_failures(f);
        if (busy) continue;
        pthread_mutex_lock(&f->lock);
        int stopping = f->stopping && !f->inbox && !f->calls;
        pthread_mutex_unlock(&f->lock);
        if (stopping && !f->active) return NULL;
        ucs_status_t armed = ucp_worker_arm(f->worker);
        if (armed == UCS_ERR_BUSY) continue;
        poll(fds, 2, f->active ? 1 : IDLE_POLL_MS);
        hush(f->wake_fd);
    }
}

static ucs_status_t call(ferry_t *f, call_t *c)
{
    pthread_mutex_lock(&f->lock);
    if (f->stopping) {
        pthread_mutex_unlock(&f->lock);
        return UCS_ERR_CANCELED;
    }
    call_t **tail = &f->calls;
    while (*tail) tail = &(*tail)->next;
    *tail = c;
    ring(f->wake_fd);
    while (!c->finished) pthread_cond_wait(&f->called, &f->lock);
    pthread_mutex_unlock(&f->lock);
    return c->status;
}

/* ---- what Python calls; statuses are ucs_status_t, negative on failure ---- */

int kvf_open(ferry_t **out)
{
    ferry_t *f = calloc(1, sizeof *f);
    if (!f) return UCS_ERR_NO_MEMORY;
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
                           .features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP,
                           .name = "kvferry"};
    ucs_status_t status;
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->called, NULL);
    f->inbox_tail = &f->inbox;
    f->active_tail = &f->active;
    f->done_tail = &f->done;
    f->next_peer = 1;
    f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    f->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    status = UCS_ERR_IO_ERROR;
    if (f->wake_fd < 0 || f->event_fd < 0) goto fail;
    if ((status = ucp_init(&params, NULL, &f->context)) != UCS_OK) goto fail;
    ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE, .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    if ((status = ucp_worker_create(f->context, &wp, &f->worker)) != UCS_OK) goto fail_context;
    ucp_address_t *address;
    if ((status = ucp_worker_get_efd(f->worker, &f->worker_fd)) != UCS_OK) goto fail_worker;
    if ((status = ucp_worker_get_address(f->worker, &address, &f->address_length)) != UCS_OK) goto fail_worker;
    f->address = malloc(f->address_length);
    if (f->address) memcpy(f->address, address, f->address_length);
    ucp_worker_release_address(f->worker, address);
    status = UCS_ERR_NO_MEMORY;
    if (!f->address || pthread_create(&f->thread, NULL, run, f)) goto fail_worker;
    *out = f;
    return UCS_OK;
fail_worker:
    free(f->address);
    ucp_worker_destroy(f->worker);
fail_context:
    ucp_cleanup(f->context);
fail:
    if (f->wake_fd >= 0) close(f->wake_fd);
    if (f->event_fd >= 0) close(f->event_fd);
    free(f);
    return status;
}

/* Waits for the jobs under way, ends the thread, closes what is left.  Regions must have been released before. */
void kvf_close(ferry_t *f)
{
    pthread_mutex_lock(&f->lock);
    f->stopping = 1;
    pthread_mutex_unlock(&f->lock);
    ring(f->wake_fd);
    pthread_join(f->thread, NULL);
    while (f->peers) {
        peer_t *peer = f->peers;
        f->peers = peer->next;
        close_endpoint(f, peer, 1);
        free(peer);
    }
    ucp_worker_destroy(f->worker);
    ucp_cleanup(f->context);
    while (f->done) {
        done_t *d = f->done;
        f->done = d->next;
        free(d);
    }
    close(f->wake_fd);
    close(f->event_fd);
    free(f->address);
    free(f);
}

int kvf_event_fd(ferry_t *f) { return f->event_fd; }

uint64_t kvf_address(ferry_t *f, void *out, uint64_t capacity)
{
    if (f->address_length <= capacity) memcpy(out, f->address, f->address_length);
    return f->address_length;
}

/* address NULL: UCX allocates the memory itself (a shared-memory segment where it can). */
int kvf_region(ferry_t *f, void *address, uint64_t nbytes, region_t **out, uint64_t *base)
{
    call_t c = {.command = CMD_ALLOC, .in = address, .length = nbytes};
    int status = call(f, &c);
    if (status == UCS_OK) {
        *out = c.out;
        *base = c.a;
    }
    return status;
}

int kvf_region_release(ferry_t *f, region_t *region)
{
    call_t c = {.command = CMD_RELEASE, .in = region};
    return call(f, &c);
}

int kvf_region_pack(ferry_t *f, region_t *region, void *out, uint64_t *length)
{
    call_t c = {.command = CMD_PACK, .in = region, .out = out, .length = *length};
    int status = call(f, &c);
    *length = c.length;
    return status;
}

int kvf_connect(ferry_t *f, void *address, peer_t **out, uint64_t *id)
{
    call_t c = {.command = CMD_CONNECT, .in = address};
    int status = call(f, &c);
    if (status == UCS_OK) {
        *out = c.out;
        *id = c.a;
    }
    return status;
}

int kvf_disconnect(ferry_t *f, peer_t *peer)
{
    call_t c = {.command = CMD_DISCONNECT, .in = peer};
    return call(f, &c);
}

int kvf_import(ferry_t *f, peer_t *peer, void *rkey, uint64_t base, uint64_t nbytes, remote_t **out, int *mapped)
{
    call_t c = {.command = CMD_IMPORT, .in = rkey, .out = peer, .a = base, .b = nbytes};
    int status = call(f, &c);
    if (status == UCS_OK) {
        *out = c.out;
        *mapped = (*out)->mapped != NULL;
    }
    return status;
}

int kvf_drop(ferry_t *f, remote_t *remote)
{
    call_t c = {.command = CMD_DROP_REMOTE, .in = remote};
    return call(f, &c);
}

/* Hands one batch to the thread and returns.  The arrays are copied; neighbours on both sides become one operation.
 * UCS_ERR_INVALID_PARAM when any piece lies outside either region: nothing is started then. */
int kvf_post(ferry_t *f, int op, region_t *region, remote_t *remote, uint64_t n, const uint64_t *local,
             const uint64_t *away, const uint64_t *size, uint64_t cookie)
{
    for (uint64_t i = 0; i < n; i++)
        if (size[i] > region->nbytes || local[i] > region->nbytes - size[i] || size[i] > remote->nbytes ||
            away[i] > remote->nbytes - size[i])
            return UCS_ERR_INVALID_PARAM;
    job_t *job = calloc(1, sizeof *job);
    uint64_t *arrays = malloc((3 * n + 1) * sizeof *arrays);
    if (!job || !arrays) {
        free(job);
        free(arrays);
        return UCS_ERR_NO_MEMORY;
    }
    job->op = op;
    job->cookie = cookie;
    job->region = region;
    job->remote = remote;
    job->local = arrays;
    job->away = arrays + n;
    job->size = arrays + 2 * n;
    job->t_post_ns = now_ns();
    uint64_t m = 0;
    for (uint64_t i = 0; i < n; i++) {
        if (size[i] == 0) continue;
        if (m && job->local[m - 1] + job->size[m - 1] == local[i] && job->away[m - 1] + job->size[m - 1] == away[i]) {
            job->size[m - 1] += size[i];
            continue;
        }
        job->local[m] = local[i];
        job->away[m] = away[i];
        job->size[m++] = size[i];
    }
    job->n = m;
    pthread_mutex_lock(&f->lock);
    if (f->stopping) {
        pthread_mutex_unlock(&f->lock);
        free(arrays);
        free(job);
        return UCS_ERR_CANCELED;
    }
    *f->inbox_tail = job;
    f->inbox_tail = &job->next;
    pthread_mutex_unlock(&f->lock);
    ring(f->wake_fd);
    return UCS_OK;
}

/* Stops a job at its next piece; its completion still comes.  UCS_ERR_NO_ELEM when it already ended. */
int kvf_cancel(ferry_t *f, uint64_t cookie)
{
    call_t c = {.command = CMD_CANCEL, .a = cookie};
    return call(f, &c);
}

uint64_t kvf_drain(ferry_t *f, completion_t *out, uint64_t capacity)
{
    uint64_t n = 0;
    hush(f->event_fd);
    pthread_mutex_lock(&f->lock);
    while (f->done && n < capacity) {
        done_t *d = f->done;
        if ((f->done = d->next) == NULL) f->done_tail = &f->done;
        out[n++] = d->c;
        free(d);
    }
    if (f->done) ring(f->event_fd);
    pthread_mutex_unlock(&f->lock);
    return n;
}

const char *kvf_status_string(int status) { return ucs_status_string(status); }
const char *kvf_version(void) { return ucp_get_version_string(); }
