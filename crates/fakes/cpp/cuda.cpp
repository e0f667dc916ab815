// A fake libcuda: the entry points that crate `cuda` uses, for emulated devices whose kernels are
// shared objects made by the fake NVRTC. Test equipment: it shows that the calls are right, not that
// anything ran on a GPU.
//
// The devices are those that CUDA_VISIBLE_DEVICES names, else as many as DRUMLINE_FAKE_CUDA_DEVICES
// says, else two, as NVML's stand-in has. Their memory is the process's own. Kernels and copies are done when their call
// returns, or with the graph that captured them; a collective of the fake NCCL is done later, so whoever waits for its stream, or copies on
// it, is held up here.
//
// Stricter than a driver: memory ends at a page that may not be touched, is full of NaN when it is
// allocated, and copies must lie inside one allocation; launches are held to a GPU's limits.
//
// DRUMLINE_FAKE_CUDA asks for a fault: no-device, old-driver, memory=BYTES, launch-fails=N (the Nth
// launch), no-graphs, each named where it is used.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <elf.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};
typedef uint64_t DevicePointer;

namespace {

constexpr int DEVICES_MAX = 16;
constexpr size_t PAGE = 4096, SHARED_DEFAULT = 48 << 10, SHARED_MAX = 227 << 10;

struct Allocation {
    char* base;
    size_t mapped, bytes;
};
struct Function {
    int (*run)(const unsigned*, const unsigned*, unsigned, void**);
    int arguments;
    std::string name;
    size_t shared_max = SHARED_DEFAULT;
};
struct Module {
    void* handle;
    std::map<std::string, Function*> functions;
};
// What a captured stream would have done, to be done by each launch of the graph.
typedef std::vector<std::function<void()>> Graph;
struct Stream {
    int device;
    Graph* captured = nullptr;
    bool is_invalid = false;
};
// Whether a stream is captured: then what is not queued on it is refused, and ends the capture, as where the
// capture's mode looks at the whole thread.
thread_local Stream* capturing;
bool refuses() {
    if (capturing) capturing->is_invalid = true;
    return capturing != nullptr;
}
struct Event {
    Stream* recorded = nullptr;
};

std::mutex lock;
std::map<DevicePointer, Allocation> allocations;
size_t allocated;
int sticky;
long launches;
thread_local void* current_context;
int contexts[DEVICES_MAX];

std::string fault(const char* name) {
    const char* value = getenv("DRUMLINE_FAKE_CUDA");
    if (!value) return "";
    std::string text = value, key = name;
    if (text == key) return "yes";
    if (text.compare(0, key.size() + 1, key + "=") == 0) return text.substr(key.size() + 1);
    return "";
}
size_t total_memory() {
    std::string limit = fault("memory");
    return limit.empty() ? (size_t)2 << 30 : strtoull(limit.c_str(), nullptr, 10);
}
// The names of this process's devices, as NVML's stand-in has them.
std::vector<std::string> devices() {
    std::vector<std::string> names;
    if (const char* visible = getenv("CUDA_VISIBLE_DEVICES")) {
        std::string name;
        for (const char* c = visible;; c++) {
            if (*c && *c != ',') {
                name += *c;
                continue;
            }
            if (!name.empty()) names.push_back(name);
            name.clear();
            if (!*c) break;
        }
    } else {
        const char* count = getenv("DRUMLINE_FAKE_CUDA_DEVICES");
        for (int i = 0, n = count ? atoi(count) : 2; i < n; i++) {
            char name[64];
            snprintf(name, sizeof name, "GPU-00000000-0000-0000-0000-%012d", i);
            names.push_back(name);
        }
    }
    if (names.size() > DEVICES_MAX) names.resize(DEVICES_MAX);
    return names;
}
// Collectives that the fake NCCL has on a stream and has not done.
long pending(void* stream) {
    static long (*ask)(void*);
    if (!ask) {
        void* nccl = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
        if (nccl) ask = (long (*)(void*))dlsym(nccl, "fake_nccl_pending");
    }
    return ask ? ask(stream) : 0;
}
void wait_for(void* stream) {
    while (stream && pending(stream) > 0) usleep(20);
}
bool inside(DevicePointer p, size_t bytes) {
    if (bytes == 0) return true;
    auto after = allocations.upper_bound(p);
    if (after == allocations.begin()) return false;
    --after;
    return p + bytes <= after->first + after->second.bytes;
}

}  // namespace

EXPORT int cuInit(unsigned) { return fault("no-device").empty() ? SUCCESS : NO_DEVICE; }
EXPORT int cuDriverGetVersion(int* v) {
    *v = fault("old-driver").empty() ? 13000 : 12020;
    return SUCCESS;
}
EXPORT int cuDeviceGetCount(int* n) {
    *n = (int)devices().size();
    return SUCCESS;
}
EXPORT int cuDeviceGet(int* d, int ordinal) {
    if (ordinal < 0 || (size_t)ordinal >= devices().size()) return INVALID_DEVICE;
    *d = ordinal;
    return SUCCESS;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "emulated device (no GPU)");
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    std::vector<std::string> names = devices();
    if (device < 0 || (size_t)device >= names.size()) return INVALID_DEVICE;
    // The digits of GPU-00000000-0000-..., two to a byte.
    const std::string& name = names[device];
    size_t digits = 0, from = name.find('-');
    memset(uuid, 0, 16);
    for (size_t i = from == std::string::npos ? 0 : from; i < name.size() && digits < 32; i++) {
        char c = name[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) continue;
        uuid[digits / 2] |= digit << (digits % 2 ? 0 : 4);
        digits++;
    }
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = total_memory();
    return SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int* v, int attribute, int) {
    switch (attribute) {
        case 16: *v = 4; break;               // Multiprocessors.
        case 75: *v = 9; break;               // Compute capability.
        case 76: *v = 0; break;
        case 97: *v = SHARED_MAX; break;      // Shared memory of a block, at most.
        case 115: *v = 0; break;              // Memory pools.
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (device < 0 || device >= DEVICES_MAX) return INVALID_DEVICE;
    *context = &contexts[device];
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
EXPORT int cuCtxSetCurrent(void* context) {
    current_context = context;
    return SUCCESS;
}
EXPORT int cuCtxGetCurrent(void** context) {
    *context = current_context;
    return SUCCESS;
}
EXPORT int cuCtxSynchronize() { return sticky; }
EXPORT int cuStreamCreate(void** stream, unsigned) {
    if (!current_context) return INVALID_CONTEXT;
    *stream = new Stream{(int)((int*)current_context - contexts)};
    return SUCCESS;
}
EXPORT int cuStreamDestroy_v2(Stream* stream) {
    // As a driver has it: nobody waits, and what is under way keeps the stream.
    if (pending(stream) == 0) delete stream;
    return SUCCESS;
}
EXPORT int cuStreamSynchronize(void* stream) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    wait_for(stream);
    return sticky;
}
EXPORT int cuStreamQuery(void* stream) {
    if (sticky) return sticky;
    return pending(stream) > 0 ? NOT_READY : SUCCESS;
}
EXPORT int cuStreamWaitEvent(void*, Event* event, unsigned) {
    // What the stream is given from now on would wait; here its giver does.
    wait_for(event->recorded);
    return sticky;
}
EXPORT int cuEventCreate(Event** event, unsigned) {
    if (!current_context) return INVALID_CONTEXT;
    *event = new Event;
    return SUCCESS;
}
EXPORT int cuEventRecord(Event* event, Stream* stream) {
    // As a driver has it: both belong to the current device.
    if (!stream || &contexts[stream->device] != current_context) return INVALID_VALUE;
    event->recorded = stream;
    return SUCCESS;
}
EXPORT int cuEventDestroy_v2(Event* event) {
    delete event;
    return SUCCESS;
}

// Host memory that copies need not go through the driver's own for.
EXPORT int cuMemHostAlloc(void** p, size_t bytes, unsigned) {
    if (!current_context) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    *p = malloc(bytes);
    if (!*p) return OUT_OF_MEMORY;
    memset(*p, 0xff, bytes);
    return SUCCESS;
}
EXPORT int cuMemFreeHost(void* p) {
    free(p);
    return SUCCESS;
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> guard(lock);
    *total = total_memory();
    *free = *total - allocated;
    return SUCCESS;
}
EXPORT int cuMemAlloc_v2(DevicePointer* p, size_t bytes) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    std::lock_guard<std::mutex> guard(lock);
    if (!current_context) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    if (allocated + bytes > total_memory()) return OUT_OF_MEMORY;
    size_t rounded = (bytes + 255) / 256 * 256, pages = (rounded + PAGE - 1) / PAGE * PAGE;
    void* base = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect((char*)base + pages, PAGE, PROT_NONE);
    char* start = (char*)base + pages - rounded;
    memset(start, 0xff, rounded);
    *p = (DevicePointer)start;
    allocations[*p] = {(char*)base, pages + PAGE, bytes};
    allocated += bytes;
    return SUCCESS;
}
EXPORT int cuMemFree_v2(DevicePointer p) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(p);
    if (found == allocations.end()) return INVALID_VALUE;
    Allocation a = found->second;
    allocations.erase(found);
    allocated -= a.bytes;
    // What lies behind the end must be as it was.
    for (char* c = (char*)p + a.bytes; c < a.base + a.mapped - PAGE; c++) {
        if (*c != (char)0xff) {
            fprintf(stderr, "emulated device: written behind the end of an allocation of %zu bytes\n", a.bytes);
            abort();
        }
    }
    munmap(a.base, a.mapped);
    return SUCCESS;
}
EXPORT int cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* stream) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    wait_for(stream);
    std::lock_guard<std::mutex> guard(lock);
    if (sticky) return sticky;
    if (!inside(to, bytes)) return INVALID_VALUE;
    memcpy((void*)to, from, bytes);
    return SUCCESS;
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    wait_for(stream);
    std::lock_guard<std::mutex> guard(lock);
    if (sticky) return sticky;
    if (!inside(from, bytes)) return INVALID_VALUE;
    memcpy(to, (void*)from, bytes);
    return SUCCESS;
}
EXPORT int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    wait_for(stream);
    std::lock_guard<std::mutex> guard(lock);
    if (sticky) return sticky;
    if (!inside(from, bytes) || !inside(to, bytes)) return INVALID_VALUE;
    memmove((void*)to, (void*)from, bytes);
    return SUCCESS;
}
EXPORT int cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, void* stream) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    wait_for(stream);
    std::lock_guard<std::mutex> guard(lock);
    if (sticky) return sticky;
    if (!inside(to, bytes)) return INVALID_VALUE;
    memset((void*)to, value, bytes);
    return SUCCESS;
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
    if (refuses()) return CAPTURE_UNSUPPORTED;
    std::lock_guard<std::mutex> guard(lock);
    const Elf64_Ehdr* elf = (const Elf64_Ehdr*)image;
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG) != 0 || elf->e_shoff == 0) return INVALID_IMAGE;
    size_t bytes = elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize;
    char path[] = "/tmp/drumline-emulated-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return INVALID_IMAGE;
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = write(file, (const char*)image + done, bytes - done);
        if (n <= 0) break;
        done += n;
    }
    close(file);
    void* handle = done == bytes ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    unlink(path);
    if (!handle) {
        fprintf(stderr, "emulated device: %s\n", dlerror());
        return INVALID_IMAGE;
    }
    *module = new Module{handle, {}};
    return SUCCESS;
}
EXPORT int cuModuleUnload(void* module) {
    Module* m = (Module*)module;
    for (auto& f : m->functions) delete f.second;
    dlclose(m->handle);
    delete m;
    return SUCCESS;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    std::lock_guard<std::mutex> guard(lock);
    Module* m = (Module*)module;
    Function*& f = m->functions[name];
    if (!f) {
        void* entry = dlsym(m->handle, (std::string("emulated_") + name).c_str());
        if (!entry) return NOT_FOUND;
        auto arguments = (int (*)())dlsym(m->handle, (std::string("emulated_arguments_") + name).c_str());
        f = new Function{(decltype(Function::run))entry, arguments(), name};
    }
    *function = f;
    return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value < 0 || (size_t)value > SHARED_MAX) return INVALID_VALUE;
    ((Function*)function)->shared_max = value;
    return SUCCESS;
}
namespace {

void run(Function* f, const unsigned* grid, const unsigned* block, unsigned shared, void** parameters) {
    launches++;
    std::string fails = fault("launch-fails");
    if (!fails.empty() && launches == atol(fails.c_str())) {
        sticky = LAUNCH_FAILED;
    } else if (!f->run(grid, block, shared, parameters)) {
        fprintf(stderr, "emulated device: threads of %s wait for each other for ever\n", f->name.c_str());
        sticky = LAUNCH_FAILED;
    }
}

}  // namespace

EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** parameters, void** extra) {
    std::lock_guard<std::mutex> guard(lock);
    if (sticky) return sticky;
    Function* f = (Function*)function;
    size_t threads = (size_t)bx * by * bz;
    if (!current_context || extra || gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffff || gy > 65535 || gz > 65535 ||
        threads == 0 || threads > 1024 || shared > f->shared_max)
        return INVALID_VALUE;
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    Stream* s = (Stream*)stream;
    if (s && s->captured) {
        // The arguments are copied now; crate `cuda` gives each eight bytes.
        std::vector<uint64_t> values(f->arguments);
        for (int i = 0; i < f->arguments; i++) memcpy(&values[i], parameters[i], 8);
        s->captured->push_back([=]() mutable {
            std::vector<void*> pointers;
            for (auto& value : values) pointers.push_back(&value);
            run(f, grid, block, shared, pointers.data());
        });
        return SUCCESS;
    }
    run(f, grid, block, shared, parameters);
    // As on a GPU, the failure is told by a later call.
    return SUCCESS;
}

// Graphs: what is queued on a stream between two calls is kept, and done when the graph is launched.
EXPORT int cuStreamBeginCapture_v2(Stream* stream, unsigned) {
    if (!stream || stream->captured || capturing) return INVALID_VALUE;
    if (fault("no-graphs") == "yes") return CAPTURE_UNSUPPORTED;
    stream->captured = new Graph;
    stream->is_invalid = false;
    capturing = stream;
    return SUCCESS;
}
EXPORT int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (!stream || !stream->captured) return INVALID_VALUE;
    *graph = stream->captured;
    stream->captured = nullptr;
    capturing = nullptr;
    if (!stream->is_invalid) return SUCCESS;
    delete *graph;
    *graph = nullptr;
    return CAPTURE_INVALIDATED;
}
EXPORT int cuGraphInstantiateWithFlags(Graph** exec, Graph* graph, unsigned long long) {
    *exec = new Graph(*graph);
    return SUCCESS;
}
EXPORT int cuGraphDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}
EXPORT int cuGraphExecDestroy(Graph* exec) {
    delete exec;
    return SUCCESS;
}
EXPORT int cuGraphLaunch(Graph* exec, void* stream) {
    wait_for(stream);
    std::lock_guard<std::mutex> guard(lock);
    for (auto& work : *exec) {
        if (sticky) return sticky;
        work();
    }
    return SUCCESS;
}
// For the fake cuBLASLt: keeps `work` if the stream is captured; returns whether it did.
EXPORT int fake_cuda_captures(Stream* stream, const std::function<void()>* work) {
    if (!stream || !stream->captured) return 0;
    stream->captured->push_back(*work);
    return 1;
}

EXPORT int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
        case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *name = "CUDA_ERROR_INVALID_VALUE";
    }
    return SUCCESS;
}
EXPORT int cuGetErrorString(int error, const char** text) {
    *text = error == LAUNCH_FAILED ? "unspecified launch failure" : "an error of the emulated device";
    return SUCCESS;
}
