/* What `clips.py` holds readers against: chunks of one flat file into a batch, by threads, with or without their crc32c.
 * Who calls has worked everything out: no Python, no index, no other file. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "../store/_crc32c.h"

typedef struct {
    int descriptor, verifies;
    int64_t num_chunks, next, num_bad;
    const int64_t *offsets, *sizes, *targets;
    uint8_t *target;
} Batch;

static void *read_share(void *argument) {
    Batch *batch = argument;
    int64_t chunk;
    while ((chunk = __atomic_fetch_add(&batch->next, 1, __ATOMIC_RELAXED)) < batch->num_chunks) {
        uint8_t *bytes = batch->target + batch->targets[chunk];
        uint32_t checksum = 0;
        size_t size = (size_t)batch->sizes[chunk];
        struct iovec parts[2] = {{bytes, size}, {&checksum, sizeof checksum}};
        int is_whole = preadv(batch->descriptor, parts, 2, batch->offsets[chunk]) == (ssize_t)(size + sizeof checksum);
        if (!is_whole || (batch->verifies && checksum != ~update_crc(~0u, bytes, size)))
            __atomic_fetch_add(&batch->num_bad, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

void begin(void) { choose_crc(); }

/* How many chunks were not whole. */
int64_t read_batch(int descriptor, int64_t num_chunks, const int64_t *offsets, const int64_t *sizes,
                   const int64_t *targets, uint8_t *target, int num_threads, int verifies) {
    Batch batch = {descriptor, verifies, num_chunks, 0, 0, offsets, sizes, targets, target};
    pthread_t threads[64];
    int num_begun = 0;
    while (num_begun < num_threads - 1 && num_begun < 64 &&
           pthread_create(&threads[num_begun], NULL, read_share, &batch) == 0)
        num_begun++;
    read_share(&batch);
    while (num_begun > 0)
        pthread_join(threads[--num_begun], NULL);
    return batch.num_bad;
}
