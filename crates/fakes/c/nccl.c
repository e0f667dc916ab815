/* A stand-in for libnccl.so.2 that really communicates, between threads and processes, on host
 * memory: what it is given as device pointers must be ordinary ones.
 *
 * As with the real one, a call returns when its work is queued, a communicator does its work in
 * order, and calls between ncclGroupStart and ncclGroupEnd go on together. Sums are made in rank
 * order. `fake_nccl_pending` tells how much queued work a stream still has, which only a test can
 * ask.
 *
 * DRUMLINE_FAKE_NCCL names a script, read when a communicator is made:
 *
 *   version 22005        what ncclGetVersion tells
 *   init hang            a communicator stays in progress for ever
 *   init CODE            making one fails
 *   async CODE N         after N operations the communicator has this asynchronous error
 *   stall N              after N operations nothing makes progress any more
 *   abort hang           ncclCommAbort does not return
 *   rank R ...           any of these for rank R alone
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, SYSTEM_ERROR = 2, INVALID = 4, IN_PROGRESS = 7 };
enum { RANKS_MAX = 16, CHUNK = 65536, SLOTS = 4, STREAMS_MAX = 1024 };
enum { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, SEND, RECV };

typedef struct { char internal[128]; } ncclUniqueId;

/* Bytes on their way from one rank to another. */
typedef struct {
    _Atomic uint64_t written, read;
    char bytes[SLOTS][CHUNK];
} ring;

typedef struct {
    _Atomic uint32_t joined, left, aborted;
    ring rings[]; /* [from][to] */
} shared;

typedef struct op {
    int kind, peer, type, reduce;
    const char *in;
    char *out;
    size_t count;
    void *stream;
    struct op *next;
} op;

typedef struct comm {
    shared *region;
    size_t size;
    char name[128];
    int ranks, rank, ready, async, stall_after, async_code, async_after, abort_hangs, init_hangs;
    _Atomic int error;
    long done;
    struct queue *queue;
    pthread_mutex_t lock;
    pthread_cond_t more;
    int stop;
    pthread_t worker;
} comm;

/* ---- streams ---- */

static struct { void *stream; _Atomic long pending; } streams[STREAMS_MAX];
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

static _Atomic long *pending_of(void *stream) {
    _Atomic long *found = &streams[0].pending;
    pthread_mutex_lock(&streams_lock);
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i].stream == stream) {
            found = &streams[i].pending;
            break;
        }
        if (!streams[i].stream) {
            streams[i].stream = stream;
            found = &streams[i].pending;
            break;
        }
    }
    pthread_mutex_unlock(&streams_lock);
    return found;
}

long fake_nccl_pending(void *stream) { return atomic_load(pending_of(stream)); }

/* ---- work ---- */

/* Bytes of an ncclDataType_t. */
static size_t width(int type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return type >= 0 && type < 10 ? bytes[type] : 1;
}

static int given_up(comm *c) {
    if (c->stop || atomic_load(&c->region->aborted)) return 1;
    return 0;
}

static void breathe(int *idle) {
    if (++*idle > 200) usleep(50);
    else sched_yield();
}

static ring *way(comm *c, int from, int to) { return &c->region->rings[from * c->ranks + to]; }

/* Moves what can be moved of `size` bytes; returns how much. */
static size_t push(ring *r, const char *bytes, size_t size) {
    size_t at = 0;
    while (at < size) {
        uint64_t w = atomic_load(&r->written), d = atomic_load(&r->read);
        size_t part = size - at < CHUNK ? size - at : CHUNK;
        if (w - d >= SLOTS) break;
        memcpy(r->bytes[w % SLOTS], bytes + at, part);
        atomic_store(&r->written, w + 1);
        at += part;
    }
    return at;
}

static size_t pull(ring *r, char *bytes, size_t size) {
    size_t at = 0;
    while (at < size) {
        uint64_t w = atomic_load(&r->written), d = atomic_load(&r->read);
        size_t part = size - at < CHUNK ? size - at : CHUNK;
        if (w == d) break;
        memcpy(bytes + at, r->bytes[d % SLOTS], part);
        atomic_store(&r->read, d + 1);
        at += part;
    }
    return at;
}

/* Sends to and receives from everybody at once: parts[to] goes, into[from] comes. */
static int exchange(comm *c, const char **parts, const size_t *out, char **into, const size_t *in) {
    size_t sent[RANKS_MAX] = {0}, got[RANKS_MAX] = {0};
    int idle = 0;
    for (;;) {
        int left = 0, moved = 0;
        for (int peer = 0; peer < c->ranks; peer++) {
            if (peer == c->rank) continue;
            if (sent[peer] < out[peer]) {
                size_t n = push(way(c, c->rank, peer), parts[peer] + sent[peer], out[peer] - sent[peer]);
                sent[peer] += n;
                moved |= n > 0;
            }
            if (got[peer] < in[peer]) {
                size_t n = pull(way(c, peer, c->rank), into[peer] + got[peer], in[peer] - got[peer]);
                got[peer] += n;
                moved |= n > 0;
            }
            left |= sent[peer] < out[peer] || got[peer] < in[peer];
        }
        if (!left) return OK;
        if (given_up(c)) return SYSTEM_ERROR;
        if (moved) idle = 0;
        else breathe(&idle);
    }
}

static float widened(unsigned short half) {
    unsigned bits = (unsigned)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Every step of a sum of bfloat16 is rounded, as NCCL's are. */
static void add_narrow(unsigned short *sum, const unsigned short *more, size_t count, int reduce) {
    for (size_t i = 0; i < count; i++) {
        float a = widened(sum[i]), b = widened(more[i]), x = reduce == 2 ? (a > b ? a : b) : a + b;
        unsigned bits;
        memcpy(&bits, &x, 4);
        sum[i] = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

static void add(float *sum, const float *more, size_t count, int reduce) {
    for (size_t i = 0; i < count; i++) {
        if (reduce == 2) sum[i] = sum[i] > more[i] ? sum[i] : more[i];
        else sum[i] += more[i];
    }
}

/* Gathers `size` bytes of every rank, in rank order. */
static int gather(comm *c, const char *own, char *all, size_t size) {
    const char *parts[RANKS_MAX];
    char *into[RANKS_MAX];
    size_t out[RANKS_MAX], in[RANKS_MAX];
    for (int peer = 0; peer < c->ranks; peer++) {
        parts[peer] = own;
        into[peer] = all + (size_t)peer * size;
        out[peer] = in[peer] = size;
    }
    memmove(all + (size_t)c->rank * size, own, size);
    return exchange(c, parts, out, into, in);
}

static int collective(comm *c, op *o) {
    size_t size = o->count * width(o->type);
    char *all;
    int answer;
    if (o->kind == BROADCAST) {
        const char *parts[RANKS_MAX];
        char *into[RANKS_MAX];
        size_t out[RANKS_MAX] = {0}, in[RANKS_MAX] = {0};
        for (int peer = 0; peer < c->ranks; peer++) {
            parts[peer] = o->in;
            into[peer] = o->out;
            out[peer] = c->rank == o->peer ? size : 0;
            in[peer] = c->rank != o->peer && peer == o->peer ? size : 0;
        }
        if (c->rank == o->peer && o->in != o->out) memmove(o->out, o->in, size);
        return exchange(c, parts, out, into, in);
    }
    if (o->kind == ALL_GATHER) return gather(c, o->in, o->out, size);
    if (o->type != 7 && o->type != 9) return INVALID; /* reductions are of float and bfloat16 alone */
    all = malloc(size * (size_t)c->ranks + 1);
    if (!all) return SYSTEM_ERROR;
    if (o->kind == ALL_REDUCE) {
        answer = gather(c, o->in, all, size);
    } else {
        const char *parts[RANKS_MAX];
        char *into[RANKS_MAX];
        size_t bytes[RANKS_MAX];
        for (int peer = 0; peer < c->ranks; peer++) {
            parts[peer] = o->in + (size_t)peer * size;
            into[peer] = all + (size_t)peer * size;
            bytes[peer] = size;
        }
        memcpy(into[c->rank], parts[c->rank], size);
        answer = exchange(c, parts, bytes, into, bytes);
    }
    if (answer == OK) {
        for (int rank = 1; rank < c->ranks; rank++) {
            const char *more = all + (size_t)rank * size;
            if (o->type == 9) add_narrow((unsigned short *)all, (const unsigned short *)more, o->count, o->reduce);
            else add((float *)all, (const float *)more, o->count, o->reduce);
        }
        memcpy(o->out, all, size);
    }
    free(all);
    return answer;
}

/* Does the sends and receives of a group together, each pair in the order of its calls. */
static int messages(comm *c, op *first) {
    int idle = 0;
    for (;;) {
        int left = 0, moved = 0;
        unsigned busy_out = 0, busy_in = 0;
        for (op *o = first; o; o = o->next) {
            size_t size = o->count * width(o->type), n = 0;
            unsigned bit = 1u << o->peer;
            if (size == 0) continue;
            if (o->kind == SEND) {
                if (!(busy_out & bit)) n = push(way(c, c->rank, o->peer), o->in, size);
                busy_out |= bit;
                o->in += n;
            } else {
                if (!(busy_in & bit)) n = pull(way(c, o->peer, c->rank), o->out, size);
                busy_in |= bit;
                o->out += n;
            }
            o->count -= n / width(o->type);
            moved |= n > 0;
            left |= o->count > 0;
        }
        if (!left) return OK;
        if (given_up(c)) return SYSTEM_ERROR;
        if (moved) idle = 0;
        else breathe(&idle);
    }
}

static void finish(op *o) {
    while (o) {
        op *next = o->next;
        atomic_fetch_sub(pending_of(o->stream), 1);
        free(o);
        o = next;
    }
}

typedef struct group {
    op *ops;
    struct group *next;
} group;

typedef struct queue { comm *c; group *first, *last; } queue;

__attribute__((unused)) static void *work(void *argument) {
    queue *q = argument;
    comm *c = q->c;
    for (;;) {
        group *g;
        int answer;
        pthread_mutex_lock(&c->lock);
        while (!q->first && !c->stop) pthread_cond_wait(&c->more, &c->lock);
        g = q->first;
        if (g && !(q->first = g->next)) q->last = NULL;
        pthread_mutex_unlock(&c->lock);
        if (!g) break;
        if (c->stall_after >= 0 && c->done >= c->stall_after) {
            /* Nothing goes on; the work stays pending. */
            while (!given_up(c)) usleep(1000);
            answer = SYSTEM_ERROR;
        } else {
            answer = OK;
            if (g->ops->kind == SEND || g->ops->kind == RECV) answer = messages(c, g->ops);
            else for (op *o = g->ops; o && answer == OK; o = o->next) answer = collective(c, o);
        }
        c->done++;
        if (c->async_after >= 0 && c->done >= c->async_after) answer = c->async_code;
        if (answer != OK) atomic_store(&c->error, answer);
        finish(g->ops);
        free(g);
    }
    free(q);
    return NULL;
}

/* ---- groups of calls ---- */

static _Thread_local int depth;
static _Thread_local struct { comm *c; op *first, *last; } open_groups[16];
static _Thread_local int open_count;

static int submit(comm *c, op *ops) {
    group *g = calloc(1, sizeof *g);
    queue *q = c->queue;
    if (!g) return SYSTEM_ERROR;
    g->ops = ops;
    pthread_mutex_lock(&c->lock);
    if (q->last) q->last->next = g;
    else q->first = g;
    q->last = g;
    pthread_cond_signal(&c->more);
    pthread_mutex_unlock(&c->lock);
    return OK;
}

static int call(comm *c, op description) {
    op *o;
    if (!c || !c->ready) return INVALID;
    if (atomic_load(&c->error)) return atomic_load(&c->error);
    o = malloc(sizeof *o);
    if (!o) return SYSTEM_ERROR;
    *o = description;
    o->next = NULL;
    atomic_fetch_add(pending_of(o->stream), 1);
    if (depth == 0) return submit(c, o);
    for (int i = 0; i < open_count; i++) {
        if (open_groups[i].c == c) {
            open_groups[i].last->next = o;
            open_groups[i].last = o;
            return OK;
        }
    }
    if (open_count == 16) return INVALID;
    open_groups[open_count].c = c;
    open_groups[open_count].first = open_groups[open_count].last = o;
    open_count++;
    return OK;
}

int ncclGroupStart(void) {
    depth++;
    return OK;
}

int ncclGroupEnd(void) {
    int answer = OK;
    if (depth == 0) return INVALID;
    if (--depth > 0) return OK;
    for (int i = 0; i < open_count; i++) {
        int one = submit(open_groups[i].c, open_groups[i].first);
        if (one) answer = one;
    }
    open_count = 0;
    return answer;
}

/* ---- the script ---- */

static void script(comm *c, int *version, int *init) {
    const char *path = getenv("DRUMLINE_FAKE_NCCL");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[128];
    while (file && fgets(line, sizeof line, file)) {
        char *at = line;
        int rank, skip = 0, one, two;
        if (sscanf(at, "rank %d %n", &rank, &skip) == 1 && skip > 0) {
            if (!c || rank != c->rank) continue;
            at += skip;
        }
        if (version) sscanf(at, "version %d", version);
        if (!c) continue;
        if (strncmp(at, "init hang", 9) == 0) c->init_hangs = 1;
        else if (init) sscanf(at, "init %d", init);
        if (sscanf(at, "async %d %d", &one, &two) == 2) c->async_code = one, c->async_after = two;
        if (sscanf(at, "stall %d", &one) == 1) c->stall_after = one;
        if (strncmp(at, "abort hang", 10) == 0) c->abort_hangs = 1;
    }
    if (file) fclose(file);
}

/* ---- the library ---- */

int ncclGetVersion(int *version) {
#ifdef OLD
    *version = 2708;
#else
    *version = 23004;
#endif
    script(NULL, version, NULL);
    return OK;
}

const char *ncclGetErrorString(int code) {
    switch (code) {
    case OK: return "no error";
    case 1: return "unhandled cuda error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID: return "invalid argument";
    case 6: return "remote process exited or there was a network error";
    case IN_PROGRESS: return "operation in progress";
    default: return "internal error";
    }
}

int ncclGetUniqueId(ncclUniqueId *id) {
    static _Atomic int next;
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/drumline-fake-nccl-%d-%d-%ld", getpid(),
             atomic_fetch_add(&next, 1), at.tv_nsec);
    return OK;
}

#ifndef OLD
const char *ncclGetLastError(comm *c) {
    (void)c;
    return "told by the stand-in";
}

static void *open_later(void *argument) {
    comm *c = argument;
    int idle = 0;
    queue *q;
    if (c->init_hangs) {
        while (!c->stop) usleep(1000);
        return NULL;
    }
    atomic_fetch_add(&c->region->joined, 1);
    while (atomic_load(&c->region->joined) < (uint32_t)c->ranks) {
        if (given_up(c)) return NULL;
        breathe(&idle);
    }
    /* Everybody has it open: the name is needed no more. */
    shm_unlink(c->name);
    q = c->queue;
    c->ready = 1;
    atomic_store(&c->error, OK);
    return work(q);
}

int ncclCommInitRankConfig(comm **made, int ranks, ncclUniqueId id, int rank, void *config) {
    comm *c = calloc(1, sizeof *c);
    queue *q = calloc(1, sizeof *q);
    int file, init = OK;
    (void)config;
    if (!c || !q || ranks > RANKS_MAX || rank < 0 || rank >= ranks) return INVALID;
    c->ranks = ranks;
    c->rank = rank;
    c->stall_after = c->async_after = -1;
    script(c, NULL, &init);
    if (init != OK) return init;
    memcpy(c->name, id.internal, sizeof c->name - 1);
    c->size = sizeof(shared) + sizeof(ring) * (size_t)ranks * (size_t)ranks;
    if (c->init_hangs) { /* nobody comes: nothing to share, and nothing to leave behind */
        c->region = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    } else {
        file = shm_open(c->name, O_RDWR | O_CREAT, 0600);
        if (file < 0 || ftruncate(file, (off_t)c->size)) return SYSTEM_ERROR;
        c->region = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
    }
    if (c->region == MAP_FAILED) return SYSTEM_ERROR;
    q->c = c;
    c->queue = q;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->more, NULL);
    atomic_store(&c->error, IN_PROGRESS);
    *made = c;
    if (pthread_create(&c->worker, NULL, open_later, c)) return SYSTEM_ERROR;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(comm *c, int *error) {
    *error = atomic_load(&c->error);
    return OK;
}

int ncclCommFinalize(comm *c) {
    (void)c;
    return OK;
}

static int end(comm *c) {
    pthread_mutex_lock(&c->lock);
    c->stop = 1;
    pthread_cond_signal(&c->more);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->worker, NULL);
    munmap(c->region, c->size);
    free(c);
    return OK;
}

int ncclCommDestroy(comm *c) { return end(c); }

int ncclCommAbort(comm *c) {
    if (c->abort_hangs) for (;;) sleep(3600);
    atomic_store(&c->region->aborted, 1);
    return end(c);
}
#endif

int ncclAllReduce(const void *in, void *out, size_t count, int type, int reduce, comm *c, void *stream) {
    return call(c, (op){.kind = ALL_REDUCE, .in = in, .out = out, .count = count, .type = type, .reduce = reduce, .stream = stream});
}

int ncclAllGather(const void *in, void *out, size_t count, int type, comm *c, void *stream) {
    return call(c, (op){.kind = ALL_GATHER, .in = in, .out = out, .count = count, .type = type, .stream = stream});
}

int ncclReduceScatter(const void *in, void *out, size_t count, int type, int reduce, comm *c, void *stream) {
    return call(c, (op){.kind = REDUCE_SCATTER, .in = in, .out = out, .count = count, .type = type, .reduce = reduce, .stream = stream});
}

int ncclBroadcast(const void *in, void *out, size_t count, int type, int root, comm *c, void *stream) {
    return call(c, (op){.kind = BROADCAST, .in = in, .out = out, .count = count, .type = type, .peer = root, .stream = stream});
}

int ncclSend(const void *in, size_t count, int type, int peer, comm *c, void *stream) {
    return call(c, (op){.kind = SEND, .in = in, .count = count, .type = type, .peer = peer, .stream = stream});
}

int ncclRecv(void *out, size_t count, int type, int peer, comm *c, void *stream) {
    return call(c, (op){.kind = RECV, .out = out, .count = count, .type = type, .peer = peer, .stream = stream});
}
