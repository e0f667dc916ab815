/* A stand-in for libnvidia-ml.so.1 whose GPUs are lines of a script file.
 *
 * DRUMLINE_FAKE_NVML names the script; it is read again at every call. Without it there are two
 * healthy GPUs. A line is a key with its values; "gpu N KEY VALUE", with N a number or *, is about
 * one GPU, and later lines go before earlier ones:
 *
 *   gpus 4                     how many
 *   driver 580.159.04          the driver's version
 *   init CODE | init hang      what nvmlInit_v2 answers
 *   hang                       every question about a device sleeps for an hour
 *   gpu 0 model NAME
 *   gpu 0 lost 1               every question is answered with NVML_ERROR_GPU_IS_LOST
 *   gpu 0 blank 1              every number is NVML's or DCGM's word for "no value"
 *   gpu 0 gpm 0                no GPM
 *   gpu 0 recovery ACTION      the driver's recovery action, 0 to 4
 *   gpu 0 utilization 37       and memory_used, temperature, power, energy, sm, tensor, dram,
 *                              throttle, ecc, remapped, remap_failure
 *   gpu 0 process PID BYTES    a process on the GPU (every line adds one)
 *   gpu 0 mig 2                MIG is on, with so many instances
 *   event 0 79                 an Xid (every line is delivered once, in order)
 *
 * Layouts are those of nvml.h 12 and 13.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT = 7, TIMEOUT = 10,
    LOST = 15
};
enum { GPUS_MAX = 16, MIG_BASE = 100, TEXT_MAX = 65536 };

typedef struct device { int index; } *nvmlDevice_t;
typedef struct set { int registered[GPUS_MAX]; int delivered; } *nvmlEventSet_t;
typedef struct sample { double at; int gpu; } *nvmlGpmSample_t;

static struct device devices[GPUS_MAX * MIG_BASE + GPUS_MAX];

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

/* ---- the script ---- */

static void script(char *text) {
    const char *path = getenv("DRUMLINE_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    size_t length = 0;
    if (file) {
        length = fread(text, 1, TEXT_MAX - 1, file);
        fclose(file);
    }
    text[length] = 0;
}

/* Copies the value of the last line that starts with `key`; returns whether there is one. */
static int last(const char *key, char *value, size_t size) {
    char *text = malloc(TEXT_MAX);
    int found = 0;
    size_t length = strlen(key);
    char *rest = NULL;
    if (!text) return 0;
    script(text);
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (strncmp(line, key, length) == 0 && (line[length] == ' ' || line[length] == 0)) {
            const char *at = line + length + (line[length] == ' ');
            if (size > 0) snprintf(value, size, "%s", at);
            found = 1;
        }
    }
    free(text);
    return found;
}

static int of_gpu(int gpu, const char *key, char *value, size_t size) {
    char name[96];
    int found;
    snprintf(name, sizeof name, "gpu * %s", key);
    found = last(name, value, size);
    snprintf(name, sizeof name, "gpu %d %s", gpu, key);
    return last(name, value, size) || found;
}

static double number(int gpu, const char *key, double otherwise) {
    char value[128];
    return of_gpu(gpu, key, value, sizeof value) ? atof(value) : otherwise;
}

static int count(void) {
    char value[64];
    int gpus = last("gpus", value, sizeof value) ? atoi(value) : 2;
    return gpus < 0 ? 0 : gpus > GPUS_MAX ? GPUS_MAX : gpus;
}

static int parent(nvmlDevice_t device) {
    int index = device->index;
    return index < GPUS_MAX ? index : (index - GPUS_MAX) / MIG_BASE;
}

static int is_mig(nvmlDevice_t device) { return device->index >= GPUS_MAX; }

static int ask(nvmlDevice_t device) {
    char value[8];
    if (!device || device < devices || device >= devices + GPUS_MAX * MIG_BASE + GPUS_MAX)
        return INVALID;
    if (last("hang", value, sizeof value)) sleep(3600);
    return number(parent(device), "lost", 0) != 0 ? LOST : OK;
}

static int blank(nvmlDevice_t device) { return number(parent(device), "blank", 0) != 0; }

/* ---- the library ---- */

int nvmlInit_v2(void) {
    char value[64];
    for (int i = 0; i < GPUS_MAX * MIG_BASE + GPUS_MAX; i++) devices[i].index = i;
    if (last("init", value, sizeof value)) {
        if (strcmp(value, "hang") == 0) sleep(3600);
        return atoi(value);
    }
    return OK;
}

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    char value[80] = "580.159.04";
    last("driver", value, sizeof value);
    snprintf(version, length, "%s", value);
    return OK;
}

int nvmlSystemGetNVMLVersion(char *version, unsigned length) {
    snprintf(version, length, "13.580.159.04");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *gpus) {
    *gpus = (unsigned)count();
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index >= (unsigned)count()) return INVALID;
    *device = &devices[index];
    return OK;
}

int nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    char value[96] = "NVIDIA H100 80GB HBM3";
    int answer = ask(device);
    if (answer) return answer;
    of_gpu(parent(device), "model", value, sizeof value);
    snprintf(name, length, "%s%s", value, is_mig(device) ? " MIG 1g.10gb" : "");
    return OK;
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    int answer = ask(device);
    if (answer) return answer;
    snprintf(uuid, length, "%s-00000000-0000-0000-0000-%012d", is_mig(device) ? "MIG" : "GPU",
             device->index);
    return OK;
}

int nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    *index = (unsigned)parent(device); /* also of a GPU that is lost */
    return OK;
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} nvmlPciInfo_t;

static void pci(int gpu, nvmlPciInfo_t *info) {
    memset(info, 0, sizeof *info);
    info->bus = 0x10u + (unsigned)gpu;
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus);
}

int nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *info) {
    int answer = ask(device);
    if (answer) return answer;
    pci(parent(device), info);
    return OK;
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t device, unsigned *rates) {
    int answer = ask(device);
    if (answer) return answer;
    if (is_mig(device)) return NOT_SUPPORTED;
    rates[0] = blank(device) ? 0x7ffffff0u : (unsigned)number(parent(device), "utilization", 0);
    rates[1] = blank(device) ? 0xffffffffu : rates[0] / 2;
    return OK;
}

int nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *degrees) {
    int answer = ask(device);
    (void)sensor;
    if (answer) return answer;
    *degrees = blank(device) ? 0x7ffffff1u : (unsigned)number(parent(device), "temperature", 41);
    return OK;
}

int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    int answer = ask(device);
    if (answer) return answer;
    *milliwatts = blank(device) ? 0xffffffffu : (unsigned)number(parent(device), "power", 71500);
    return OK;
}

int nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned kind, unsigned counter,
                                unsigned long long *errors) {
    int answer = ask(device);
    (void)counter;
    if (answer) return answer;
    *errors = blank(device) ? 0x7ffffffffffffff0ull
                            : kind == 0 ? (unsigned long long)number(parent(device), "ecc", 0) : 0;
    return OK;
}

int nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned clock, unsigned *megahertz) {
    int answer = ask(device);
    if (answer) return answer;
    *megahertz = blank(device) ? 0x7ffffff2u : clock == 2 ? 2619 : 1980;
    return OK;
}

#ifndef OLD
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return OK;
}

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

int nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    const unsigned long long total = 85520809984ull;
    int answer = ask(device);
    if (answer) return answer;
    memory->total = is_mig(device) ? total / 8 : total;
    memory->used = (unsigned long long)number(parent(device), "memory_used", 0);
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetNumaNodeId(nvmlDevice_t device, unsigned *node) {
    int answer = ask(device);
    if (answer) return answer;
    *node = blank(device) ? 0xffffffffu : parent(device) < count() / 2 ? 0 : 1;
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    int answer = ask(device);
    if (answer) return answer;
    *major = 9;
    *minor = 0;
    return OK;
}

int nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    int answer = ask(device);
    if (answer) return answer;
    *current = *pending = number(parent(device), "mig", 0) > 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *most) {
    int answer = ask(device);
    if (answer) return answer;
    *most = 7;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig) {
    int answer = ask(device);
    if (answer) return answer;
    if (index >= (unsigned)number(parent(device), "mig", 0)) return NOT_FOUND;
    *mig = &devices[GPUS_MAX + parent(device) * MIG_BASE + (int)index];
    return OK;
}

/* Two links to every other GPU of the same half of the machine. */
static int neighbour(int gpu, unsigned link) {
    int half = count() / 2 > 0 ? count() / 2 : 1;
    int first = gpu / half * half, at = first + (int)link / 2;
    if (at >= gpu) at++;
    return at < first + half && at < count() ? at : -1;
}

int nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned link, unsigned *active) {
    int answer = ask(device);
    char value[8];
    if (answer) return answer;
    if (link >= 18) return INVALID;
    *active = !last("nvlink off", value, sizeof value) && neighbour(parent(device), link) >= 0;
    return OK;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned link, nvmlPciInfo_t *info) {
    int answer = ask(device), other = neighbour(parent(device), link);
    if (answer) return answer;
    if (other < 0) return INVALID;
    pci(other, info);
    return OK;
}

int nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level) {
    int answer = ask(one), half = count() / 2;
    if (answer) return answer;
    *level = half > 0 && parent(one) / half == parent(other) / half ? 40 : 50;
    return OK;
}

int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts) {
    int answer = ask(device);
    if (answer) return answer;
    *milliwatts = blank(device) ? 0xffffffffu : 700000;
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    int answer = ask(device);
    if (answer) return answer;
    *millijoules = blank(device) ? 0xffffffffffffffffull
                                 : (unsigned long long)number(parent(device), "energy", 5000);
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    int answer = ask(device);
    if (answer) return answer;
    *reasons = (unsigned long long)number(parent(device), "throttle", 1);
    return OK;
}

int nvmlDeviceGetRetiredPages(nvmlDevice_t device, unsigned cause, unsigned *pages,
                              unsigned long long *addresses) {
    (void)device, (void)cause, (void)pages, (void)addresses;
    return NOT_SUPPORTED; /* as on every GPU that remaps rows instead */
}

int nvmlDeviceGetRetiredPages_v2(nvmlDevice_t device, unsigned cause, unsigned *pages,
                                 unsigned long long *addresses, unsigned long long *times) {
    (void)times;
    return nvmlDeviceGetRetiredPages(device, cause, pages, addresses);
}

int nvmlDeviceGetPcieThroughput(nvmlDevice_t device, unsigned counter, unsigned *kilobytes) {
    int answer = ask(device);
    if (answer) return answer;
    *kilobytes = blank(device) ? 0xffffffffu : counter == 0 ? 1000 : 2000;
    return OK;
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type, answer;
    union { double d; unsigned u; unsigned long l; unsigned long long ll; } value;
} nvmlFieldValue_t;

int nvmlDeviceGetFieldValues(nvmlDevice_t device, int fields, nvmlFieldValue_t *values) {
    int answer = ask(device), gpu;
    if (answer) return answer;
    gpu = parent(device);
    for (int i = 0; i < fields; i++) {
        nvmlFieldValue_t *v = &values[i];
        v->type = 1;
        v->answer = OK;
        switch (v->field) {
        case 82: v->value.u = (unsigned)number(gpu, "temperature", 41) + 9; break;
        case 142: v->value.u = (unsigned)number(gpu, "remapped", 0); break;
        case 143: v->value.u = 0; break;
        case 144: v->value.u = (unsigned)number(gpu, "remap_pending", 0); break;
        case 145: v->value.u = (unsigned)number(gpu, "remap_failure", 0); break;
        case 230: v->value.u = (unsigned)number(gpu, "recovery", 0); break;
        default: v->answer = NOT_SUPPORTED;
        }
        if (blank(device)) v->value.ll = 0x7ffffff07ffffff0ull;
    }
    return OK;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} nvmlProcessInfo_t;

int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *size,
                                            nvmlProcessInfo_t *processes) {
    int answer = ask(device);
    unsigned room = *size, seen = 0;
    char *text, *rest = NULL;
    if (answer) return answer;
    text = malloc(TEXT_MAX);
    if (!text) return INSUFFICIENT;
    script(text);
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        int gpu;
        unsigned pid;
        unsigned long long bytes;
        if (sscanf(line, "gpu %d process %u %llu", &gpu, &pid, &bytes) != 3) continue;
        if (gpu != parent(device)) continue;
        if (seen < room && processes) {
            nvmlProcessInfo_t process = {pid, bytes, 0xffffffffu, 0xffffffffu};
            if (blank(device)) process.used = 0xffffffffffffffffull;
            processes[seen] = process;
        }
        seen++;
    }
    free(text);
    *size = seen;
    return seen > room ? INSUFFICIENT : OK;
}

/* ---- GPM ---- */

typedef struct { unsigned version, supported; } nvmlGpmSupport_t;
typedef struct {
    unsigned id, answer;
    double value;
    const char *names[3];
} nvmlGpmMetric_t;
typedef struct {
    unsigned version, metrics_count;
    nvmlGpmSample_t one, two;
    nvmlGpmMetric_t metrics[210];
} nvmlGpmMetricsGet_t;

int nvmlGpmQueryDeviceSupport(nvmlDevice_t device, nvmlGpmSupport_t *support) {
    int answer = ask(device);
    if (answer) return answer;
    support->supported = number(parent(device), "gpm", 1) != 0;
    return OK;
}

int nvmlGpmSampleAlloc(nvmlGpmSample_t *sample) {
    *sample = malloc(sizeof **sample);
    return *sample ? OK : INSUFFICIENT;
}

int nvmlGpmSampleFree(nvmlGpmSample_t sample) {
    free(sample);
    return OK;
}

int nvmlGpmSampleGet(nvmlDevice_t device, nvmlGpmSample_t sample) {
    int answer = ask(device);
    if (answer) return answer;
    sample->at = now();
    sample->gpu = parent(device);
    return OK;
}

int nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *get) {
    int gpu = get->two->gpu;
    if (get->two->at <= get->one->at) return INVALID;
    for (unsigned i = 0; i < get->metrics_count; i++) {
        nvmlGpmMetric_t *metric = &get->metrics[i];
        metric->answer = OK;
        memset(metric->names, 0, sizeof metric->names);
        switch (metric->id) {
        case 2: metric->value = number(gpu, "sm", 0); break;
        case 3: metric->value = number(gpu, "sm", 0) / 2; break;
        case 5: metric->value = number(gpu, "tensor", 0); break;
        case 10: metric->value = number(gpu, "dram", 0); break;
        case 20: case 21: metric->value = 3; break;
        case 60: case 61: metric->value = 5; break;
        default: metric->answer = NOT_SUPPORTED;
        }
        if (number(gpu, "blank", 0) != 0) metric->value = 140737488355328.0;
    }
    return OK;
}
#endif

/* ---- events ---- */

typedef struct {
    nvmlDevice_t device;
    unsigned long long kind, data;
    unsigned gpu_instance, compute_instance;
} nvmlEventData_t;

int nvmlEventSetCreate(nvmlEventSet_t *set) {
    *set = calloc(1, sizeof **set);
    return *set ? OK : INSUFFICIENT;
}

int nvmlEventSetFree(nvmlEventSet_t set) {
    free(set);
    return OK;
}

int nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long kinds, nvmlEventSet_t set) {
    int answer = ask(device);
    if (answer) return answer;
    if (!(kinds & 8)) return NOT_SUPPORTED;
    set->registered[parent(device)] = 1;
    return OK;
}

int nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *data, unsigned timeout_ms) {
    double deadline = now() + timeout_ms / 1e3;
    char *text = malloc(TEXT_MAX);
    if (!text) return INSUFFICIENT;
    do {
        int at = 0;
        char *rest = NULL;
        script(text);
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
            int gpu;
            unsigned long long xid;
            if (sscanf(line, "event %d %llu", &gpu, &xid) != 2) continue;
            if (at++ < set->delivered) continue;
            set->delivered++;
            if (gpu < 0 || gpu >= GPUS_MAX || !set->registered[gpu]) continue;
            memset(data, 0, sizeof *data);
            data->device = &devices[gpu];
            data->kind = 8;
            data->data = xid;
            free(text);
            return OK;
        }
        usleep(10000);
    } while (now() < deadline);
    free(text);
    return TIMEOUT;
}
