/* Preloaded (LD_PRELOAD), makes reads below one folder as slow as those of another disk; of all libraries in the process.
 *
 * SLOW_ROOT: the folder. SLOW_LATENCY_US, SLOW_BYTES_PER_S: of the disk. SLOW_KIND: `network`, where requests wait side
 * by side and share the bandwidth; or `head`, where a request that does not go on behind the last one holds up all others.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t free_at, num_requests, num_bytes;
static ino_t last_file;
static off_t last_end;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int is_slow(int descriptor) {
    const char *root = getenv("SLOW_ROOT");
    char link[64], path[4096];
    if (!root)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path);
    size_t size = strlen(root);
    return length > (ssize_t)size && strncmp(path, root, size) == 0 && path[size] == '/';
}

/* Holds up who has read so many bytes; a request of none is free. */
static void hold_up(int descriptor, ssize_t bytes, off_t offset) {
    if (bytes <= 0 || !is_slow(descriptor))
        return;
    int64_t latency = atoll(getenv("SLOW_LATENCY_US")) * 1000;
    double rate = atof(getenv("SLOW_BYTES_PER_S"));
    const char *kind = getenv("SLOW_KIND");
    int has_head = kind && strcmp(kind, "head") == 0;
    struct stat facts;
    fstat(descriptor, &facts);
    pthread_mutex_lock(&lock);
    int64_t begin = now();
    if (free_at < begin)
        free_at = begin;
    if (has_head && !(facts.st_ino == last_file && offset == last_end))
        free_at += latency;
    free_at += (int64_t)(bytes / rate * 1e9);
    int64_t done = free_at + (has_head ? 0 : latency);
    last_file = facts.st_ino;
    last_end = offset + bytes;
    num_requests++;
    num_bytes += bytes;
    pthread_mutex_unlock(&lock);
    int64_t wait = done - now();
    if (wait > 0) {
        struct timespec time = {wait / 1000000000LL, wait % 1000000000LL};
        nanosleep(&time, NULL);
    }
}

/* Since the last time: for the benchmark, which loads this library once more. */
void take_counts(int64_t *requests, int64_t *bytes) {
    pthread_mutex_lock(&lock);
    *requests = num_requests;
    *bytes = num_bytes;
    num_requests = num_bytes = 0;
    pthread_mutex_unlock(&lock);
}

#define FIND(name) \
    static __typeof__(name) *real; \
    if (!real) \
    real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t pread(int descriptor, void *bytes, size_t count, off_t offset) {
    FIND(pread);
    ssize_t got = real(descriptor, bytes, count, offset);
    hold_up(descriptor, got, offset);
    return got;
}

ssize_t pread64(int descriptor, void *bytes, size_t count, off64_t offset) {
    FIND(pread64);
    ssize_t got = real(descriptor, bytes, count, offset);
    hold_up(descriptor, got, offset);
    return got;
}

ssize_t preadv(int descriptor, const struct iovec *parts, int count, off_t offset) {
    FIND(preadv);
    ssize_t got = real(descriptor, parts, count, offset);
    hold_up(descriptor, got, offset);
    return got;
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
    FIND(preadv64);
    ssize_t got = real(descriptor, parts, count, offset);
    hold_up(descriptor, got, offset);
    return got;
}

ssize_t read(int descriptor, void *bytes, size_t count) {
    FIND(read);
    ssize_t got = real(descriptor, bytes, count);
    if (got > 0 && is_slow(descriptor))
        hold_up(descriptor, got, lseek(descriptor, 0, SEEK_CUR) - got);
    return got;
}
