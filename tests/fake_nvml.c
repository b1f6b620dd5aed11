/* A small NVML of our own, for the tests: what pynvml calls of libnvidia-ml.so.1, answered from a table of numbers.
 *
 * Two GPUs, "GPU-0000-1111" and "GPU-2222-3333"; on the second, where its "mig" is 1, one instance "MIG-4444-5555".
 * The tests set numbers by name with fake_set, or before the process starts by FAKE_NVML="name=number name=number":
 *
 *     devices                       how many GPUs there are (2)
 *     fail:FUNCTION                 the nvmlReturn_t that this function answers with instead (0: it works)
 *     delay_ms:FUNCTION             how long it takes
 *     0.total 0.used 0.reserved     bytes of device 0; 1 is the second GPU, 2 the MIG instance
 *     0.compute 0.graphics          how many processes are listed, each with
 *     0.compute.3.pid .used .gi .ci   (used -1: not available)
 *     0.sm 0.memory 0.power 0.limit 0.temperature 0.throttle   MHz, mW, degrees, bits
 *
 * and read fake_get("calls:FUNCTION") and fake_get("open"), the calls to nvmlInit less those to nvmlShutdown.
 * As in the real one, everything but nvmlInit and nvmlErrorString fails where NVML is not open, and a structure whose
 * version word does not hold its size is refused. Compiled with -DOLD it lacks what drivers before 510 lack.
 *
 * Signatures and numbers: NVML API Reference Guide, https://docs.nvidia.com/deploy/nvml-api/
 */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};
enum { GPU0, GPU1, MIG, DEVICES };

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
_Static_assert(sizeof(memory_v1) == 24 && sizeof(memory_v2) == 40 && sizeof(process) == 24, "NVML's sizes");

/* ---- the table ---- */

static struct { char name[80]; long long value; } table[1024];
static int rows;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static long long *row(const char *name) {
    for (int i = 0; i < rows; i++)
        if (!strcmp(table[i].name, name)) return &table[i].value;
    if (rows == sizeof table / sizeof *table || strlen(name) >= sizeof table->name) abort();
    strcpy(table[rows].name, name);
    return &table[rows++].value;
}

long long fake_get(const char *name) {
    pthread_mutex_lock(&lock);
    long long value = *row(name);
    pthread_mutex_unlock(&lock);
    return value;
}

void fake_set(const char *name, long long value) {
    pthread_mutex_lock(&lock);
    *row(name) = value;
    pthread_mutex_unlock(&lock);
}

static void add(const char *name, long long more) {
    pthread_mutex_lock(&lock);
    *row(name) += more;
    pthread_mutex_unlock(&lock);
}

static void set_of(int device, const char *what, long long value) {
    char name[80];
    snprintf(name, sizeof name, "%d.%s", device, what);
    fake_set(name, value);
}

static long long get_of(int device, const char *what) {
    char name[80];
    snprintf(name, sizeof name, "%d.%s", device, what);
    return fake_get(name);
}

static long long get_for(const char *what, const char *function) {
    char name[80];
    snprintf(name, sizeof name, "%s:%s", what, function);
    return fake_get(name);
}

__attribute__((constructor)) void fake_reset(void) {
    pthread_mutex_lock(&lock);
    rows = 0;
    memset(table, 0, sizeof table);
    pthread_mutex_unlock(&lock);
    fake_set("devices", 2);
    for (int device = 0; device < DEVICES; device++) {
        set_of(device, "total", (long long)(device + 1) * 16 << 20);
        set_of(device, "used", (long long)(device + 1) * 5 << 20);
        set_of(device, "reserved", 1 << 20);
        set_of(device, "sm", 1410 + device), set_of(device, "memory", 1593 + device);
        set_of(device, "power", 61500 + device), set_of(device, "limit", 400000 + device);
        set_of(device, "temperature", 41 + device);
    }
    char *settings = getenv("FAKE_NVML"), *copy = settings ? strdup(settings) : NULL, *rest = NULL;
    for (char *word = copy ? strtok_r(copy, " ", &rest) : NULL; word; word = strtok_r(NULL, " ", &rest)) {
        char *equals = strchr(word, '=');
        if (!equals) abort();
        *equals = 0;
        fake_set(word, atoll(equals + 1));
    }
    free(copy);
}

/* ---- NVML ---- */

static int enter(const char *function, int needs_open) {
    char name[80];
    snprintf(name, sizeof name, "calls:%s", function);
    add(name, 1);
    usleep(1000 * get_for("delay_ms", function));
    if (needs_open && fake_get("open") <= 0) return UNINITIALIZED;
    return get_for("fail", function);
}

#define ENTER() do { int error = enter(__func__, 1); if (error) return error; } while (0)
#define ENTER_FOR(device) int d = (int)(size_t)(device)-1; do { \
    ENTER(); if (d < 0 || d >= DEVICES) return INVALID_ARGUMENT; } while (0)

static const char *const uuids[] = {"GPU-0000-1111", "GPU-2222-3333", "MIG-4444-5555"};
static const char *const names[] = {"Paper GPU", "Second GPU", "Second GPU MIG 1g.5gb"};

static int has_instance(void) { return get_of(GPU1, "mig"); }

static int put(const char *text, char *into, unsigned size) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(into, text);
    return SUCCESS;
}

const char *nvmlErrorString(int error) { return error == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Another Error"; }

int nvmlInitWithFlags(unsigned flags) {
    int error = enter(__func__, 0);
    if (!error) add("open", 1);
    return error;
}

int nvmlShutdown(void) {
    ENTER();
    add("open", -1);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) { ENTER(); return put("550.54.15", text, size); }
int nvmlSystemGetCudaDriverVersion(int *version) { ENTER(); *version = 12040; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { ENTER(); *count = fake_get("devices"); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    ENTER();
    if (index >= fake_get("devices")) return INVALID_ARGUMENT;
    *device = (void *)(size_t)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *asked, void **device) {
    ENTER();
    for (size_t i = 0; i < DEVICES; i++)
        if (!strcmp(asked, uuids[i]) && (i == MIG ? has_instance() : (long long)i < fake_get("devices"))) {
            *device = (void *)(i + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *device, char *text, unsigned size) { ENTER_FOR(device); return put(names[d], text, size); }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { ENTER_FOR(device); return put(uuids[d], text, size); }

int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory) {
    ENTER_FOR(device);
    memory->total = get_of(d, "total");
    memory->used = get_of(d, "used") + get_of(d, "reserved");
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

static int list_processes(int d, const char *kind, unsigned *count, process *list) {
    unsigned room = *count;
    *count = get_of(d, kind);
    if (*count > room) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < *count; i++) {
        char name[40];
#define FIELD(what) (snprintf(name, sizeof name, "%s.%u." what, kind, i), get_of(d, name))
        list[i] = (process){FIELD("pid"), FIELD("used"), FIELD("gi"), FIELD("ci")};
    }
    return SUCCESS;
}

#define PROCESSES(name, kind) int name(void *device, unsigned *count, process *list) { \
    ENTER_FOR(device); return list_processes(d, kind, count, list); }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
#ifndef OLD
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
    ENTER_FOR(device);
    if (memory->version != (sizeof(memory_v2) | 2 << 24)) return VERSION_MISMATCH;
    memory->total = get_of(d, "total");
    memory->reserved = get_of(d, "reserved");
    memory->used = get_of(d, "used");
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}
#endif

/* Clocks, power and heat are the board's: a MIG instance has none. */
#define OF_BOARD(name, what, type) int name(void *device, type *value) { \
    ENTER_FOR(device); if (d == MIG) return NOT_SUPPORTED; *value = get_of(d, what); return SUCCESS; }

OF_BOARD(nvmlDeviceGetPowerUsage, "power", unsigned)
OF_BOARD(nvmlDeviceGetEnforcedPowerLimit, "limit", unsigned)
OF_BOARD(nvmlDeviceGetCurrentClocksThrottleReasons, "throttle", unsigned long long)
OF_BOARD(nvmlDeviceGetCurrentClocksEventReasons, "throttle", unsigned long long)

int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz) {
    ENTER_FOR(device);
    if (d == MIG) return NOT_SUPPORTED;
    if (type != 1 && type != 2) return INVALID_ARGUMENT;
    *mhz = get_of(d, type == 1 ? "sm" : "memory");
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {
    ENTER_FOR(device);
    if (d == MIG) return NOT_SUPPORTED;
    if (sensor != 0) return INVALID_ARGUMENT;
    *degrees = get_of(d, "temperature");
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(void *device, unsigned *is) { ENTER_FOR(device); *is = d == MIG; return SUCCESS; }

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    ENTER_FOR(device);
    if (d != GPU1) return NOT_SUPPORTED;
    *current = *pending = has_instance();
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *device, void **board) {
    ENTER_FOR(device);
    if (d != MIG) return INVALID_ARGUMENT;
    *board = (void *)(size_t)(GPU1 + 1);
    return SUCCESS;
}
