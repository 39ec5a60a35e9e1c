/* What the transport's two halves share: ferry.c, the thread with its jobs and the calls that Python makes, and ucp.c, all
 * that UCP is asked to do. */
#pragma once
#include <stdatomic.h>
#include <stdint.h>
#include <pthread.h>
#include <ucp/api/ucp.h>

#if UCP_API_VERSION < UCP_VERSION(1, 12)
#error "kvferry needs UCX 1.12 or newer"
#endif

#define CLOSE_TIMEOUT_NS 1000000000ull

enum path { PATH_MAPPED = 1, PATH_RMA = 2 };
enum op { OP_WRITE = 0, OP_READ = 1 };
enum outcome { DONE = 0, CANCELLED = 1, PEER_LOST = 2, FAILED = 3, CLOSED = 4 };

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
    atomic_int status; /* UCS_OK until the endpoint failed; read by any thread */
    int probed;        /* the first import asked the peer who it is */
    int settled;       /* guarded by the lock: it answered, or failed to */
    uint64_t incarnation, answer;
    uint64_t outstanding, heard_ns; /* requests of jobs that UCP holds, and when one ended last */
} peer_t;

/* A peer's region: either mapped, with its owner's mark and a pidfd to see it end, or reached through peer and rkey. */
typedef struct remote {
    struct remote *next;
    peer_t *peer;
    ucp_rkey_h rkey;
    uint64_t base, nbytes, incarnation;
    char *mapped;
    volatile uint64_t *mark; /* the incarnation, until the owner gives the region up */
    int process;
} remote_t;

typedef struct completion {
    uint64_t cookie, nbytes, num_blocks, num_pieces, queued_ns, busy_ns;
    int32_t outcome, status, path;
} completion_t;

typedef struct job {
    struct job *next;
    enum op op;
    uint64_t cookie;
    region_t *region;
    remote_t *remote;
    uint64_t num_blocks, n, at, nbytes, total; /* n pieces: blocks, once neighbours are one */
    uint64_t *local, *away, *size; /* into arrays */
    uint64_t t_post_ns, t_start_ns;
    ucs_status_t status;
    int cancelled, cut_short;
    int outstanding; /* requests UCP still holds, the flush among them */
    int flushed;
    completion_t completion; /* filled in when the job moves to the done list */
    uint64_t arrays[];
} job_t;

/* What only the thread may do. */
enum command { CMD_CONNECT, CMD_DISCONNECT, CMD_IMPORT, CMD_DROP, CMD_ABANDON, CMD_REGISTER, CMD_RELEASE, CMD_PACK, CMD_CANCEL };

typedef struct call { /* work for the thread; the caller sleeps until it ran, unless it is detached */
    struct call *next;
    enum command command;
    void *in, *out;
    uint64_t a, b, length;
    ucs_status_t status;
    int finished, detached;
} call_t;

typedef struct ferry {
    ucp_context_h context;
    ucp_worker_h worker;
    pthread_t thread;
    pthread_mutex_t lock; /* guards stopping, calls, inbox and done; everything else is the thread's */
    pthread_cond_t called;
    int stopping, stopped, wake_fd, event_fd, worker_fd;
    call_t *calls, **calls_tail;
    job_t *inbox, **inbox_tail;   /* posted, not yet seen by the thread */
    job_t *active, **active_tail; /* under way */
    job_t *done, **done_tail;     /* ended, not yet drained */
    peer_t *peers;
    remote_t *remotes; /* those reached through UCP */
    uint64_t num_regions, stall_ns;
    uint64_t num_quiet; /* guarded by the lock: how often the network had nothing more to bring */
    atomic_ulong turns; /* of the thread, since it started; read by any thread */
    atomic_int tid;     /* of the thread, once it runs */
    void *address;
    size_t address_length;
} ferry_t;

/* ucp.c; called by the thread, unless it says otherwise. */

/* Opens UCP and its worker, before there is a thread; f->address is then what peers connect to.  Nothing stays after a
 * failure. */
ucs_status_t open_ucp(ferry_t *f);
/* Closes every endpoint and the worker.  Requests that UCP still held are lost. */
void close_worker(ferry_t *f);
/* Without a thread, after close_worker. */
void close_context(ferry_t *f);
void close_endpoint(ferry_t *f, peer_t *peer);
/* Starts one put or get for the job, or the flush behind all of its own; the outcome comes to job->status and
 * job->outstanding. */
void start_operation(job_t *job, char *here, uint64_t there, uint64_t length);
void start_flush(job_t *job);
ucs_status_t connect_peer(ferry_t *f, call_t *c);
ucs_status_t disconnect_peer(ferry_t *f, peer_t *peer);
ucs_status_t import_remote(ferry_t *f, call_t *c);
ucs_status_t drop_remote(ferry_t *f, remote_t *remote);
ucs_status_t abandon_remote(ferry_t *f, remote_t *remote);
ucs_status_t register_region(ferry_t *f, call_t *c);
/* Also without a thread, once that has ended. */
ucs_status_t release_region(ferry_t *f, region_t *region);
ucs_status_t pack_region(ferry_t *f, call_t *c);

static inline int is_used(ferry_t *f, const region_t *region, const remote_t *remote)
{
    for (job_t *job = f->active; job; job = job->next)
        if (job->region == region || job->remote == remote) return 1;
    return 0;
}

uint64_t now_ns(void);
