/* Chunks of many shards in one call: descriptors, offsets and destinations in, bytes verified, the interpreter's lock
 * released once. `store/_shards.py` plans what is read, and reads by itself where this module was not built.
 *
 * A chunk is uncompressed, with its crc32c (little-endian) behind it. Nothing is mapped: a file that is cut short while
 * it is read is an outcome, where a mapping of it would kill the process.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_crc32c.h"

/* Raised with every change of what read_chunks takes or gives: an old module beside new Python is not used. */
#define ABI 1

enum { WHOLE = 0, MISSING = 1, CUT_SHORT = 2, MISMATCH = 3, NO_MEMORY = 4 }; /* below zero: an errno */

#define CHECKSUM_BYTES 4
#define ABSENT UINT64_MAX
#define MOST_THREADS 64
#define BYTES_OF_A_THREAD (256 * 1024) /* less is read before another thread has begun */
#define BYTES_OF_A_RUN (512 * 1024)    /* chunks that lie side by side are read at once, up to so many bytes */
#define CHUNKS_OF_A_RUN 64

/* ---------------------------------------------------------------- reading */

typedef struct {
    const uint64_t *places; /* offset and length of each chunk, as in the shard */
    uint64_t count;
} Index;

typedef struct {
    Py_ssize_t num_files, num_chunks;
    const int32_t *descriptors; /* of each file */
    Index *indices;             /* of each file */
    const int32_t *files;       /* of each chunk */
    const int64_t *numbers;     /* of each chunk, in its file */
    int64_t chunk_bytes;        /* without the checksum */
    uint8_t *target;
    const int64_t *offsets; /* of each chunk in the target; or NULL: pieces of chunks are wanted */
    const int64_t *firsts;  /* of each chunk, its first piece; one more behind the last */
    const int64_t *pieces;  /* offset in the chunk, offset in the target, bytes */
} Array;

typedef struct {
    Array *arrays;
    Py_ssize_t num_arrays, num_chunks, num_runs, next;
    Py_ssize_t *runs; /* the first chunk of each, counted over all arrays, one array after another */
    int64_t scratch_bytes;
    int32_t *outcomes; /* of each chunk, counted so */
} Batch;

/* Reads on where the kernel gave less than it was asked for. */
static int read_parts(int descriptor, struct iovec *parts, int num_parts, int64_t offset) {
    while (num_parts > 0) {
        ssize_t got = preadv(descriptor, parts, num_parts, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : CUT_SHORT;
        offset += got;
        while (num_parts > 0 && (size_t)got >= parts->iov_len) {
            got -= (ssize_t)parts->iov_len;
            parts++;
            num_parts--;
        }
        if (num_parts > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + got;
            parts->iov_len -= (size_t)got;
        }
    }
    return WHOLE;
}

/* Offset and length of a chunk, or NULL where it is not there as it must be. */
static const uint64_t *find_place(const Array *array, Py_ssize_t chunk) {
    const uint64_t *place = array->indices[array->files[chunk]].places + 2 * array->numbers[chunk];
    int is_there = place[1] == (uint64_t)array->chunk_bytes + CHECKSUM_BYTES && place[0] <= INT64_MAX - place[1];
    return is_there ? place : NULL;
}

static int verify(const uint8_t *bytes, int64_t count, const uint8_t *checksum) {
    uint32_t found = ~update_crc(~0u, bytes, (size_t)count);
    for (int byte = 0; byte < CHECKSUM_BYTES; byte++)
        if (checksum[byte] != (found >> 8 * byte & 255))
            return MISMATCH;
    return WHOLE;
}

static int read_chunk(const Array *array, Py_ssize_t chunk, uint8_t *scratch) {
    int32_t file = array->files[chunk];
    if (array->indices[file].places[2 * array->numbers[chunk]] == ABSENT)
        return MISSING;
    const uint64_t *place = find_place(array, chunk);
    if (!place)
        return CUT_SHORT;
    uint8_t *bytes = array->offsets ? array->target + array->offsets[chunk] : scratch, checksum[CHECKSUM_BYTES];
    struct iovec parts[2] = {{bytes, (size_t)array->chunk_bytes}, {checksum, CHECKSUM_BYTES}};
    int outcome = read_parts(array->descriptors[file], parts, 2, (int64_t)place[0]);
    if (outcome == WHOLE)
        outcome = verify(bytes, array->chunk_bytes, checksum);
    if (outcome != WHOLE)
        return outcome;
    if (!array->offsets)
        for (int64_t piece = array->firsts[chunk]; piece < array->firsts[chunk + 1]; piece++) {
            const int64_t *own = array->pieces + 3 * piece;
            memcpy(array->target + own[1], scratch + own[0], (size_t)own[2]);
        }
    return WHOLE;
}

/* Chunks that lie side by side in one file, in one read; whether it gave them all. Else they are read one by one. */
static int read_run(const Array *array, Py_ssize_t first, Py_ssize_t count, int32_t *outcomes) {
    struct iovec parts[2 * CHUNKS_OF_A_RUN];
    uint8_t checksums[CHUNKS_OF_A_RUN][CHECKSUM_BYTES];
    for (Py_ssize_t place = 0; place < count; place++) {
        uint8_t *bytes = array->target + array->offsets[first + place];
        parts[2 * place] = (struct iovec){bytes, (size_t)array->chunk_bytes};
        parts[2 * place + 1] = (struct iovec){checksums[place], CHECKSUM_BYTES};
    }
    int64_t offset = (int64_t)find_place(array, first)[0];
    if (read_parts(array->descriptors[array->files[first]], parts, (int)(2 * count), offset) != WHOLE)
        return 0;
    for (Py_ssize_t place = 0; place < count; place++)
        outcomes[place] =
            verify(array->target + array->offsets[first + place], array->chunk_bytes, checksums[place]);
    return 1;
}

static void *read_share(void *argument) {
    Batch *batch = argument;
    uint8_t *scratch = batch->scratch_bytes ? malloc((size_t)batch->scratch_bytes) : NULL;
    Py_ssize_t run, array = 0, first = 0; /* `first`: of the array, counted over all */
    while ((run = __atomic_fetch_add(&batch->next, 1, __ATOMIC_RELAXED)) < batch->num_runs) {
        Py_ssize_t chunk = batch->runs[run], stop = batch->runs[run + 1];
        while (chunk - first >= batch->arrays[array].num_chunks)
            first += batch->arrays[array++].num_chunks;
        const Array *own = &batch->arrays[array];
        if (stop - chunk > 1 && read_run(own, chunk - first, stop - chunk, batch->outcomes + chunk))
            continue;
        for (; chunk < stop; chunk++)
            batch->outcomes[chunk] = !own->offsets && !scratch ? NO_MEMORY : read_chunk(own, chunk - first, scratch);
    }
    free(scratch);
    return NULL;
}

/* Whether a chunk lies behind the one before it, and both go whole into the target. */
static int goes_on(const Array *array, Py_ssize_t chunk) {
    if (!array->offsets || array->files[chunk] != array->files[chunk - 1])
        return 0;
    const uint64_t *before = find_place(array, chunk - 1), *place = find_place(array, chunk);
    return before && place && place[0] == before[0] + before[1];
}

/* Share the chunks out into runs. */
static void find_runs(Batch *batch) {
    Py_ssize_t first = 0;
    for (Py_ssize_t array = 0; array < batch->num_arrays; first += batch->arrays[array++].num_chunks) {
        const Array *own = &batch->arrays[array];
        int64_t most = BYTES_OF_A_RUN / (own->chunk_bytes + 1), count = 0;
        for (Py_ssize_t chunk = 0; chunk < own->num_chunks; chunk++) {
            if (count > 0 && count < most && count < CHUNKS_OF_A_RUN && goes_on(own, chunk)) {
                count++;
            } else {
                batch->runs[batch->num_runs++] = first + chunk;
                count = 1;
            }
        }
    }
    batch->runs[batch->num_runs] = batch->num_chunks;
}

static void read_batch(Batch *batch, int num_threads) {
    pthread_t threads[MOST_THREADS];
    int num_begun = 0;
    while (num_begun < num_threads - 1 && pthread_create(&threads[num_begun], NULL, read_share, batch) == 0)
        num_begun++;
    read_share(batch); /* this thread reads too: all is read where no other can be had */
    while (num_begun > 0)
        pthread_join(threads[--num_begun], NULL);
}

/* ---------------------------------------------------------------- what Python gives */

typedef struct {
    Py_buffer *views;
    size_t count, room;
} Views;

static void release_views(Views *views) {
    while (views->count > 0)
        PyBuffer_Release(&views->views[--views->count]);
    free(views->views);
}

/* The bytes of an object, held until all are released; its length must be a multiple of `item`. */
static void *hold_view(Views *views, PyObject *object, int flags, Py_ssize_t item, Py_ssize_t *count) {
    if (views->count == views->room) {
        size_t room = views->room ? 2 * views->room : 64;
        Py_buffer *grown = realloc(views->views, room * sizeof *grown);
        if (!grown)
            return PyErr_NoMemory();
        views->views = grown;
        views->room = room;
    }
    Py_buffer *view = &views->views[views->count];
    if (PyObject_GetBuffer(object, view, flags) < 0)
        return NULL;
    views->count++;
    if (view->len % item) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no whole number of %zd bytes each", view->len, item);
        return NULL;
    }
    *count = view->len / item;
    static char nothing[1];
    return view->buf ? view->buf : nothing; /* an empty array may have no address */
}

static int refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

/* Whether a chunk's bytes lie inside what they are read from and into: nothing outside is ever written. */
static int check_array(const Array *array, Py_ssize_t target_bytes, Py_ssize_t num_pieces) {
    for (Py_ssize_t chunk = 0; chunk < array->num_chunks; chunk++) {
        int32_t file = array->files[chunk];
        int64_t number = array->numbers[chunk];
        if (file < 0 || file >= array->num_files || number < 0 || (uint64_t)number >= array->indices[file].count)
            return refuse("a chunk of no file, or that its file's index does not have");
        if (array->offsets) {
            int64_t offset = array->offsets[chunk];
            if (offset < 0 || array->chunk_bytes > target_bytes || offset > target_bytes - array->chunk_bytes)
                return refuse("a chunk lies outside of its target");
        } else if (array->firsts[chunk] < 0 || array->firsts[chunk] > array->firsts[chunk + 1] ||
                   array->firsts[chunk + 1] > num_pieces)
            return refuse("a chunk's pieces are not among the pieces");
    }
    for (Py_ssize_t piece = 0; !array->offsets && piece < num_pieces; piece++) {
        const int64_t *own = array->pieces + 3 * piece;
        if (own[0] < 0 || own[1] < 0 || own[2] < 0 || own[2] > array->chunk_bytes || own[2] > target_bytes ||
            own[0] > array->chunk_bytes - own[2] || own[1] > target_bytes - own[2])
            return refuse("a piece lies outside of its chunk or its target");
    }
    return 0;
}

/* (descriptors, indices, files, numbers, chunk_bytes, target, offsets or None, firsts, pieces) */
static int parse_array(Views *views, PyObject *given, Array *array) {
    PyObject *descriptors, *indices, *files, *numbers, *target, *offsets, *firsts, *pieces;
    long long chunk_bytes;
    if (!PyArg_ParseTuple(given, "OO!OOLOOOO:array", &descriptors, &PyTuple_Type, &indices, &files, &numbers,
                          &chunk_bytes, &target, &offsets, &firsts, &pieces))
        return -1;
    Py_ssize_t num_indices = PyTuple_Size(indices), num_numbers, target_bytes, num_pieces = 0, count;
    if (chunk_bytes < 0 || chunk_bytes > PY_SSIZE_T_MAX / 2)
        return refuse("chunk_bytes is below 0, or above what there is");
    array->chunk_bytes = chunk_bytes;
    if (!(array->descriptors = hold_view(views, descriptors, PyBUF_SIMPLE, 4, &array->num_files)) ||
        !(array->files = hold_view(views, files, PyBUF_SIMPLE, 4, &array->num_chunks)) ||
        !(array->numbers = hold_view(views, numbers, PyBUF_SIMPLE, 8, &num_numbers)) ||
        !(array->target = hold_view(views, target, PyBUF_WRITABLE, 1, &target_bytes)))
        return -1;
    if (num_numbers != array->num_chunks || num_indices != array->num_files)
        return refuse("as many numbers as chunks are needed, and as many indices as descriptors");
    if (!(array->indices = calloc((size_t)num_indices + 1, sizeof *array->indices))) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t file = 0; file < num_indices; file++) {
        if (!(array->indices[file].places =
                  hold_view(views, PyTuple_GetItem(indices, file), PyBUF_SIMPLE, 16, &count)))
            return -1;
        array->indices[file].count = (uint64_t)count;
    }
    if (offsets != Py_None) {
        if (!(array->offsets = hold_view(views, offsets, PyBUF_SIMPLE, 8, &count)))
            return -1;
        if (count != array->num_chunks)
            return refuse("as many offsets as chunks are needed");
    } else {
        if (!(array->firsts = hold_view(views, firsts, PyBUF_SIMPLE, 8, &count)) ||
            !(array->pieces = hold_view(views, pieces, PyBUF_SIMPLE, 24, &num_pieces)))
            return -1;
        if (count != array->num_chunks + 1)
            return refuse("one more first piece than chunks is needed");
    }
    return check_array(array, target_bytes, num_pieces);
}

/* Chunks that did not come out whole: a list of (array, chunk, outcome). */
static PyObject *list_outcomes(const Batch *batch) {
    PyObject *found = PyList_New(0);
    Py_ssize_t first = 0;
    for (Py_ssize_t array = 0; found && array < batch->num_arrays; first += batch->arrays[array++].num_chunks)
        for (Py_ssize_t chunk = 0; found && chunk < batch->arrays[array].num_chunks; chunk++) {
            if (batch->outcomes[first + chunk] == WHOLE)
                continue;
            PyObject *one = Py_BuildValue("(nni)", array, chunk, (int)batch->outcomes[first + chunk]);
            if (!one || PyList_Append(found, one) < 0)
                Py_CLEAR(found);
            Py_XDECREF(one);
        }
    return found;
}

PyDoc_STRVAR(read_chunks_doc,
             "read_chunks(arrays, num_threads)\n--\n\n"
             "Read chunks of several arrays and verify their checksums.\n\n"
             "Args:\n"
             "    arrays: A tuple; of each array (descriptors, indices, files, numbers, chunk_bytes, target, offsets,\n"
             "        firsts, pieces). Buffers are contiguous: descriptors (s,) int32, indices s of (m, 2) uint64,\n"
             "        files (n,) int32, numbers (n,) int64, and target. A chunk lies at its place in offsets (n,) int64,\n"
             "        or offsets is None: pieces (p, 3) int64 (offset in the chunk, in the target, bytes) of it are\n"
             "        copied, from firsts (n + 1,) int64 on.\n"
             "    num_threads: The most that read.\n\n"
             "Returns:\n"
             "    (array, chunk, outcome) of each chunk that is not whole: MISSING, CUT_SHORT, MISMATCH, NO_MEMORY, or\n"
             "    an errno below zero.\n\n"
             "Raises:\n"
             "    ValueError: If a chunk lies outside of its index or its target; nothing was read then.");

static PyObject *read_chunks(PyObject *module, PyObject *arguments) {
    PyObject *given, *found = NULL;
    int num_threads;
    if (!PyArg_ParseTuple(arguments, "O!i:read_chunks", &PyTuple_Type, &given, &num_threads))
        return NULL;
    (void)module;
    Views views = {0};
    Batch batch = {.num_arrays = PyTuple_Size(given)};
    int64_t num_bytes = 0;
    int is_parsed = 1;
    if (!(batch.arrays = calloc((size_t)batch.num_arrays + 1, sizeof *batch.arrays))) {
        PyErr_NoMemory();
        is_parsed = 0;
    }
    for (Py_ssize_t array = 0; is_parsed && array < batch.num_arrays; array++) {
        Array *own = &batch.arrays[array];
        is_parsed = parse_array(&views, PyTuple_GetItem(given, array), own) == 0;
        batch.num_chunks += own->num_chunks;
        num_bytes += own->num_chunks * own->chunk_bytes;
        if (!own->offsets && own->chunk_bytes >= batch.scratch_bytes)
            batch.scratch_bytes = own->chunk_bytes + 1; /* of an empty chunk too there is room */
    }
    if (is_parsed && (!(batch.outcomes = calloc((size_t)batch.num_chunks + 1, sizeof *batch.outcomes)) ||
                      !(batch.runs = calloc((size_t)batch.num_chunks + 1, sizeof *batch.runs)))) {
        PyErr_NoMemory();
        is_parsed = 0;
    }
    if (is_parsed) {
        int64_t useful = num_bytes / BYTES_OF_A_THREAD + 1;
        if (num_threads > MOST_THREADS)
            num_threads = MOST_THREADS;
        Py_BEGIN_ALLOW_THREADS
        find_runs(&batch);
        read_batch(&batch, useful < num_threads ? (int)useful : num_threads);
        Py_END_ALLOW_THREADS
        found = list_outcomes(&batch);
    }
    for (Py_ssize_t array = 0; batch.arrays && array < batch.num_arrays; array++)
        free(batch.arrays[array].indices);
    free(batch.arrays);
    free(batch.outcomes);
    free(batch.runs);
    release_views(&views);
    return found;
}

static PyObject *find_crc(PyObject *argument, uint32_t (*find)(uint32_t, const uint8_t *, size_t)) {
    Py_buffer view;
    if (PyObject_GetBuffer(argument, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    uint32_t crc = ~find(~0u, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *crc32c(PyObject *module, PyObject *argument) {
    (void)module;
    return find_crc(argument, update_crc);
}

static PyObject *crc32c_by_table(PyObject *module, PyObject *argument) {
    (void)module;
    return find_crc(argument, crc_by_table);
}

static PyMethodDef methods[] = {
    {"read_chunks", read_chunks, METH_VARARGS, read_chunks_doc},
    {"crc32c", crc32c, METH_O, PyDoc_STR("crc32c(data)\n--\n\nThe checksum of some bytes, as chunks are verified.")},
    {"crc32c_by_table", crc32c_by_table, METH_O,
     PyDoc_STR("crc32c_by_table(data)\n--\n\nThe same as a machine without instructions for it finds it.")},
    {NULL, NULL, 0, NULL},
};

static int add_constants(PyObject *module) {
    static const struct {
        const char *name;
        long value;
    } constants[] = {{"ABI", ABI},           {"MISSING", MISSING},     {"CUT_SHORT", CUT_SHORT},
                     {"MISMATCH", MISMATCH}, {"NO_MEMORY", NO_MEMORY}, {NULL, 0}};
    choose_crc();
    for (size_t place = 0; constants[place].name; place++)
        if (PyModule_AddIntConstant(module, constants[place].name, constants[place].value) < 0)
            return -1;
    return PyModule_AddStringConstant(module, "CRC32C_KIND", crc_kind);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_constants}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = PyDoc_STR("Reads chunks of shards; optional, see store/_shards.py."),
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
